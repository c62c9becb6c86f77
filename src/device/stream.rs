//! Bytes in one direction: from and to pipes, sockets, files and disks, by descriptor.
//!
//! Guarantees: a read or write that waits for the other side ends within `WAIT_MS` once it is
//! asked to stop; the flags of the descriptor that was given stay as they are for other processes.
//! Does not know: what the bytes mean.

#![expect(clippy::disallowed_methods, reason = "one of the doors to files")]

use std::fmt::Debug;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use super::mounted::{refuse_if_mounted, refuse_if_read_only};
use super::opening::OpenOptions;
use crate::error::{Error, ErrorKind, Result};

/// How often a wait looks whether it is to stop.
const WAIT_MS: i64 = 100;
/// What a pipe that is ready takes without waiting, whatever its flags.
const PIPE_WRITE_BYTES: usize = 4096;

/// Ends waits of a stream from another thread. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct Stop {
    own: Arc<AtomicBool>,
    /// Ends this one too.
    above: Option<Arc<AtomicBool>>,
}

impl Stop {
    /// One that ends with this one, or alone.
    #[must_use]
    pub fn below(&self) -> Self {
        Self { own: Arc::default(), above: Some(Arc::clone(&self.own)) }
    }

    pub fn now(&self) {
        self.own.store(true, Ordering::Relaxed);
    }

    pub fn check(&self) -> Result<()> {
        let above = self.above.as_ref();
        if self.own.load(Ordering::Relaxed) || above.is_some_and(|one| one.load(Ordering::Relaxed))
        {
            return Err(Error::new(ErrorKind::Interrupted, "stopped on request; may be resumed"));
        }
        Ok(())
    }
}

/// Bytes that come one after the other.
pub trait ByteStream: Send + Debug {
    /// Some bytes, at least one unless the buffer is empty; 0 at the end.
    fn read(&mut self, buffer: &mut [u8]) -> Result<usize>;

    /// Leaves bytes out; how many there were, less than asked for at the end.
    fn skip(&mut self, bytes: u64) -> Result<u64> {
        let mut place = [0; 64 << 10];
        let mut left = bytes;
        while left > 0 {
            let length = usize::try_from(left).map_or(place.len(), |left| left.min(place.len()));
            match self.read(&mut place[..length])? {
                0 => break,
                read => left -= read as u64,
            }
        }
        Ok(bytes - left)
    }

    /// Fills the buffer as far as the stream goes; how much that was.
    fn fill(&mut self, buffer: &mut [u8]) -> Result<usize> {
        let mut filled = 0;
        while filled < buffer.len() {
            match self.read(&mut buffer[filled..])? {
                0 => break,
                read => filled += read,
            }
        }
        Ok(filled)
    }
}

/// Takes bytes one after the other.
pub trait ByteSink: Send + Debug {
    fn write(&mut self, bytes: &[u8]) -> Result<()>;
    /// Makes what was written durable, where there is something to make durable.
    fn flush(&mut self) -> Result<()>;
}

fn wait(file: &File, wish: PollFlags, stop: &Stop) -> Result<()> {
    loop {
        stop.check()?;
        let mut asked = [PollFd::new(file, wish)];
        let time = Timespec { tv_sec: 0, tv_nsec: WAIT_MS * 1_000_000 };
        match poll(&mut asked, Some(&time)) {
            Ok(0) | Err(Errno::INTR) => {}
            Ok(_) => return Ok(()),
            Err(error) => return Err(Error::device("wait", &error.into())),
        }
    }
}

/// A descriptor that is read from.
#[derive(Debug)]
pub struct DescriptorStream {
    file: File,
    stop: Stop,
    /// Whether bytes can be left out without reading them.
    seekable: bool,
}

impl DescriptorStream {
    pub fn new(descriptor: OwnedFd, stop: Stop) -> Result<Self> {
        let file = File::from(descriptor);
        let found = file.metadata().map_err(|error| Error::device("open", &error))?;
        let kind = found.file_type();
        if kind.is_dir() {
            return Err(Error::usage("expected a stream of bytes, found a directory"));
        }
        Ok(Self { file, stop, seekable: kind.is_file() || kind.is_block_device() })
    }
}

impl ByteStream for DescriptorStream {
    fn read(&mut self, buffer: &mut [u8]) -> Result<usize> {
        loop {
            if !self.seekable {
                wait(&self.file, PollFlags::IN, &self.stop)?;
            }
            match self.file.read(buffer) {
                Ok(read) => return Ok(read),
                Err(error)
                    if matches!(
                        error.kind(),
                        std::io::ErrorKind::Interrupted | std::io::ErrorKind::WouldBlock
                    ) => {}
                Err(error) => return Err(Error::device("read", &error)),
            }
        }
    }

    fn skip(&mut self, bytes: u64) -> Result<u64> {
        if !self.seekable {
            let mut place = vec![0; 1 << 20];
            let mut left = bytes;
            while left > 0 {
                let most = usize::try_from(left).map_or(place.len(), |left| left.min(place.len()));
                match self.read(&mut place[..most])? {
                    0 => break,
                    read => left -= read as u64,
                }
            }
            return Ok(bytes - left);
        }
        let failed = |error: std::io::Error| Error::device("seek", &error);
        let here = self.file.stream_position().map_err(failed)?;
        let end = self.file.seek(SeekFrom::End(0)).map_err(failed)?;
        let to = here.saturating_add(bytes).min(end.max(here));
        self.file.seek(SeekFrom::Start(to)).map_err(failed)?;
        Ok(to - here)
    }
}

/// A descriptor that is written to.
#[derive(Debug)]
pub struct DescriptorSink {
    file: File,
    stop: Stop,
    face: Face,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Face {
    /// Its writes do not wait for a reader.
    Durable,
    /// A pipe or socket; at most so many bytes at a time are sure not to wait.
    Pipe(usize),
    /// A terminal, `/dev/null` and the like.
    Other,
}

impl DescriptorSink {
    /// A terminal is refused.
    pub fn new(descriptor: OwnedFd, stop: Stop) -> Result<Self> {
        let file = File::from(descriptor);
        let found = file.metadata().map_err(|error| Error::device("open", &error))?;
        let kind = found.file_type();
        if rustix::termios::isatty(&file) {
            return Err(Error::usage(
                "expected a pipe or a file to write to, found a terminal: redirect it",
            ));
        }
        if kind.is_file() || kind.is_block_device() {
            return Ok(Self { file, stop, face: Face::Durable });
        }
        if !kind.is_fifo() && !kind.is_socket() {
            return Ok(Self { file, stop, face: Face::Other });
        }
        // Opened anew the pipe has flags of its own, so that a write of any length need not wait.
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        let flags = OFlags::WRONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let own = rustix::fs::open(path.as_str(), flags, Mode::empty());
        Ok(match own {
            Ok(own) if kind.is_fifo() => {
                Self { file: File::from(own), stop, face: Face::Pipe(usize::MAX) }
            }
            _ => Self { file, stop, face: Face::Pipe(PIPE_WRITE_BYTES) },
        })
    }
}

impl ByteSink for DescriptorSink {
    fn write(&mut self, mut bytes: &[u8]) -> Result<()> {
        while !bytes.is_empty() {
            self.stop.check()?;
            let mut most = bytes.len().min(4 << 20);
            if let Face::Pipe(limit) = self.face {
                wait(&self.file, PollFlags::OUT, &self.stop)?;
                most = most.min(limit);
            }
            match self.file.write(&bytes[..most]) {
                Ok(written) => bytes = &bytes[written..],
                Err(error)
                    if matches!(
                        error.kind(),
                        std::io::ErrorKind::Interrupted | std::io::ErrorKind::WouldBlock
                    ) => {}
                Err(error) if error.raw_os_error() == Some(Errno::PIPE.raw_os_error()) => {
                    return Err(Error::new(
                        ErrorKind::Device,
                        "the program that reads our output has ended before all was written: see \
                         why it did, then run both again",
                    )
                    .with_errno(Errno::PIPE.raw_os_error()));
                }
                Err(error) => return Err(Error::device("write", &error)),
            }
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<()> {
        if self.face == Face::Durable {
            self.file.sync_all().map_err(|error| Error::device("flush", &error))?;
        }
        Ok(())
    }
}

/// Opens a pipe, file or device to read it from front to back.
pub fn open_stream(path: &Path, stop: Stop) -> Result<DescriptorStream> {
    let is_fifo = path.metadata().is_ok_and(|found| found.file_type().is_fifo());
    // A named pipe is opened without waiting for its writer, for whom the first read waits: that
    // can be ended.
    let flags = if is_fifo { OFlags::NONBLOCK } else { OFlags::empty() };
    let flags = flags | OFlags::RDONLY | OFlags::CLOEXEC;
    let opened = rustix::fs::open(path, flags, Mode::empty());
    let file = opened.map_err(|error| Error::device("open", &error.into()).at_path(path))?;
    DescriptorStream::new(file, stop).map_err(|error| error.within(path))
}

/// Opens what takes a stream of bytes: a new file, or a device, pipe or socket that exists. A disk
/// that is mounted or in use is refused.
pub fn create_sink(path: &Path, stop: Stop) -> Result<DescriptorSink> {
    let found = path.metadata().map(|found| (found.file_type(), found.rdev())).ok();
    let file = match found {
        None => super::opening::open_file(path, OpenOptions::default(), false, true),
        Some((kind, number)) if kind.is_block_device() => {
            refuse_if_mounted(path, number)?;
            refuse_if_read_only(path, number)?;
            super::opening::open_file(path, OpenOptions::default(), true, false)
        }
        Some((kind, _)) if kind.is_file() => Err(Error::usage(
            "expected a new file, found one that exists: name another, or remove it",
        )),
        Some(_) => {
            let opened = File::options().write(true).open(path);
            opened.map_err(|error| Error::device("open", &error))
        }
    };
    let file = file.map_err(|error| error.within(path))?;
    DescriptorSink::new(file.into(), stop).map_err(|error| error.within(path))
}

/// Takes back a file that was not finished; what cannot be removed stays.
pub fn discard(path: &Path) {
    let _removed = std::fs::remove_file(path);
}

/// A file in memory, for tests.
impl ByteStream for std::io::Cursor<Vec<u8>> {
    fn read(&mut self, buffer: &mut [u8]) -> Result<usize> {
        Read::read(self, buffer).map_err(|error| Error::device("read", &error))
    }
}

impl ByteSink for Vec<u8> {
    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.extend_from_slice(bytes);
        Ok(())
    }

    fn flush(&mut self) -> Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use rustix::fs::{CWD, FileType, mknodat};

    use super::*;

    fn pipe() -> (tempfile::TempDir, std::path::PathBuf) {
        let home = tempfile::tempdir().expect("a temporary directory");
        let path = home.path().join("pipe");
        mknodat(CWD, &path, FileType::Fifo, Mode::RWXU, 0).expect("made");
        (home, path)
    }

    #[test]
    fn a_named_pipe_that_nobody_writes_to_is_opened_and_its_wait_can_be_ended() {
        let (_home, path) = pipe();
        let stop = Stop::default();
        let mut stream = open_stream(&path, stop.below()).expect("opened without a writer");
        stop.now();
        let ended = stream.read(&mut [0; 16]).expect_err("no writer came");
        assert_eq!(ended.kind(), ErrorKind::Interrupted);
    }

    #[test]
    fn a_named_pipe_gives_what_its_writer_says_and_then_its_end() {
        let (_home, path) = pipe();
        let mut stream = open_stream(&path, Stop::default()).expect("opened without a writer");
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut writer =
                    File::options().write(true).open(&path).expect("a reader is there");
                writer.write_all(b"said").expect("taken");
            });
            let mut said = [0; 16];
            assert_eq!(stream.fill(&mut said).expect("read"), 4);
            assert_eq!(&said[..4], b"said");
        });
        assert_eq!(stream.read(&mut [0; 16]).expect("read"), 0, "it has ended");
    }

    #[test]
    fn what_is_stopped_alone_does_not_stop_what_is_above_or_beside_it() {
        let above = Stop::default();
        let (one, other) = (above.below(), above.below());
        one.now();
        assert!(one.check().is_err() && other.check().is_ok() && above.check().is_ok());
        above.now();
        assert!(other.check().is_err());
    }
}
