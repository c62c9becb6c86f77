//! How long a connection looks around for the next request before its thread sleeps.
//!
//! To be woken costs more than a request of a client that asks for one block at a time. So where
//! the next one usually comes soon, the thread looks around for it; where it does not, it sleeps
//! at once. At most so many threads of the process look around at a time as leave half of the
//! processors to others, and each gives way to whoever wants to run.
//!
//! Guarantees: a client that pauses costs a few looks of `LOOK_NS_MAX` at the most.
//! Does not know: sockets, clocks.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Waits longer than this are slept through: a client beside us answers sooner, a disk does not.
const LOOK_NS_MAX: u64 = 30_000;
/// A wait counts for one part in so many of what is usual.
const WEIGHT: u64 = 4;

/// See the module.
#[derive(Debug)]
pub(super) struct Vigil {
    usual_ns: u64,
}

impl Default for Vigil {
    fn default() -> Self {
        Self { usual_ns: u64::MAX / WEIGHT }
    }
}

impl Vigil {
    /// How long to look around now; zero: not at all.
    pub(super) fn look_ns(&self) -> u64 {
        if self.usual_ns > LOOK_NS_MAX { 0 } else { (self.usual_ns * 2).min(LOOK_NS_MAX) }
    }

    /// Something came after this time without anything to do.
    pub(super) fn waited(&mut self, waited_ns: u64) {
        // Whatever long pauses there were, a few short waits outweigh them.
        let waited_ns = waited_ns.min(LOOK_NS_MAX * WEIGHT);
        let usual_ns = self.usual_ns.min(LOOK_NS_MAX * WEIGHT);
        self.usual_ns = (usual_ns * (WEIGHT - 1) + waited_ns) / WEIGHT;
    }
}

/// A thread that looks around.
#[derive(Debug)]
pub(super) struct Watcher(&'static AtomicUsize);

impl Watcher {
    /// `None` while enough others do.
    pub(super) fn begin() -> Option<Self> {
        static WATCHERS: AtomicUsize = AtomicUsize::new(0);
        static PLACES: OnceLock<usize> = OnceLock::new();
        let places = *PLACES.get_or_init(|| {
            std::thread::available_parallelism().map_or(0, |processors| processors.get() / 2)
        });
        let watcher = Self(&WATCHERS);
        (WATCHERS.fetch_add(1, Ordering::Relaxed) < places).then_some(watcher)
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_that_asks_soon_is_looked_out_for_and_one_that_pauses_is_not() {
        let mut vigil = Vigil::default();
        assert_eq!(vigil.look_ns(), 0, "nothing is known of it");
        (0..20).for_each(|_| vigil.waited(10_000));
        let look_ns = vigil.look_ns();
        assert!((10_000..=LOOK_NS_MAX).contains(&look_ns), "{look_ns}");
        (0..3).for_each(|_| vigil.waited(1_000_000_000));
        assert_eq!(vigil.look_ns(), 0);
        (0..20).for_each(|_| vigil.waited(10_000));
        assert!(vigil.look_ns() > 0, "it is looked out for again");
    }

    #[test]
    fn no_more_threads_look_around_than_leave_others_room() {
        let all: Vec<_> = (0..1000).map_while(|_| Watcher::begin()).collect();
        assert!(all.len() < 1000);
        assert!(Watcher::begin().is_none());
        drop(all);
    }
}
