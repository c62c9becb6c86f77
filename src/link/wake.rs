//! A descriptor that an event loop watches, and which connections it should look at.
//!
//! Guarantees: a connection that was named is in the next `take`, once however often it was named;
//! `name` never waits.

use std::collections::BTreeSet;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, PoisonError};

use rustix::event::EventfdFlags;

use crate::error::{Error, Result};

/// See the module.
#[derive(Debug)]
pub struct Wake {
    descriptor: OwnedFd,
    named: Mutex<BTreeSet<u64>>,
}

impl Wake {
    pub fn new() -> Result<Self> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let descriptor = rustix::event::eventfd(0, flags)
            .map_err(|error| Error::device("make an event descriptor", &error.into()))?;
        Ok(Self { descriptor, named: Mutex::default() })
    }

    #[must_use]
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }

    pub fn name(&self, connection: u64) {
        let mut named = self.named.lock().unwrap_or_else(PoisonError::into_inner);
        if named.insert(connection) && named.len() == 1 {
            // Only a counter at its end could refuse, and then the descriptor is readable anyway.
            let _counted = rustix::io::write(&self.descriptor, &1u64.to_ne_bytes());
        }
    }

    /// Those named since the last call; clears the descriptor.
    pub fn take(&self) -> Vec<u64> {
        let mut named = self.named.lock().unwrap_or_else(PoisonError::into_inner);
        let mut counter = [0; 8];
        // Nothing to read means that nobody was named.
        let _read = rustix::io::read(&self.descriptor, &mut counter);
        std::mem::take(&mut *named).into_iter().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_named_connection_is_taken_once() {
        let wake = Wake::new().expect("a descriptor");
        assert!(wake.take().is_empty());
        for connection in [3, 1, 3] {
            wake.name(connection);
        }
        assert_eq!(wake.take(), [1, 3]);
        assert!(wake.take().is_empty());
    }
}
