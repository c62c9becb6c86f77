//! Time as a value. State machines are told the time; only drivers read it.
//!
//! Does not know: what the time is for.

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

/// Milliseconds since 1970, for dates that people read; never for intervals.
#[must_use]
#[expect(clippy::disallowed_methods, reason = "the one place that reads the date")]
pub fn wall_clock_ms() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |since| u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
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

    /// Nanoseconds since it was made, to measure rates by.
    #[must_use]
    pub fn now_ns(self) -> u64 {
        u64::try_from(self.origin.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }
}
