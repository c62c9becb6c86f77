//! Regular files and block devices, buffered or with `O_DIRECT`.
//!
//! Guarantees: an operation does all of its range or fails with path, offset and errno; after a
//! failed flush every later write and flush is refused (law 11); a created file and its name are
//! durable when `open` returns; a file that was refused is left as it was.
//! Does not know: what the bytes mean, who else has the file open beyond its advisory lock.
//!
//! | direct request | how |
//! |---|---|
//! | offset, length and memory aligned | straight |
//! | only the memory unaligned | through an aligned copy |
//! | part of a direct I/O sector | read, overlaid, written under a lock |
//! | the tail of a file that ends within a direct I/O sector | through a buffered twin |

#![expect(clippy::disallowed_methods, reason = "the one door to files")]

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use rustix::fs::SeekFrom;
use rustix::io::Errno;

use super::at_once::{AtOnce, CacheReads};
use super::direct::{Alignment, BOUNCE_BYTES, direct_alignment};
use super::flushing::Flushes;
use super::mounted::{refuse_if_mounted, refuse_if_read_only};
use super::opening::{
    OpenOptions, check_size, failed, flush_directory_of, lock, missing, open_file, suits_direct,
    wrong_type,
};
use super::zeroing::Zeroing;
use super::{Access, AlignedBuffer, Device};
use crate::error::{Error, ErrorKind, Result};
use crate::extent::ByteRange;

/// See the module.
#[derive(Debug)]
pub struct FileDevice {
    path: PathBuf,
    file: File,
    /// Buffered, for the bytes after the last whole direct I/O sector.
    twin: Option<File>,
    size: u64,
    sector_size: u32,
    direct: Option<Alignment>,
    read_only: bool,
    flushes: Flushes,
    /// Held while part of a direct I/O sector is rewritten.
    rewriting: Mutex<()>,
    zeroing: Zeroing,
    cache_reads: CacheReads,
}

impl FileDevice {
    pub fn open(path: impl AsRef<Path>, options: OpenOptions) -> Result<Self> {
        let path = path.as_ref();
        Self::open_checked(path, options).map_err(|error| error.at_path(path))
    }

    fn open_checked(path: &Path, options: OpenOptions) -> Result<Self> {
        let wanted = options.create_size;
        if let Some(size) = wanted {
            check_size(size)?;
        }
        let found = match fs::metadata(path) {
            Ok(found) => Some(found),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(Error::device("open", &error)),
        };
        let block_device = match &found {
            None if wanted.is_some() && !options.read_only => false,
            None => return Err(missing()),
            Some(found) if found.file_type().is_block_device() => {
                if options.lock || !options.read_only {
                    refuse_if_mounted(path, found.rdev())?;
                }
                if !options.read_only {
                    refuse_if_read_only(path, found.rdev())?;
                }
                true
            }
            Some(found) if found.is_file() => false,
            Some(found) => return Err(wrong_type(found)),
        };
        let file = open_file(path, options, block_device, found.is_none())?;
        let made = found.is_none();
        let ready = Self::prepare(path, file, options, block_device);
        if ready.is_err() && made {
            // Nothing half done: the name was made above and holds nothing.
            let _removed = fs::remove_file(path);
        }
        ready
    }

    fn prepare(path: &Path, file: File, options: OpenOptions, block_device: bool) -> Result<Self> {
        if options.lock {
            lock(&file, options.read_only)?;
        }
        let mut size =
            rustix::fs::seek(&file, SeekFrom::End(0)).map_err(failed("find the size"))?;
        let empty_file = size == 0 && !block_device && !options.read_only;
        if let Some(wanted) = options.create_size.filter(|_| empty_file) {
            file.set_len(wanted).map_err(|error| Error::device("set the size", &error))?;
            file.sync_all().map_err(|error| Error::device("flush", &error))?;
            flush_directory_of(path)?;
            size = wanted;
        }
        if let Some(wanted) = options.create_size.filter(|wanted| *wanted > size) {
            return Err(Error::usage(format!(
                "expected at least {wanted} bytes, found {size}: \
                 give a larger device or a smaller size"
            )));
        }
        check_size(size)?;
        let sector_size = match block_device {
            true => rustix::fs::ioctl_blksszget(&file).map_err(failed("find the sector size"))?,
            false => 512,
        };
        let direct = if options.direct {
            Some(direct_alignment(&file, block_device.then_some(sector_size))?)
        } else {
            None
        };
        let twin = match direct {
            Some(alignment) if !size.is_multiple_of(alignment.offset) => {
                let buffered = OpenOptions { direct: false, ..options };
                Some(open_file(path, buffered, false, false)?)
            }
            _ => None,
        };
        Ok(Self {
            path: path.to_path_buf(),
            file,
            twin,
            size,
            sector_size,
            direct,
            read_only: options.read_only,
            flushes: Flushes::default(),
            rewriting: Mutex::new(()),
            zeroing: Zeroing::new(block_device),
            cache_reads: CacheReads::default(),
        })
    }

    /// For moving much at a time: past the page cache where the file system can do that and the
    /// page cache is not its only home.
    pub fn open_for_bulk(path: impl AsRef<Path>, options: OpenOptions) -> Result<Self> {
        let path = path.as_ref();
        let buffered = Self::open(path, options)?;
        if !suits_direct(&buffered.file) {
            return Ok(buffered);
        }
        // The lock is the open file's own: released before it is taken again.
        drop(buffered);
        match Self::open(path, OpenOptions { direct: true, ..options }) {
            Err(error) if error.errno() == Some(Errno::INVAL.raw_os_error()) => {
                Self::open(path, options)
            }
            opened => opened,
        }
    }

    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn check_writable(&self, operation: &'static str) -> Result<()> {
        if self.read_only {
            return Err(self.error(operation, None, Errno::ROFS.into()));
        }
        if self.flushes.have_failed() {
            return Err(Error::new(
                ErrorKind::Poisoned,
                "a flush of this device failed earlier, so what it holds is uncertain: \
                 check the device, then open it again",
            )
            .with_errno(Errno::IO.raw_os_error())
            .at_path(&self.path));
        }
        Ok(())
    }

    fn check_range(&self, offset: u64, length: u64) -> Result<()> {
        let sector = u64::from(self.sector_size);
        let inside = offset.checked_add(length).is_some_and(|end| end <= self.size);
        if inside && offset.is_multiple_of(sector) && length.is_multiple_of(sector) {
            return Ok(());
        }
        Err(Error::usage(format!(
            "expected a range of whole sectors of {sector} bytes within {} bytes, \
             found {length} bytes at {offset}",
            self.size
        ))
        .at_path(&self.path))
    }

    fn error(&self, operation: &'static str, offset: Option<u64>, source: io::Error) -> Error {
        let error = Error::device(operation, &source).at_path(&self.path);
        offset.map_or(error.clone(), |offset| error.at_offset(offset))
    }

    fn read_fully(&self, file: &File, mut offset: u64, mut buffer: &mut [u8]) -> Result<()> {
        while !buffer.is_empty() {
            match file.read_at(buffer, offset) {
                Ok(0) => {
                    let ended = io::Error::from(Errno::IO);
                    let error = Error::new(ErrorKind::Device, "the file became shorter")
                        .with_errno(ended.raw_os_error().unwrap_or(5));
                    return Err(error.at_path(&self.path).at_offset(offset));
                }
                Ok(count) => {
                    offset += count as u64;
                    buffer = &mut buffer[count..];
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(self.error("read", Some(offset), error)),
            }
        }
        Ok(())
    }

    fn write_fully(&self, file: &File, mut offset: u64, mut data: &[u8]) -> Result<()> {
        while !data.is_empty() {
            match file.write_at(data, offset) {
                Ok(0) => return Err(self.error("write", Some(offset), Errno::IO.into())),
                Ok(count) => {
                    offset += count as u64;
                    data = &data[count..];
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(self.error("write", Some(offset), error)),
            }
        }
        Ok(())
    }

    /// Splits a request where the whole direct I/O sectors of the device end.
    fn split_at_tail(&self, alignment: Alignment, offset: u64, length: usize) -> usize {
        let whole = self.size - self.size % alignment.offset;
        usize::try_from(whole.saturating_sub(offset)).map_or(length, |before| before.min(length))
    }

    fn read_direct(&self, alignment: Alignment, offset: u64, buffer: &mut [u8]) -> Result<()> {
        if alignment.fits(offset, buffer) {
            return self.read_fully(&self.file, offset, buffer);
        }
        for piece in alignment.pieces(offset, buffer.len() as u64) {
            let mut bounce = AlignedBuffer::zeroed(piece.outer.length as usize);
            self.read_fully(&self.file, piece.outer.offset, &mut bounce)?;
            let inner = piece.inner_from(piece.outer.offset);
            buffer[piece.inner_from(offset)].copy_from_slice(&bounce[inner]);
        }
        Ok(())
    }

    fn write_direct(&self, alignment: Alignment, offset: u64, data: &[u8]) -> Result<()> {
        if alignment.fits(offset, data) {
            return self.write_fully(&self.file, offset, data);
        }
        let partial = !alignment.fits_offset(offset, data.len() as u64);
        // Two requests may share a direct I/O sector without overlapping.
        let _held = partial.then(|| self.rewriting.lock().unwrap_or_else(PoisonError::into_inner));
        for piece in alignment.pieces(offset, data.len() as u64) {
            let mut bounce = AlignedBuffer::zeroed(piece.outer.length as usize);
            if piece.inner != piece.outer {
                self.read_fully(&self.file, piece.outer.offset, &mut bounce)?;
            }
            let inner = piece.inner_from(piece.outer.offset);
            bounce[inner].copy_from_slice(&data[piece.inner_from(offset)]);
            self.write_fully(&self.file, piece.outer.offset, &bounce)?;
        }
        Ok(())
    }

    fn write_zeros(&self, offset: u64, length: u64) -> Result<()> {
        let zeros = AlignedBuffer::zeroed(length.min(BOUNCE_BYTES) as usize);
        let mut done = 0;
        while done < length {
            let count = (length - done).min(zeros.len() as u64);
            self.write_at(offset + done, &zeros[..count as usize])?;
            done += count;
        }
        Ok(())
    }
}

impl Device for FileDevice {
    fn size(&self) -> u64 {
        self.size
    }

    fn sector_size(&self) -> u32 {
        self.sector_size
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        self.check_range(offset, buffer.len() as u64)?;
        let Some(alignment) = self.direct else {
            return self.read_fully(&self.file, offset, buffer);
        };
        let at = self.split_at_tail(alignment, offset, buffer.len());
        let (whole, tail) = buffer.split_at_mut(at);
        if !whole.is_empty() {
            self.read_direct(alignment, offset, whole)?;
        }
        match &self.twin {
            Some(twin) if !tail.is_empty() => self.read_fully(twin, offset + at as u64, tail),
            _ => Ok(()),
        }
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> Result<()> {
        self.check_writable("write")?;
        self.check_range(offset, data.len() as u64)?;
        let Some(alignment) = self.direct else {
            return self.write_fully(&self.file, offset, data);
        };
        let (whole, tail) = data.split_at(self.split_at_tail(alignment, offset, data.len()));
        if !whole.is_empty() {
            self.write_direct(alignment, offset, whole)?;
        }
        match &self.twin {
            Some(twin) if !tail.is_empty() => {
                self.write_fully(twin, offset + whole.len() as u64, tail)
            }
            _ => Ok(()),
        }
    }

    fn zero_at(&self, offset: u64, length: u64) -> Result<()> {
        self.check_writable("write zeros")?;
        self.check_range(offset, length)?;
        if length == 0 {
            return Ok(());
        }
        match self.zeroing.zero(&self.file, offset, length) {
            Ok(true) => Ok(()),
            Ok(false) => self.write_zeros(offset, length),
            Err(error) => Err(self.error("write zeros", Some(offset), error.into())),
        }
    }

    fn flush(&self) -> Result<()> {
        if self.read_only {
            return Ok(());
        }
        self.flushes.run(|| {
            self.check_writable("flush")?;
            loop {
                match rustix::fs::fdatasync(&self.file) {
                    Ok(()) => return Ok(()),
                    Err(Errno::INTR) => {}
                    Err(error) => return Err(self.error("flush", None, error.into())),
                }
            }
        })
    }

    fn next_data(&self, offset: u64) -> Result<Option<ByteRange>> {
        if offset >= self.size {
            return Ok(None);
        }
        let start = match rustix::fs::seek(&self.file, SeekFrom::Data(offset)) {
            Ok(start) if start >= self.size => return Ok(None),
            Ok(start) => start,
            Err(Errno::NXIO) => return Ok(None),
            Err(Errno::INVAL | Errno::OPNOTSUPP | Errno::NOSYS) => {
                return Ok(Some(ByteRange::new(offset, self.size - offset)));
            }
            Err(error) => return Err(self.error("seek data", Some(offset), error.into())),
        };
        let end = rustix::fs::seek(&self.file, SeekFrom::Hole(start))
            .map_err(|error| self.error("seek a hole", Some(start), error.into()))?;
        // A file system may count in units that are no multiple of our sector.
        let sector = u64::from(self.sector_size);
        let start = start - start % sector;
        let end = end.next_multiple_of(sector).min(self.size);
        Ok(Some(ByteRange::new(start, end - start)))
    }

    fn answers_at_once(&self) -> bool {
        self.direct.is_none()
    }

    fn read_now(&self, offset: u64, buffer: &mut [u8]) -> Option<Result<()>> {
        if self.direct.is_some() || self.check_range(offset, buffer.len() as u64).is_err() {
            return None;
        }
        match self.cache_reads.read(&self.file, offset, buffer) {
            AtOnce::Read => Some(Ok(())),
            AtOnce::WouldWait => None,
            AtOnce::Untold => Some(self.read_at(offset, buffer)),
        }
    }

    fn zeroes_fast(&self) -> bool {
        !self.read_only && self.zeroing.is_fast(&self.file, self.size)
    }

    fn direct(&self, access: Access, offset: u64, memory: &[u8]) -> Option<BorrowedFd<'_>> {
        let alignment = self.direct?;
        let length = memory.len();
        let allowed = access == Access::Read || self.check_writable("write").is_ok();
        let suits = alignment.fits(offset, memory)
            && self.check_range(offset, length as u64).is_ok()
            && self.split_at_tail(alignment, offset, length) == length;
        (allowed && suits).then(|| self.file.as_fd())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::RamDevice;
    use std::process::Command;

    fn home() -> tempfile::TempDir {
        tempfile::tempdir().expect("a temporary directory")
    }

    fn made(direct: bool, size: u64) -> (tempfile::TempDir, FileDevice) {
        let home = home();
        let options = OpenOptions { direct, create_size: Some(size), lock: true, read_only: false };
        let device = FileDevice::open(home.path().join("disk"), options).expect("made");
        (home, device)
    }

    fn kind_of(path: &Path, options: OpenOptions) -> (ErrorKind, Option<i32>) {
        let error = FileDevice::open(path, options).expect_err("refused");
        assert_eq!(error.path(), Some(path), "{error}");
        (error.kind(), error.errno())
    }

    /// Every offset and length in the first 16 KiB, in an order that mixes them, against RAM.
    fn compare_with_ram(device: &FileDevice) {
        let ram = RamDevice::new(device.size());
        let sectors = device.size() / 512;
        for step in 0..sectors * 16 {
            let offset = step * 7 % sectors;
            let length = 1 + step * 5 % (sectors - offset);
            // One byte of shift makes the memory unaligned in every second request.
            let shift = (step % 2) as usize;
            let bytes = vec![(step % 251) as u8; (length * 512) as usize + shift];
            if step % 5 == 4 {
                device.zero_at(offset * 512, length * 512).expect("zeroed");
                ram.zero_at(offset * 512, length * 512).expect("zeroed");
            } else {
                device.write_at(offset * 512, &bytes[shift..]).expect("written");
                ram.write_at(offset * 512, &bytes[shift..]).expect("written");
            }
            let (mut found, mut expected) = (bytes.clone(), bytes);
            let at = step * 3 % (sectors - length + 1) * 512;
            device.read_at(at, &mut found[shift..]).expect("read");
            ram.read_at(at, &mut expected[shift..]).expect("read");
            assert!(found == expected, "step {step}: {length} sectors at byte {at}");
        }
        device.flush().expect("flushed");
    }

    #[test]
    fn buffered_requests_of_any_sectors_do_what_ram_does() {
        compare_with_ram(&made(false, 16384).1);
    }

    #[test]
    fn direct_requests_of_any_sectors_do_what_ram_does() {
        let (_home, mut device) = made(true, 16384);
        compare_with_ram(&device);
        // The same as on a disk of 4096-byte sectors, with a tail of three sectors.
        let path = device.path.clone();
        drop(device);
        fs::remove_file(&path).expect("removed");
        device = FileDevice::open(
            &path,
            OpenOptions { direct: true, create_size: Some(16384 + 1536), ..Default::default() },
        )
        .expect("made");
        device.direct = Some(Alignment { memory: 4096, offset: 4096 });
        device.twin = Some(open_file(&path, OpenOptions::default(), false, false).expect("twin"));
        compare_with_ram(&device);
    }

    #[test]
    fn a_missing_file_is_made_sparse_with_the_size_asked_for() {
        let (home, device) = made(false, 1 << 30);
        assert_eq!(device.size(), 1 << 30);
        let found = fs::metadata(home.path().join("disk")).expect("there");
        assert!(found.blocks() < 100, "{} blocks", found.blocks());
        assert_eq!(device.next_data(0).expect("told"), None);
        device.write_at(8 << 20, &[1; 4096]).expect("written");
        let data = device.next_data(0).expect("told").expect("data");
        assert!(data.offset <= 8 << 20 && data.end() >= (8 << 20) + 4096, "{data:?}");
        device.zero_at(0, 16 << 20).expect("punched");
        assert_eq!(device.next_data(0).expect("told"), None);
    }

    #[test]
    fn what_cannot_be_a_device_is_refused_with_words() {
        let home = home();
        let (plain, path) = (OpenOptions::default(), home.path());
        assert_eq!(kind_of(&path.join("none"), plain), (ErrorKind::Device, Some(2)));
        assert_eq!(kind_of(path, plain), (ErrorKind::Usage, Some(21)));
        assert_eq!(kind_of(Path::new("/dev/null"), plain), (ErrorKind::Usage, Some(15)));
        std::os::unix::fs::symlink(path.join("loop"), path.join("loop")).expect("linked");
        assert_eq!(kind_of(&path.join("loop"), plain), (ErrorKind::Device, Some(40)));
        fs::write(path.join("odd"), [0; 700]).expect("written");
        assert_eq!(kind_of(&path.join("odd"), plain), (ErrorKind::Usage, None));
        fs::write(path.join("small"), [7; 512]).expect("written");
        let larger = OpenOptions { create_size: Some(1024), ..plain };
        assert_eq!(kind_of(&path.join("small"), larger), (ErrorKind::Usage, None));
        assert_eq!(fs::read(path.join("small")).expect("read"), [7; 512], "left as it was");
        let impossible = OpenOptions { create_size: Some(u64::MAX), ..plain };
        assert_eq!(kind_of(&path.join("huge"), impossible), (ErrorKind::Usage, None));
        assert!(!path.join("huge").exists());
    }

    #[test]
    fn a_locked_file_is_busy_for_a_second_opener_and_free_after_the_first() {
        let (home, device) = made(false, 4096);
        let path = home.path().join("disk");
        let locked = OpenOptions { lock: true, ..OpenOptions::default() };
        assert_eq!(kind_of(&path, locked), (ErrorKind::Busy, Some(16)));
        let other = Command::new("flock").arg("-n").arg(&path).arg("true").status();
        assert_eq!(other.expect("ran").code(), Some(1));
        drop(device);
        FileDevice::open(&path, locked).expect("free");
    }

    #[test]
    fn a_read_only_device_refuses_to_change() {
        let (home, device) = made(false, 4096);
        device.write_at(0, &[3; 4096]).expect("written");
        drop(device);
        let options = OpenOptions { read_only: true, ..OpenOptions::default() };
        let device = FileDevice::open(home.path().join("disk"), options).expect("opened");
        assert_eq!(device.write_at(0, &[1; 512]).expect_err("refused").errno(), Some(30));
        assert_eq!(device.zero_at(0, 512).expect_err("refused").errno(), Some(30));
        let mut bytes = [0; 512];
        device.read_at(0, &mut bytes).expect("read");
        assert_eq!(bytes, [3; 512]);
    }

    #[test]
    fn trap_5_after_a_failed_flush_every_write_and_flush_is_refused() {
        let (_home, mut device) = made(false, 4096);
        // A pipe has no fdatasync: the flush fails with EINVAL.
        let (_reader, writer) = std::io::pipe().expect("a pipe");
        let file =
            std::mem::replace(&mut device.file, File::from(std::os::fd::OwnedFd::from(writer)));
        assert_eq!(device.flush().expect_err("fails").kind(), ErrorKind::Device);
        device.file = file;
        for refused in [device.flush(), device.write_at(0, &[1; 512]), device.zero_at(0, 512)] {
            assert_eq!(refused.expect_err("poisoned").kind(), ErrorKind::Poisoned);
        }
        device.read_at(0, &mut [0; 512]).expect("reads go on");
    }

    #[test]
    fn a_range_outside_or_between_sectors_is_refused() {
        let (_home, device) = made(false, 4096);
        for (offset, length) in [(4096, 512), (3584, 1024), (100, 512), (0, 100)] {
            let refused = device.read_at(offset, &mut vec![0; length]).expect_err("refused");
            assert_eq!(refused.kind(), ErrorKind::Usage);
        }
        assert!(device.zero_at(u64::MAX - 511, 512).is_err());
    }

    #[test]
    fn a_read_that_needs_no_disk_is_done_now_and_another_is_not() {
        let (home, device) = made(false, 1 << 20);
        device.write_at(4096, &[7; 8192]).expect("written");
        let mut bytes = [0; 8192];
        // Just written: in the page cache, on whatever file system this is.
        device.read_now(4096, &mut bytes).expect("at once").expect("read");
        assert_eq!(bytes, [7; 8192]);
        assert!(device.read_now(1 << 20, &mut bytes).is_none(), "outside");
        let options = OpenOptions { direct: true, ..OpenOptions::default() };
        let direct = FileDevice::open(home.path().join("disk"), options).expect("opened");
        assert!(direct.read_now(4096, &mut bytes).is_none(), "past the page cache");
    }

    #[test]
    fn a_file_that_became_shorter_is_an_error_not_zeros() {
        let (home, device) = made(false, 8192);
        let file = File::options().write(true).open(home.path().join("disk")).expect("opened");
        file.set_len(4096).expect("cut");
        let failed = device.read_at(0, &mut [0; 8192]).expect_err("short");
        assert_eq!((failed.kind(), failed.offset()), (ErrorKind::Device, Some(4096)));
    }
}
