//! Time as a value. State machines are told the time; only drivers read it.
//!
//! Does not know: what the time is for.

use std::sync::atomic::{AtomicU64, Ordering};
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

/// The clock drivers read: milliseconds since the clock was made, or what somebody says that it is.
#[derive(Clone, Copy, Debug)]
pub struct MonotonicClock {
    source: Source,
}

#[derive(Clone, Copy, Debug)]
enum Source {
    Since(StdInstant),
    Told(&'static AtomicU64),
}

impl Default for MonotonicClock {
    #[expect(clippy::disallowed_methods, reason = "the one place that reads the clock")]
    fn default() -> Self {
        Self { source: Source::Since(StdInstant::now()) }
    }
}

impl MonotonicClock {
    /// A clock that shows so many milliseconds, whoever sets them: for simulations.
    #[must_use]
    pub fn told(milliseconds: &'static AtomicU64) -> Self {
        Self { source: Source::Told(milliseconds) }
    }

    #[must_use]
    pub fn now(self) -> Instant {
        match self.source {
            Source::Since(origin) => {
                Instant(u64::try_from(origin.elapsed().as_millis()).unwrap_or(u64::MAX))
            }
            Source::Told(milliseconds) => Instant(milliseconds.load(Ordering::Acquire)),
        }
    }

    /// Nanoseconds since it was made, to measure rates by.
    #[must_use]
    pub fn now_ns(self) -> u64 {
        let elapsed = match self.source {
            Source::Since(origin) => origin.elapsed(),
            Source::Told(milliseconds) => {
                Duration::from_millis(milliseconds.load(Ordering::Acquire))
            }
        };
        u64::try_from(elapsed.as_nanos()).unwrap_or(u64::MAX)
    }
}
