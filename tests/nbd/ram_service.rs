//! A volume in memory, as tests want it: at once, later from another thread, or only when told.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, RwLock};

use dualrestore::device::AlignedBuffer;
use dualrestore::error::{Error, Result};
use dualrestore::extent::ByteRange;
use dualrestore::volume::service::{
    BlockService, Command, Completion, Outcome, StatusContext, StatusExtent,
};

const CHUNK_BYTES: u64 = 1 << 20;
const STATUS_BYTES: u64 = 64 << 10;

/// When requests are answered.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Pace {
    /// Before `submit` returns; reads in place.
    AtOnce,
    /// From a thread of their own.
    Elsewhere,
    /// When the test calls `release`.
    Held,
}

pub struct RamService {
    /// By their number; those that are not there read as zeros.
    chunks: RwLock<BTreeMap<u64, Vec<u8>>>,
    size: u64,
    pub sector_size: u32,
    pub read_only: bool,
    pub contexts: Vec<StatusContext>,
    /// Zeroing of whole 4 KiB is said to be fast.
    pub zeroes_fast: bool,
    pub pace: Pace,
    /// Requests that touch this byte fail with this errno.
    pub bad_byte: Option<(u64, i32)>,
    pub flushes: AtomicU64,
    held: Mutex<Vec<(Command, Completion)>>,
}

impl RamService {
    pub fn new(size: u64, pace: Pace) -> Self {
        Self {
            chunks: RwLock::default(),
            size,
            sector_size: 512,
            read_only: false,
            contexts: vec![StatusContext::Allocation, StatusContext::Missing],
            zeroes_fast: false,
            pace,
            bad_byte: None,
            flushes: AtomicU64::new(0),
            held: Mutex::default(),
        }
    }

    /// Lets `work` change the range, chunk by chunk; it is told where in the range it is.
    fn each(&self, range: ByteRange, mut work: impl FnMut(usize, &mut [u8])) {
        let mut chunks = self.chunks.write().expect("no panics");
        let mut at = range.offset;
        while at < range.end() {
            let within = at % CHUNK_BYTES;
            let length = (CHUNK_BYTES - within).min(range.end() - at) as usize;
            let chunk =
                chunks.entry(at / CHUNK_BYTES).or_insert_with(|| vec![0; CHUNK_BYTES as usize]);
            let within = within as usize;
            work((at - range.offset) as usize, &mut chunk[within..within + length]);
            at += length as u64;
        }
    }

    fn read(&self, range: ByteRange, buffer: &mut [u8]) {
        let chunks = self.chunks.read().expect("no panics");
        let mut at = range.offset;
        while at < range.end() {
            let within = (at % CHUNK_BYTES) as usize;
            let from = (at - range.offset) as usize;
            let length = (CHUNK_BYTES as usize - within).min(buffer.len() - from);
            let part = &mut buffer[from..from + length];
            match chunks.get(&(at / CHUNK_BYTES)) {
                Some(chunk) => part.copy_from_slice(&chunk[within..within + length]),
                None => part.fill(0),
            }
            at += length as u64;
        }
    }

    pub fn contents(&self, range: ByteRange) -> Vec<u8> {
        let mut bytes = vec![0; range.length as usize];
        self.read(range, &mut bytes);
        bytes
    }

    /// Requests that wait to be released.
    pub fn held(&self) -> usize {
        self.held.lock().expect("no panics").len()
    }

    /// Answers what is held, the latest first.
    pub fn release(&self) {
        let held = std::mem::take(&mut *self.held.lock().expect("no panics"));
        for (command, completion) in held.into_iter().rev() {
            completion(self.perform(&command));
        }
    }

    /// Lets go of what is held without answering it.
    pub fn forget(&self) {
        self.held.lock().expect("no panics").clear();
    }

    fn check(&self, range: ByteRange) -> Result<()> {
        assert!(range.length > 0 && range.end() <= self.size, "the server checks ranges");
        let sector = u64::from(self.sector_size);
        assert!(
            range.offset.is_multiple_of(sector) && range.length.is_multiple_of(sector),
            "and alignment"
        );
        match self.bad_byte {
            Some((byte, errno)) if range.offset <= byte && byte < range.end() => {
                Err(Error::device("access", &std::io::Error::from_raw_os_error(errno)))
            }
            _ => Ok(()),
        }
    }

    fn perform(&self, command: &Command) -> Outcome {
        match command {
            Command::Read { range } => {
                self.check(*range)?;
                let mut buffer = AlignedBuffer::zeroed(range.length as usize);
                self.read(*range, &mut buffer);
                return Ok(Some(buffer));
            }
            Command::Write { offset, data, force_unit_access } => {
                let range = ByteRange::new(*offset, data.len() as u64);
                self.check(range)?;
                self.each(range, |at, part| part.copy_from_slice(&data[at..at + part.len()]));
                self.flushes.fetch_add(u64::from(*force_unit_access), Ordering::SeqCst);
            }
            Command::WriteZeroes { range, force_unit_access, .. }
            | Command::Trim { range, force_unit_access } => {
                self.check(*range)?;
                self.each(*range, |_, part| part.fill(0));
                self.flushes.fetch_add(u64::from(*force_unit_access), Ordering::SeqCst);
            }
            Command::Cache { range } => self.check(*range)?,
            Command::Flush => {
                self.flushes.fetch_add(1, Ordering::SeqCst);
            }
        }
        Ok(None)
    }
}

impl BlockService for RamService {
    fn size(&self) -> u64 {
        self.size
    }

    fn sector_size(&self) -> u32 {
        self.sector_size
    }

    fn preferred_size(&self) -> u32 {
        4096
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn contexts(&self) -> Vec<StatusContext> {
        self.contexts.clone()
    }

    fn zeroes_fast(&self, range: ByteRange) -> bool {
        self.zeroes_fast && (range.offset | range.length).is_multiple_of(4096)
    }

    fn read_now(&self, range: ByteRange, buffer: &mut [u8]) -> Option<Result<()>> {
        (self.pace == Pace::AtOnce).then(|| {
            self.check(range)?;
            self.read(range, buffer);
            Ok(())
        })
    }

    fn submit(&self, command: Command, completion: Completion) {
        match self.pace {
            Pace::AtOnce => completion(self.perform(&command)),
            Pace::Held => self.held.lock().expect("no panics").push((command, completion)),
            #[expect(clippy::disallowed_methods, reason = "a thread for each is what it tests")]
            Pace::Elsewhere => {
                let outcome = self.perform(&command);
                std::thread::spawn(move || completion(outcome));
            }
        }
    }

    /// `Allocation`: true to the contents; `Missing`: every other 64 KiB, the first not; others:
    /// nothing anywhere.
    fn status(
        &self,
        context: StatusContext,
        range: ByteRange,
        limit: usize,
    ) -> Result<Vec<StatusExtent>> {
        let mut extents = Vec::new();
        let mut at = range.offset;
        if !matches!(context, StatusContext::Allocation | StatusContext::Missing) {
            let length = range.length;
            return Ok(vec![StatusExtent { length, hole: false, zero: false, marked: false }]);
        }
        while at < range.end() && extents.len() < limit {
            let end = ((at / STATUS_BYTES + 1) * STATUS_BYTES).min(range.end());
            let run = ByteRange::new(at, end - at);
            let absent = !self.chunks.read().expect("no panics").contains_key(&(at / CHUNK_BYTES));
            let zero = absent || self.contents(run).iter().all(|byte| *byte == 0);
            extents.push(match context {
                StatusContext::Allocation => {
                    StatusExtent { length: run.length, hole: zero, zero, marked: false }
                }
                _ => {
                    let marked = (at / STATUS_BYTES) % 2 == 1;
                    StatusExtent { length: run.length, hole: false, zero: false, marked }
                }
            });
            at = end;
        }
        Ok(extents)
    }
}
