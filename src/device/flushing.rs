//! One flush of an open file at a time, and nothing after one that failed.
//!
//! | what the kernel does when it cannot write back | so |
//! |---|---|
//! | tells one flush of an open file, and the one beside it that all is well | one at a time |
//! | may drop what it could not write | a later flush that succeeds says nothing of it (trap 5) |
//!
//! Does not know: what is flushed.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::error::Result;

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Flushes {
    one_at_a_time: Mutex<()>,
    failed: AtomicBool,
}

impl Flushes {
    pub fn have_failed(&self) -> bool {
        self.failed.load(Ordering::Acquire)
    }

    /// Flushes, beside no other; `flush` looks first whether one has failed.
    pub fn run(&self, flush: impl FnOnce() -> Result<()>) -> Result<()> {
        let _one = self.one_at_a_time.lock().unwrap_or_else(PoisonError::into_inner);
        flush().inspect_err(|_| self.failed.store(true, Ordering::Release))
    }
}

#[cfg(test)]
mod tests {
    use crossbeam_channel::bounded;

    use super::*;
    use crate::error::Error;

    #[test]
    fn law_11_a_flush_beside_one_that_fails_is_not_told_that_all_is_well() {
        let flushes = Flushes::default();
        let (begun, first_has_begun) = bounded(1);
        let (second_ran, ran) = bounded(1);
        std::thread::scope(|scope| {
            let first = scope.spawn(|| {
                flushes.run(|| {
                    begun.send(()).expect("the test waits");
                    // Were the second let in beside it, it would soon be heard of.
                    let beside = ran.recv_timeout(std::time::Duration::from_millis(50));
                    assert!(beside.is_err(), "two flushes side by side");
                    Err(Error::integrity("the disk failed"))
                })
            });
            first_has_begun.recv().expect("begun");
            let second = flushes.run(|| {
                second_ran.send(()).expect("room for one");
                if flushes.have_failed() { Err(Error::busy("one has failed")) } else { Ok(()) }
            });
            second.expect_err("it comes after the one that failed");
            first.join().expect("no panic").expect_err("it failed");
        });
    }
}
