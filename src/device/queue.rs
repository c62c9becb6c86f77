//! Many reads and writes under way at a time, all on one stretch of memory that the queue owns.
//!
//! | face | file | for |
//! |---|---|---|
//! | `RingQueue` | `uring.rs` | what is open with `O_DIRECT`, where the kernel allows io_uring |
//! | `BlockingQueue` | here | anything: a request is done while it is submitted |
//!
//! Guarantees: every submitted request is reported once; memory with a request under way is lent to
//! nobody; a queue that is dropped waits for what is under way.
//! Does not know: what the bytes mean, which request follows which.

use std::fmt::Debug;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use super::uring::{RingQueue, ring_error};
use super::{AlignedBuffer, Device, FolderFile};
use crate::error::{Error, Result};

/// What a request is to.
#[derive(Clone, Debug)]
pub enum Place {
    Device(Arc<dyn Device>),
    File(Arc<dyn FolderFile>),
}

impl Place {
    pub fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        match self {
            Self::Device(device) => device.read_at(offset, buffer),
            Self::File(file) => file.read_at(offset, buffer),
        }
    }

    pub fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        match self {
            Self::Device(device) => device.write_at(offset, bytes),
            Self::File(file) => file.write_at(offset, bytes),
        }
    }

    /// See `Device::direct`.
    pub(super) fn direct(
        &self,
        access: Access,
        offset: u64,
        memory: &[u8],
    ) -> Option<BorrowedFd<'_>> {
        match self {
            Self::Device(device) => device.direct(access, offset, memory),
            Self::File(file) if access == Access::Read => file.direct(offset, memory),
            Self::File(_) => None,
        }
    }
}

/// Which way the bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    Read,
    Write,
}

/// One read or write.
#[derive(Clone, Debug)]
pub struct Request {
    pub place: Place,
    pub access: Access,
    pub offset: u64,
    /// Of the queue's memory.
    pub memory: Range<usize>,
    /// Given back when it is done.
    pub tag: u64,
}

/// A request that ended.
#[derive(Debug)]
pub struct Done {
    pub tag: u64,
    pub result: Result<()>,
}

/// See the module.
pub trait Queue {
    fn submit(&mut self, request: Request);

    /// Waits until something is done, and adds it; at once if nothing is under way.
    fn wait(&mut self, done: &mut Vec<Done>) -> Result<()>;

    /// Waits until nothing is under way, and forgets what became of it. `false`: that cannot be
    /// found out.
    fn drain(&mut self) -> bool;

    /// Requests that were submitted and not reported.
    fn under_way(&self) -> usize;

    /// A stretch of the memory. No request may be under way in it.
    fn memory(&mut self, range: Range<usize>) -> &mut [u8];
}

/// How requests are carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engine {
    /// By the kernel, through io_uring.
    Ring,
    /// By threads that wait for each.
    Threads,
}

impl Engine {
    /// The best one: io_uring where the kernel allows it and something is waited for. What answers
    /// at once, from memory or a page cache, is served faster by threads that copy.
    #[must_use]
    pub fn suited_to(answers_at_once: bool) -> Self {
        if answers_at_once || ring_error().is_some() { Self::Threads } else { Self::Ring }
    }

    /// An error if this machine does not allow it.
    pub fn check(self) -> Result<()> {
        match (self, ring_error()) {
            (Self::Ring, Some(error)) => Err(error),
            _ => Ok(()),
        }
    }

    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Ring => "io_uring",
            Self::Threads => "threads",
        }
    }

    /// `auto` is `None`.
    pub fn parse(text: &str) -> Result<Option<Self>> {
        match text {
            "auto" => Ok(None),
            "io_uring" => Ok(Some(Self::Ring)),
            "threads" => Ok(Some(Self::Threads)),
            _ => Err(Error::usage(format!(
                "expected auto, io_uring or threads as the engine, found {text:?}"
            ))),
        }
    }

    /// A queue with so many bytes of memory, for the thread that calls this.
    pub fn queue(self, bytes: usize) -> Result<Box<dyn Queue>> {
        Ok(match self {
            Self::Ring => Box::new(RingQueue::new(bytes)?),
            Self::Threads => Box::new(BlockingQueue::new(bytes)),
        })
    }
}

/// Does each request at once, on the thread that submits it.
#[derive(Debug)]
pub struct BlockingQueue {
    memory: AlignedBuffer,
    done: Vec<Done>,
}

impl BlockingQueue {
    #[must_use]
    pub fn new(bytes: usize) -> Self {
        Self { memory: AlignedBuffer::zeroed(bytes), done: Vec::new() }
    }
}

impl Queue for BlockingQueue {
    fn submit(&mut self, request: Request) {
        let Request { place, access, offset, memory, tag } = request;
        let memory = &mut self.memory[memory];
        let result = match access {
            Access::Read => place.read_at(offset, memory),
            Access::Write => place.write_at(offset, memory),
        };
        self.done.push(Done { tag, result });
    }

    fn wait(&mut self, done: &mut Vec<Done>) -> Result<()> {
        done.append(&mut self.done);
        Ok(())
    }

    fn drain(&mut self) -> bool {
        self.done.clear();
        true
    }

    fn under_way(&self) -> usize {
        self.done.len()
    }

    fn memory(&mut self, range: Range<usize>) -> &mut [u8] {
        &mut self.memory[range]
    }
}
