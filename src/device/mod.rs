//! The only room with storage system calls: one small trait and its faces.
//!
//! | face | file | for |
//! |---|---|---|
//! | `FileDevice` | `file.rs` | files and block devices, buffered or `O_DIRECT` |
//! | `RamDevice` | `ram.rs` | tests, benchmarks, the demo's shadow |
//! | `FaultyDevice` | `faulty.rs` | any device, with errors injected by a plan |
//! | `CrashingDevice` | `crashing.rs` | keeps only what was flushed, plus any subset of the rest |
//!
//! Above them: `Queue`, many requests under way at a time (`queue.rs`, `uring.rs`), and
//! `ThreadRing`, those of a thread that serves guests (`thread_ring.rs`).
//! Beside them: byte streams and tar archives as folders (`stream.rs`, `tar/`), `Directory`,
//! where state is kept (`directory.rs`, `crashing_directory.rs`), `Folder`, what a medium looks
//! like (`folder.rs`, `faulty_folder.rs`), and `WorkerPool`, the threads that do device
//! operations, which `share` spreads over them.

mod at_once;
#[cfg(test)]
mod block_device_tests;
mod buffer;
mod confinement;
mod crashing;
mod crashing_directory;
mod crashing_folder;
mod destination;
mod digest;
mod direct;
mod directory;
mod disk;
mod faulty;
mod faulty_folder;
mod file;
mod flushing;
mod folder;
mod mounted;
mod opening;
mod pool;
mod queue;
mod ram;
mod secrecy;
mod sharing;
mod stream;
mod tar;
mod thread_ring;
mod uring;
mod zeroing;

use std::fmt::Debug;
use std::os::fd::BorrowedFd;

pub use buffer::{AlignedBuffer, Payload, is_zero};
pub use confinement::{confine_writing, renounce_system_calls};
pub use crashing::{Capacity, Chooser, CrashingDevice, Power};
pub use crashing_directory::{CrashingDirectory, Wrapper};
pub use crashing_folder::CrashingFolder;
pub use destination::{Destination, empty_file, refuse_source};
pub use digest::digest;
pub use directory::{Directory, FileDirectory, Space};
pub use disk::{Disk, check_raw_sink, disk_behind, sink_is_removable};
pub use faulty::{Fault, FaultPlan, FaultyDevice, Operation, Strikes};
pub use faulty_folder::FaultyFolder;
pub use file::FileDevice;
pub use folder::{FileFolder, Folder, FolderFile, RamFolder};
pub use opening::OpenOptions;
pub use pool::WorkerPool;
pub use queue::{Access, BlockingQueue, Done, Engine, Place, Queue, Request};
pub use ram::RamDevice;
pub use secrecy::hide_memory;
pub use sharing::share;
pub use stream::{
    ByteSink, ByteStream, DescriptorSink, DescriptorStream, Stop, create_sink, discard, open_stream,
};
pub use tar::{Step, TarFolder, TarIndex, TarMember, TarWalker};
pub use thread_ring::{ThreadRing, read_here, write_here};
pub use uring::RingQueue;

use crate::error::Result;
use crate::extent::ByteRange;

/// A linear array of bytes that survives, seen through six operations.
///
/// * Offsets and lengths are multiples of `sector_size()`; buffers are of any alignment.
/// * An operation that returns `Ok` did all of it; an error leaves the bytes of that range
///   undefined.
/// * Operations on overlapping ranges at the same time are the caller's affair.
/// * What was written is durable once a `flush` that began after the write has returned `Ok`;
///   until then any subset of its sectors may survive a crash, in any order.
/// * After a failed `flush` nothing is known of the writes before it: callers stop (law 11).
pub trait Device: Send + Sync + Debug {
    /// Bytes; fixed for the life of the object.
    fn size(&self) -> u64;

    /// The smallest unit that can be addressed, 512 or 4096 bytes.
    fn sector_size(&self) -> u32;

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()>;

    fn write_at(&self, offset: u64, data: &[u8]) -> Result<()>;

    /// Afterwards the range reads as zeros; space may be given back (never "undefined", I14).
    fn zero_at(&self, offset: u64, length: u64) -> Result<()>;

    fn flush(&self) -> Result<()>;

    /// The first stretch at or after `offset` that may hold anything but zeros; `None` if there is
    /// none. A device that cannot tell answers the whole rest.
    fn next_data(&self, offset: u64) -> Result<Option<ByteRange>> {
        let rest = self.size().saturating_sub(offset);
        Ok((rest > 0).then_some(ByteRange::new(offset, rest)))
    }

    /// Reads if that needs no wait for a disk; `None` if it may need one.
    fn read_now(&self, offset: u64, buffer: &mut [u8]) -> Option<Result<()>> {
        self.answers_at_once().then(|| self.read_at(offset, buffer))
    }

    /// Whether zeros are known to be made without being written.
    fn zeroes_fast(&self) -> bool {
        false
    }

    /// A descriptor on which the kernel may be given exactly this request beside us, if there is
    /// one: open past the page cache, allowed, inside and aligned as it must be.
    fn direct(&self, access: Access, offset: u64, memory: &[u8]) -> Option<BorrowedFd<'_>> {
        let (_by_nobody, _else, _here) = (access, offset, memory);
        None
    }

    /// Whether reads and writes usually return without waiting for a disk (memory, page cache), so
    /// that doing them on the calling thread is cheaper than handing them to another.
    fn answers_at_once(&self) -> bool {
        false
    }

    /// What must carry out its requests, if not everything can.
    fn engine(&self) -> Option<Engine> {
        None
    }

    /// Ends every wait of a read, for good; called from another thread.
    fn interrupt(&self) {}
}
