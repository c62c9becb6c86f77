//! A fixed number of buffers, lent out and given back.
//!
//! Guarantees: memory is that of all buffers, however they are used; a buffer comes back when the
//! last holder drops it.
//! Does not know: what is in them.

use std::ops::{Deref, DerefMut};
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};

use super::buffer::AlignedBuffer;
use super::stream::Stop;
use crate::error::Result;

const WAIT: Duration = Duration::from_millis(100);

/// See the module.
#[derive(Debug)]
pub struct BufferPool {
    home: Sender<AlignedBuffer>,
    free: Receiver<AlignedBuffer>,
}

impl BufferPool {
    #[must_use]
    pub fn new(count: usize, bytes: usize) -> Self {
        let (home, free) = bounded(count);
        for _ in 0..count {
            home.send(AlignedBuffer::zeroed(bytes)).expect("as many as places");
        }
        Self { home, free }
    }

    /// Waits for a buffer that nobody holds.
    pub fn take(&self, stop: &Stop) -> Result<Lent> {
        loop {
            stop.check()?;
            match self.free.recv_timeout(WAIT) {
                Ok(buffer) => {
                    return Ok(Lent { buffer: Some(buffer), home: self.home.clone() });
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => unreachable!("the pool holds both ends"),
            }
        }
    }
}

/// A buffer on loan.
#[derive(Debug)]
pub struct Lent {
    /// There until it is dropped.
    buffer: Option<AlignedBuffer>,
    home: Sender<AlignedBuffer>,
}

impl Deref for Lent {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        self.buffer.as_ref().expect("there until it is dropped")
    }
}

impl DerefMut for Lent {
    fn deref_mut(&mut self) -> &mut [u8] {
        self.buffer.as_mut().expect("there until it is dropped")
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        if let Some(buffer) = self.buffer.take() {
            // The pool may be gone; then the memory is freed.
            let _unneeded = self.home.send(buffer);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_that_is_dropped_is_lent_again() {
        let pool = BufferPool::new(1, 4096);
        let stop = Stop::default();
        let mut first = pool.take(&stop).expect("free");
        first[0] = 7;
        drop(first);
        assert_eq!(pool.take(&stop).expect("free again")[0], 7);
    }

    #[test]
    fn waiting_for_a_buffer_ends_when_asked_to_stop() {
        let pool = BufferPool::new(1, 4096);
        let stop = Stop::default();
        let _held = pool.take(&stop).expect("free");
        stop.now();
        assert!(pool.take(&stop).is_err());
    }
}
