//! An export of an NBD server as a device that is read.
//!
//! Guarantees: a stretch counts as zeros only where the server says that it reads as zeros, never
//! where it says nothing or that there is a hole (law 8); after the connection is lost every read
//! is an error of the link. Several threads have their reads in flight together.
//! Does not know: TLS, how the server was reached, volumes beyond what the export says of itself.

use std::sync::{Mutex, PoisonError};

use super::connection::Connection;
use super::reply::StatusRun;
use super::wire::Wire;
use crate::device::{AlignedBuffer, Device, Engine};
use crate::error::{Error, ErrorKind, Result};
use crate::extent::ByteRange;
use crate::format::nbd::{ExportedCut, Included};
use crate::limits::NBD_STATUS_RANGE_BYTES;

const SECTOR_BYTES: u32 = 512;

/// See the module.
#[derive(Debug)]
pub struct NbdDevice {
    connection: Connection,
    cut: Option<ExportedCut>,
    /// The latest block status: runs that follow each other.
    known: Mutex<Vec<StatusRun>>,
}

impl NbdDevice {
    /// `greeted`: greeting and flags were said before TLS began.
    pub fn open(wire: Box<dyn Wire>, export: &str, greeted: bool) -> Result<Self> {
        let connection = Connection::open(wire, export, greeted)?;
        let cut = ExportedCut::parse(&connection.agreed().description)?;
        Ok(Self { connection, cut, known: Mutex::default() })
    }

    /// Whose bytes it holds, if it says so.
    #[must_use]
    pub fn cut(&self) -> Option<&ExportedCut> {
        self.cut.as_ref()
    }

    fn maximum(&self) -> u64 {
        u64::from(self.connection.agreed().maximum)
    }

    fn minimum(&self) -> u64 {
        u64::from(self.connection.agreed().minimum)
    }

    /// The end of what may be asked for together with `at`: what a snapshot does not include is an
    /// error of the server.
    fn included_end(&self, at: u64) -> u64 {
        let Some(ExportedCut { included: Included::Ranges(ranges), .. }) = &self.cut else {
            return self.size();
        };
        let next = ranges.partition_point(|range| range.end() <= at);
        ranges.get(next).map_or(self.size(), |range| range.end()).min(self.size())
    }

    /// Status from `at`, at least one run; data where the server does not say.
    fn status(&self, context: u32, at: u64) -> Result<Vec<StatusRun>> {
        let start = at / self.minimum() * self.minimum();
        let end = (start + NBD_STATUS_RANGE_BYTES).min(self.included_end(at));
        let asked = ByteRange::new(start, end - start);
        let runs = match self.connection.status(context, asked) {
            Err(error) if error.kind() == ErrorKind::Device => {
                vec![StatusRun { range: asked, zero: false }]
            }
            told => told?,
        };
        if runs.last().is_none_or(|run| run.range.end() <= at) {
            return Err(Error::format(format!(
                "expected an NBD server that tells of runs of at least {} bytes, found shorter",
                self.minimum()
            )));
        }
        Ok(runs)
    }

    fn read_piece(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let minimum = self.minimum();
        let end = offset + buffer.len() as u64;
        let start = offset / minimum * minimum;
        let whole = end.next_multiple_of(minimum).min(self.size());
        if (start, whole) == (offset, end) {
            return self.connection.read(offset, buffer);
        }
        let length = usize::try_from(whole - start).expect("a request is small");
        let mut aligned = AlignedBuffer::zeroed(length);
        self.connection.read(start, &mut aligned)?;
        let at = usize::try_from(offset - start).expect("less than the minimum");
        buffer.copy_from_slice(&aligned[at..][..buffer.len()]);
        Ok(())
    }
}

/// The first stretch of anything but zeros at or after `at` in runs that follow each other, and
/// where what is known ends.
fn first_data(runs: &[StatusRun], at: u64) -> (Option<ByteRange>, u64) {
    let mut found: Option<ByteRange> = None;
    let mut known = at;
    for StatusRun { range, zero } in runs {
        if range.end() <= known || range.offset > known {
            continue;
        }
        match (&mut found, zero) {
            (Some(_), true) => break,
            (Some(data), false) => data.length = range.end() - data.offset,
            (None, false) => found = Some(ByteRange::new(known, range.end() - known)),
            (None, true) => {}
        }
        known = range.end();
    }
    (found, known)
}

impl Device for NbdDevice {
    fn size(&self) -> u64 {
        self.connection.agreed().size
    }

    fn sector_size(&self) -> u32 {
        SECTOR_BYTES
    }

    fn read_at(&self, mut offset: u64, mut buffer: &mut [u8]) -> Result<()> {
        let end = offset.checked_add(buffer.len() as u64);
        if end.is_none_or(|end| end > self.size()) {
            return Err(Error::usage(format!(
                "expected a range within the {} bytes of the export, found {} bytes at {offset}",
                self.size(),
                buffer.len()
            )));
        }
        while !buffer.is_empty() {
            // Ends where the longest request from an aligned place would.
            let limit = (offset / self.maximum() + 1) * self.maximum();
            let length =
                usize::try_from(limit - offset).map_or(buffer.len(), |most| most.min(buffer.len()));
            let (piece, rest) = buffer.split_at_mut(length);
            self.read_piece(offset, piece)?;
            offset += length as u64;
            buffer = rest;
        }
        Ok(())
    }

    fn write_at(&self, offset: u64, _: &[u8]) -> Result<()> {
        Err(read_only().at_offset(offset))
    }

    fn zero_at(&self, offset: u64, _: u64) -> Result<()> {
        Err(read_only().at_offset(offset))
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn next_data(&self, offset: u64) -> Result<Option<ByteRange>> {
        let size = self.size();
        let Some(context) = self.connection.agreed().allocation else {
            return Ok((offset < size).then(|| ByteRange::new(offset, size - offset)));
        };
        let mut at = offset;
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        while at < size {
            let (found, end) = first_data(&known, at);
            if found.is_some() {
                return Ok(found);
            }
            at = end;
            if at < size {
                *known = self.status(context, at)?;
            }
        }
        Ok(None)
    }

    fn engine(&self) -> Option<Engine> {
        // The kernel cannot wait for a reply.
        Some(Engine::Threads)
    }

    fn interrupt(&self) {
        self.connection.interrupt();
    }
}

fn read_only() -> Error {
    const EROFS: i32 = 30;
    Error::usage("an export is only read here").with_errno(EROFS)
}
