//! Time as a value. State machines are told the time; only drivers read it.
//!
//! Does not know: the wall clock's date (that is metadata, written by the Python side).

use std::time::{Duration, Instant as StdInstant};

/// Milliseconds on a monotonic clock whose zero is arbitrary.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Instant(pub u64);

impl Instant {
    #[must_use]
    pub fn plus_ms(self, duration_ms: u64) -> Self {
        Self(self.0.saturating_add(duration_ms))
    }

    #[must_use]
    pub fn since_ms(self, earlier: Self) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}

/// The clock drivers read: milliseconds since the clock was made.
#[derive(Clone, Copy, Debug)]
pub struct MonotonicClock {
    origin: StdInstant,
}

impl Default for MonotonicClock {
    #[expect(clippy::disallowed_methods, reason = "the one place that reads the clock")]
    fn default() -> Self {
        Self { origin: StdInstant::now() }
    }
}

impl MonotonicClock {
    #[must_use]
    pub fn now(self) -> Instant {
        let elapsed: Duration = self.origin.elapsed();
        Instant(u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX))
    }
}
