//! Requests carried out by the kernel while we do something else: io_uring. One of the three files
//! that may use `unsafe`.
//!
//! | a request | is carried out |
//! |---|---|
//! | aligned, to a descriptor that is open with `O_DIRECT` | by the kernel |
//! | any other, and the rest of one that the kernel did in part | by the submitter, at once |
//!
//! Guarantees: memory that the kernel may touch is freed only after the kernel is done with it, and
//! is never lent meanwhile; descriptors stay open that long, since each request holds its place.
//! Does not know: what the bytes mean.
//!
//! | ring | memory | for |
//! |---|---|---|
//! | `RingQueue` | one stretch, its own | moving much at a time (`queue.rs`) |
//! | `OwningRing` | each request brings its own | guests' requests (`thread_ring.rs`) |
//!
//! The memory of a queue is registered with the ring where limits on locked memory allow it, which
//! saves looking its pages up for every request.

#![expect(unsafe_code, reason = "the kernel reads and writes memory that only we know the life of")]

use std::fmt;
use std::io;
use std::mem::ManuallyDrop;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::{Arc, OnceLock};

use io_uring::{IoUring, opcode, types};
use rustix::io::Errno;

use super::queue::{Access, Done, Queue, Request};
use super::{AlignedBuffer, Device, Payload};
use crate::error::{Error, Result};
use crate::limits::{RING_ENTRIES, RING_UNDER_WAY_MAX};

/// Memory is guarded in stretches of this size.
const GUARD_BYTES: usize = 4096;

/// See the module.
pub struct RingQueue {
    ring: IoUring,
    /// Leaked, rather than freed under the kernel's hands, should waiting for it fail.
    memory: ManuallyDrop<AlignedBuffer>,
    registered: bool,
    /// Requests in the kernel, by `user_data`.
    slots: Vec<Option<Request>>,
    free: Vec<usize>,
    /// Ended without the kernel.
    done: Vec<Done>,
    unsubmitted: usize,
    /// Requests under way in each stretch of the memory.
    guards: Vec<u16>,
}

impl fmt::Debug for RingQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RingQueue").field("under_way", &self.under_way()).finish_non_exhaustive()
    }
}

fn is_passing(error: &io::Error) -> bool {
    [Errno::BUSY, Errno::AGAIN].iter().any(|no| error.raw_os_error() == Some(no.raw_os_error()))
}

fn refused(source: &io::Error) -> Error {
    Error::device("set up io_uring", source)
}

/// Why there is no io_uring here, found out once: containers often forbid it.
pub(super) fn ring_error() -> Option<Error> {
    static PROBED: OnceLock<Option<Error>> = OnceLock::new();
    PROBED.get_or_init(|| build(8).err().map(|source| refused(&source))).clone()
}

fn build(entries: u32) -> io::Result<IoUring> {
    // What the kernel has to do for us it does when we wait, not by interrupting (Linux 6.1).
    let quiet = IoUring::builder()
        .setup_single_issuer()
        .setup_defer_taskrun()
        .setup_cqsize(entries * 4)
        .build(entries);
    quiet.or_else(|_| IoUring::builder().setup_cqsize(entries * 4).build(entries))
}

impl RingQueue {
    /// For the thread that calls this, which alone may use it.
    pub fn new(bytes: usize) -> Result<Self> {
        let ring = build(RING_ENTRIES).map_err(|source| refused(&source))?;
        let mut memory = AlignedBuffer::zeroed(bytes);
        let stretch = libc_iovec(&mut memory);
        // SAFETY: the memory lives until the queue is dropped, which ends the ring first or, if it
        // cannot, leaks the memory.
        let registered = unsafe { ring.submitter().register_buffers(&[stretch]) }.is_ok();
        Ok(Self {
            ring,
            guards: vec![0; memory.len().div_ceil(GUARD_BYTES)],
            memory: ManuallyDrop::new(memory),
            registered,
            slots: (0..RING_UNDER_WAY_MAX).map(|_| None).collect(),
            free: (0..RING_UNDER_WAY_MAX).collect(),
            done: Vec::new(),
            unsubmitted: 0,
        })
    }

    fn guard(&mut self, memory: &Range<usize>, taken: bool) {
        let stretches = memory.start / GUARD_BYTES..memory.end.div_ceil(GUARD_BYTES);
        for guard in &mut self.guards[stretches] {
            *guard = if taken { *guard + 1 } else { *guard - 1 };
        }
    }

    /// Hands what was pushed to the kernel, and waits for `wait_for` requests to end.
    fn enter(&mut self, wait_for: usize) -> Result<()> {
        loop {
            match self.ring.submit_and_wait(wait_for) {
                Ok(_) => {
                    self.unsubmitted = 0;
                    return Ok(());
                }
                Err(error) if error.raw_os_error() == Some(Errno::INTR.raw_os_error()) => {}
                // Completions must be taken first, or memory is short for a moment: what is under
                // way will give some back.
                Err(error) if is_passing(&error) && self.slots.len() > self.free.len() => {
                    return Ok(());
                }
                Err(error) => return Err(Error::device("wait for io_uring", &error)),
            }
        }
    }

    fn push(&mut self, request: Request) -> std::result::Result<(), Request> {
        let memory = &self.memory[request.memory.clone()];
        let Some(descriptor) = request.place.direct(request.access, request.offset, memory) else {
            return Err(request);
        };
        let Some(slot) = self.free.pop() else { return Err(request) };
        let descriptor = types::Fd(descriptor.as_raw_fd());
        let length = u32::try_from(memory.len()).expect("a request is far below 4 GiB");
        let start = memory.as_ptr().cast_mut();
        let entry = match (request.access, self.registered) {
            (Access::Read, true) => {
                opcode::ReadFixed::new(descriptor, start, length, 0).offset(request.offset).build()
            }
            (Access::Read, false) => {
                opcode::Read::new(descriptor, start, length).offset(request.offset).build()
            }
            (Access::Write, true) => {
                opcode::WriteFixed::new(descriptor, start, length, 0).offset(request.offset).build()
            }
            (Access::Write, false) => {
                opcode::Write::new(descriptor, start, length).offset(request.offset).build()
            }
        };
        let entry = entry.user_data(slot as u64);
        // SAFETY: the slot holds the place, and with it the descriptor, until the completion is
        // taken; the memory is the queue's, and guarded until then.
        if unsafe { self.ring.submission().push(&entry) }.is_err() {
            self.free.push(slot);
            return Err(request);
        }
        self.guard(&request.memory, true);
        self.slots[slot] = Some(request);
        self.unsubmitted += 1;
        Ok(())
    }

    fn take_completions(&mut self, done: &mut Vec<Done>) {
        let ended: Vec<(u64, i32)> =
            self.ring.completion().map(|entry| (entry.user_data(), entry.result())).collect();
        for (slot, result) in ended {
            let slot = usize::try_from(slot).expect("as pushed");
            let request = self.slots[slot].take().expect("a request ends once");
            self.free.push(slot);
            self.guard(&request.memory, false);
            done.push(Done { tag: request.tag, result: self.finish(&request, result) });
        }
    }

    fn finish(&mut self, request: &Request, result: i32) -> Result<()> {
        let all = request.memory.len();
        let count = match usize::try_from(result) {
            Ok(count) if count == all => return Ok(()),
            Ok(count) => count,
            // Once more by ourselves: it may have been a passing condition, and if not the place
            // has better words for it.
            Err(_) => 0,
        };
        carry_out(request, count, &mut self.memory)
    }
}

/// Does the request from its byte `from` on, and waits for it.
fn carry_out(request: &Request, from: usize, memory: &mut [u8]) -> Result<()> {
    let memory = &mut memory[request.memory.start + from..request.memory.end];
    let offset = request.offset + from as u64;
    match request.access {
        Access::Read => request.place.read_at(offset, memory),
        Access::Write => request.place.write_at(offset, memory),
    }
}

fn libc_iovec(memory: &mut AlignedBuffer) -> libc::iovec {
    libc::iovec { iov_base: memory.as_mut_ptr().cast(), iov_len: memory.len() }
}

impl Queue for RingQueue {
    fn submit(&mut self, request: Request) {
        let Err(mut request) = self.push(request) else { return };
        // The ring may only be full: it is emptied by handing it over.
        if self.unsubmitted > 0 && self.enter(0).is_ok() {
            match self.push(request) {
                Ok(()) => return,
                Err(again) => request = again,
            }
        }
        let result = carry_out(&request, 0, &mut self.memory);
        self.done.push(Done { tag: request.tag, result });
    }

    fn wait(&mut self, done: &mut Vec<Done>) -> Result<()> {
        let in_kernel = self.slots.len() - self.free.len();
        if in_kernel > 0 {
            self.enter(usize::from(self.done.is_empty()))?;
            self.take_completions(done);
        }
        done.append(&mut self.done);
        Ok(())
    }

    fn drain(&mut self) -> bool {
        let mut ended = Vec::new();
        while self.slots.len() > self.free.len() {
            if self.enter(1).is_err() {
                return false;
            }
            self.take_completions(&mut ended);
        }
        self.done.clear();
        true
    }

    fn under_way(&self) -> usize {
        self.slots.len() - self.free.len() + self.done.len()
    }

    fn memory(&mut self, range: Range<usize>) -> &mut [u8] {
        let stretches = range.start / GUARD_BYTES..range.end.div_ceil(GUARD_BYTES);
        assert!(self.guards[stretches].iter().all(|count| *count == 0), "a request is under way");
        &mut self.memory[range]
    }
}

impl Drop for RingQueue {
    fn drop(&mut self) {
        if !self.drain() {
            return;
        }
        // SAFETY: nothing is under way, and the memory is not used after this.
        unsafe { ManuallyDrop::drop(&mut self.memory) };
    }
}

/// What a request of an `OwningRing` reads into or writes from.
#[derive(Debug)]
pub(super) enum Memory {
    Read(AlignedBuffer),
    Write(Payload),
}

/// A request that ended, with what it owned.
#[derive(Debug)]
pub(super) struct Ended {
    pub(super) tag: u64,
    pub(super) device: Arc<dyn Device>,
    pub(super) offset: u64,
    pub(super) memory: Memory,
    /// Whether the kernel did all of it.
    pub(super) whole: bool,
}

/// A ring whose requests own their memory while they are under way. For the thread that makes it.
pub(super) struct OwningRing {
    ring: IoUring,
    slots: Vec<Option<Ended>>,
    free: Vec<usize>,
    unsubmitted: usize,
}

impl fmt::Debug for OwningRing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OwningRing").field("under_way", &self.under_way()).finish_non_exhaustive()
    }
}

impl OwningRing {
    /// `bell` becomes readable when something ends.
    pub(super) fn new(requests: usize, bell: BorrowedFd<'_>) -> Result<Self> {
        let entries = u32::try_from(requests).expect("a small number");
        let ring = build(entries).map_err(|source| refused(&source))?;
        let registered = ring.submitter().register_eventfd(bell.as_raw_fd());
        registered.map_err(|source| refused(&source))?;
        let slots = (0..requests).map(|_| None).collect();
        Ok(Self { ring, slots, free: (0..requests).collect(), unsubmitted: 0 })
    }

    pub(super) fn under_way(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Takes a request that is handed over with the next `enter`; gives its memory back if the
    /// kernel cannot be given it.
    pub(super) fn push(
        &mut self,
        device: &Arc<dyn Device>,
        offset: u64,
        memory: Memory,
        tag: u64,
    ) -> std::result::Result<(), Memory> {
        let (access, bytes): (_, &[u8]) = match &memory {
            Memory::Read(buffer) => (Access::Read, buffer),
            Memory::Write(payload) => (Access::Write, payload),
        };
        let Some(descriptor) = device.direct(access, offset, bytes) else { return Err(memory) };
        let Some(&slot) = self.free.last() else { return Err(memory) };
        let descriptor = types::Fd(descriptor.as_raw_fd());
        let length = u32::try_from(bytes.len()).expect("a request is far below 4 GiB");
        let start = bytes.as_ptr().cast_mut();
        let entry = match access {
            Access::Read => opcode::Read::new(descriptor, start, length).offset(offset).build(),
            Access::Write => opcode::Write::new(descriptor, start, length).offset(offset).build(),
        };
        let entry = entry.user_data(slot as u64);
        // SAFETY: the slot owns the memory, and the device with its descriptor, until the
        // completion is taken; what is read into is borrowed by nobody meanwhile, and what is
        // written from is immutable.
        if unsafe { self.ring.submission().push(&entry) }.is_err() {
            return Err(memory);
        }
        self.free.pop();
        let device = Arc::clone(device);
        self.slots[slot] = Some(Ended { tag, device, offset, memory, whole: false });
        self.unsubmitted += 1;
        Ok(())
    }

    /// Hands over what was pushed, lets the kernel finish what it can, and takes what ended.
    pub(super) fn enter(&mut self, wait: bool, ended: &mut Vec<Ended>) -> Result<()> {
        const GETEVENTS: u32 = 1;
        let (handed, least) = (self.unsubmitted as u32, u32::from(wait && self.under_way() > 0));
        // SAFETY: no argument is passed.
        match unsafe { self.ring.submitter().enter::<()>(handed, least, GETEVENTS, None) } {
            Ok(taken) => self.unsubmitted -= taken.min(self.unsubmitted),
            Err(error) if error.raw_os_error() == Some(Errno::INTR.raw_os_error()) => {}
            // Memory is short for a moment: what is under way gives some back.
            Err(error) if is_passing(&error) => {}
            Err(error) => return Err(Error::device("wait for io_uring", &error)),
        }
        for entry in self.ring.completion() {
            let slot = usize::try_from(entry.user_data()).expect("as pushed");
            let mut request = self.slots[slot].take().expect("a request ends once");
            self.free.push(slot);
            let length = match &request.memory {
                Memory::Read(buffer) => buffer.len(),
                Memory::Write(payload) => payload.len(),
            };
            request.whole = usize::try_from(entry.result()) == Ok(length);
            ended.push(request);
        }
        Ok(())
    }
}

impl Drop for OwningRing {
    fn drop(&mut self) {
        let mut ended = Vec::new();
        while self.under_way() > 0 {
            if self.enter(true, &mut ended).is_err() {
                // Memory that the kernel may still touch is leaked rather than freed.
                self.slots.drain(..).for_each(std::mem::forget);
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::device::queue::{BlockingQueue, Place};
    use crate::device::{Device, FileDevice, OpenOptions};

    const MEMORY: usize = 1 << 20;

    /// Writes, reads back and compares, with requests that the kernel can and cannot take.
    fn exercise(queue: &mut dyn Queue, device: &Arc<dyn Device>) {
        let request = |access, offset: u64, memory: Range<usize>, tag| Request {
            place: Place::Device(Arc::clone(device)),
            access,
            offset,
            memory,
            tag,
        };
        for (at, byte) in queue.memory(0..MEMORY / 2).iter_mut().enumerate() {
            *byte = (at / 512 % 251) as u8;
        }
        let half = MEMORY / 2;
        let pieces = [0..4096, 4096..4608, 4608..8192 + 512, 8192 + 512..half];
        for access in [Access::Write, Access::Read] {
            let mut done = Vec::new();
            for (tag, piece) in pieces.iter().enumerate() {
                let shift = if access == Access::Read { half } else { 0 };
                let memory = piece.start + shift..piece.end + shift;
                queue.submit(request(access, piece.start as u64, memory, tag as u64));
            }
            while queue.under_way() > 0 {
                queue.wait(&mut done).expect("waited");
            }
            let mut tags: Vec<u64> = done.iter().map(|one| one.tag).collect();
            tags.sort_unstable();
            assert_eq!(tags, [0, 1, 2, 3]);
            assert!(done.iter().all(|one| one.result.is_ok()), "{done:?}");
        }
        let (written, read) = queue.memory(0..MEMORY).split_at(half);
        assert!(written == read, "what was written comes back");
        queue.submit(request(Access::Read, device.size(), 0..4096, 9));
        let mut done = Vec::new();
        queue.wait(&mut done).expect("waited");
        assert!(done.len() == 1 && done[0].result.is_err(), "outside the device");
    }

    #[test]
    fn requests_of_any_alignment_come_back_as_they_were_written() {
        let home = tempfile::tempdir().expect("a temporary directory");
        for direct in [true, false] {
            let path = home.path().join(format!("disk-{direct}"));
            let size = Some(MEMORY as u64 + 512);
            let options = OpenOptions { direct, create_size: size, ..OpenOptions::default() };
            let device: Arc<dyn Device> = Arc::new(FileDevice::open(path, options).expect("made"));
            exercise(&mut BlockingQueue::new(MEMORY), &device);
            exercise(&mut RingQueue::new(MEMORY).expect("io_uring is allowed here"), &device);
        }
    }

    #[test]
    fn more_requests_than_the_ring_holds_are_all_done() {
        let home = tempfile::tempdir().expect("a temporary directory");
        let options =
            OpenOptions { direct: true, create_size: Some(32 << 20), ..OpenOptions::default() };
        let device: Arc<dyn Device> =
            Arc::new(FileDevice::open(home.path().join("disk"), options).expect("made"));
        let mut queue = RingQueue::new(MEMORY).expect("io_uring is allowed here");
        let count = RING_UNDER_WAY_MAX + RING_ENTRIES as usize + 7;
        for tag in 0..count {
            queue.submit(Request {
                place: Place::Device(Arc::clone(&device)),
                access: Access::Write,
                offset: tag as u64 * 4096,
                memory: tag % 256 * 4096..(tag % 256 + 1) * 4096,
                tag: tag as u64,
            });
        }
        let mut done = Vec::new();
        while queue.under_way() > 0 {
            queue.wait(&mut done).expect("waited");
        }
        assert_eq!(done.len(), count);
        assert!(done.iter().all(|one| one.result.is_ok()));
    }

    #[test]
    #[should_panic(expected = "a request is under way")]
    fn memory_that_the_kernel_may_touch_is_not_lent() {
        let home = tempfile::tempdir().expect("a temporary directory");
        let options =
            OpenOptions { direct: true, create_size: Some(8192), ..OpenOptions::default() };
        let device: Arc<dyn Device> =
            Arc::new(FileDevice::open(home.path().join("disk"), options).expect("made"));
        let mut queue = RingQueue::new(8192).expect("io_uring is allowed here");
        let place = Place::Device(device);
        queue.submit(Request { place, access: Access::Read, offset: 0, memory: 0..4096, tag: 0 });
        let _lent = queue.memory(4096..8192);
        let _lent = queue.memory(0..8192);
    }
}
