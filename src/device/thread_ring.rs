//! Device requests of the thread that makes them, carried out by the kernel beside it: no thread
//! in between wakes up for a guest's request to a disk.
//!
//! | who | does |
//! |---|---|
//! | a thread that serves guests | makes a `ThreadRing`, calls `turn`, sleeps on the bell it gave |
//! | whoever works on that thread | `read_here`, `write_here`: taken, or to be done another way |
//!
//! Guarantees: what was taken is answered once, on the same thread, from `turn` or at the latest
//! when the ring is dropped; a request that the kernel did in part or not at all is done once more
//! by the device's own means, at once: it has the words for what is wrong.
//! Does not know: volumes, sockets.

use std::cell::RefCell;
use std::collections::HashMap;
use std::marker::PhantomData;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use super::uring::{Ended, Memory, OwningRing, ring_error};
use super::{AlignedBuffer, Device, Payload};
use crate::error::Result;
use crate::limits::NBD_IN_FLIGHT_MAX;

type AfterRead = Box<dyn FnOnce(Result<AlignedBuffer>) + Send>;
type AfterWrite = Box<dyn FnOnce(Result<()>) + Send>;

enum After {
    Read(AfterRead),
    Write(AfterWrite),
}

/// The ring of a thread; made when the first request needs it.
struct Ring {
    bell: OwnedFd,
    ring: Option<OwningRing>,
    waiting: HashMap<u64, After>,
    next: u64,
}

thread_local! {
    static RING: RefCell<Option<Ring>> = const { RefCell::new(None) };
}

/// See the module. Stays on the thread that made it.
#[derive(Debug)]
pub struct ThreadRing {
    ended: Vec<Ended>,
    _stays: PhantomData<*const ()>,
}

impl ThreadRing {
    /// From now on this thread takes requests. `bell` is an event descriptor that becomes readable
    /// when something ended.
    #[must_use]
    pub fn new(bell: OwnedFd) -> Self {
        let ring = Ring { bell, ring: None, waiting: HashMap::new(), next: 0 };
        RING.with_borrow_mut(|here| {
            assert!(here.is_none(), "a thread has one ring");
            *here = Some(ring);
        });
        Self { ended: Vec::new(), _stays: PhantomData }
    }

    /// Hands over what was taken and answers what ended; whether anything did.
    pub fn turn(&mut self) -> bool {
        self.enter(false)
    }

    fn enter(&mut self, wait: bool) -> bool {
        let ended = &mut self.ended;
        RING.with_borrow_mut(|here| {
            let ring = here.as_mut().and_then(|here| here.ring.as_mut());
            if let Some(ring) = ring.filter(|ring| ring.under_way() > 0) {
                // Half of a request cannot be taken back from the kernel.
                ring.enter(wait, ended).expect("io_uring goes on once it began");
            }
        });
        let any = !ended.is_empty();
        for request in self.ended.drain(..) {
            // Not within the borrow: an answer may lead to the next request.
            answer(request);
        }
        any
    }

    fn under_way() -> usize {
        RING.with_borrow(|here| {
            let ring = here.as_ref().and_then(|here| here.ring.as_ref());
            ring.map_or(0, OwningRing::under_way)
        })
    }
}

impl Drop for ThreadRing {
    fn drop(&mut self) {
        while Self::under_way() > 0 {
            self.enter(true);
        }
        RING.with_borrow_mut(|here| here.take());
    }
}

fn answer(request: Ended) {
    let Ended { tag, device, offset, memory, whole } = request;
    let after = RING.with_borrow_mut(|here| {
        let here = here.as_mut().expect("requests end before their ring");
        here.waiting.remove(&tag).expect("a request ends once")
    });
    match (after, memory) {
        (After::Read(after), Memory::Read(buffer)) if whole => after(Ok(buffer)),
        (After::Write(after), Memory::Write(_)) if whole => after(Ok(())),
        (After::Read(after), Memory::Read(mut buffer)) => {
            let read = device.read_at(offset, &mut buffer);
            after(read.map(|()| buffer));
        }
        (After::Write(after), Memory::Write(payload)) => after(device.write_at(offset, &payload)),
        _ => unreachable!("a read ends as a read"),
    }
}

/// Takes a request if this thread has a ring and the kernel can be given it.
fn take(
    device: &Arc<dyn Device>,
    offset: u64,
    memory: Memory,
    after: After,
) -> std::result::Result<(), After> {
    RING.with_borrow_mut(|here| {
        let Some(here) = here.as_mut() else { return Err(after) };
        if here.ring.is_none() && ring_error().is_none() {
            here.ring = OwningRing::new(NBD_IN_FLIGHT_MAX, here.bell.as_fd()).ok();
        }
        let Some(ring) = here.ring.as_mut() else { return Err(after) };
        let tag = here.next;
        if ring.push(device, offset, memory, tag).is_err() {
            return Err(after);
        }
        here.next += 1;
        here.waiting.insert(tag, after);
        Ok(())
    })
}

/// Reads `length` bytes beside this thread; gives `after` back if that cannot be done here.
pub fn read_here(
    device: &Arc<dyn Device>,
    offset: u64,
    length: usize,
    after: AfterRead,
) -> std::result::Result<(), AfterRead> {
    if !has_ring() {
        return Err(after);
    }
    let memory = Memory::Read(AlignedBuffer::used(length));
    take(device, offset, memory, After::Read(after)).map_err(|after| match after {
        After::Read(after) => after,
        After::Write(_) => unreachable!("given back as it was"),
    })
}

/// Writes beside this thread; gives `after` back if that cannot be done here.
pub fn write_here(
    device: &Arc<dyn Device>,
    offset: u64,
    payload: &Payload,
    after: AfterWrite,
) -> std::result::Result<(), AfterWrite> {
    if !has_ring() {
        return Err(after);
    }
    let memory = Memory::Write(payload.clone());
    take(device, offset, memory, After::Write(after)).map_err(|after| match after {
        After::Write(after) => after,
        After::Read(_) => unreachable!("given back as it was"),
    })
}

fn has_ring() -> bool {
    RING.with_borrow(Option::is_some)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::{FileDevice, OpenOptions, RamDevice};
    use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
    use std::sync::Mutex;

    const MIB: u64 = 1 << 20;

    fn direct(home: &tempfile::TempDir) -> Arc<dyn Device> {
        let options =
            OpenOptions { direct: true, create_size: Some(MIB), ..OpenOptions::default() };
        Arc::new(FileDevice::open(home.path().join("disk"), options).expect("made"))
    }

    fn bell() -> OwnedFd {
        eventfd(0, EventfdFlags::NONBLOCK).expect("a descriptor")
    }

    #[test]
    fn what_was_written_here_is_read_here_and_the_bell_tells_of_the_end() {
        let home = tempfile::tempdir().expect("a temporary directory");
        let (device, bell) = (direct(&home), bell());
        let mut ring = ThreadRing::new(bell.try_clone().expect("a descriptor"));
        let ended = Arc::new(Mutex::new(0));
        for at in 0..64u8 {
            let (payload, ended) = (Payload::copy_of(&[at; 4096]), Arc::clone(&ended));
            let after: AfterWrite = Box::new(move |result| {
                result.expect("written");
                *ended.lock().expect("no panics") += 1;
            });
            assert!(write_here(&device, u64::from(at) * 4096, &payload, after).is_ok());
        }
        while *ended.lock().expect("no panics") < 64 {
            if !ring.turn() {
                let mut descriptors = [PollFd::new(&bell, PollFlags::IN)];
                poll(&mut descriptors, None).expect("rung");
            }
        }
        let found = Arc::new(Mutex::new(Vec::new()));
        let keep = Arc::clone(&found);
        let after: AfterRead =
            Box::new(move |result| keep.lock().expect("no panics").push(result.expect("read")));
        assert!(read_here(&device, 7 * 4096, 8192, after).is_ok());
        drop(ring);
        let found = found.lock().expect("no panics");
        assert_eq!(found.len(), 1, "answered when the ring was dropped");
        assert!(found[0][..4096] == [7; 4096] && found[0][4096..] == [8; 4096]);
    }

    #[test]
    fn what_the_kernel_cannot_be_given_is_given_back() {
        let home = tempfile::tempdir().expect("a temporary directory");
        let device = direct(&home);
        let ram: Arc<dyn Device> = Arc::new(RamDevice::new(MIB));
        let never = || -> AfterRead { Box::new(|_| panic!("given back")) };
        assert!(read_here(&device, 0, 4096, never()).is_err(), "this thread has no ring");
        let _ring = ThreadRing::new(bell());
        assert!(read_here(&ram, 0, 4096, never()).is_err(), "no descriptor");
        assert!(read_here(&device, MIB, 4096, never()).is_err(), "outside");
    }

    #[test]
    fn a_request_that_the_kernel_fails_has_the_words_of_the_device() {
        let home = tempfile::tempdir().expect("a temporary directory");
        let device = direct(&home);
        let mut ring = ThreadRing::new(bell());
        let cut = rustix::fs::open(
            home.path().join("disk"),
            rustix::fs::OFlags::WRONLY,
            rustix::fs::Mode::empty(),
        );
        rustix::fs::ftruncate(cut.expect("there"), 4096).expect("cut");
        let (send, receive) = crossbeam_channel::bounded(1);
        let after: AfterRead = Box::new(move |result| send.send(result).expect("awaited"));
        assert!(read_here(&device, 8192, 4096, after).is_ok());
        while receive.is_empty() {
            ring.turn();
        }
        let error = receive.recv().expect("answered").expect_err("behind the end");
        assert_eq!(error.offset(), Some(8192), "{error}");
    }
}
