//! How long to wait before connecting again: doubling, with jitter, up to a limit.
//!
//! Guarantees: a delay is at least half of its step and at most the whole of it, so that many
//! volumes that lost one backup do not come back in one instant.
//! Does not know: randomness (the caller brings a number), the clock.

use crate::limits::{LINK_RECONNECT_MS_MAX, LINK_RECONNECT_MS_MIN};

#[derive(Clone, Copy, Debug)]
pub struct Backoff {
    step_ms: u64,
}

impl Default for Backoff {
    fn default() -> Self {
        Self { step_ms: LINK_RECONNECT_MS_MIN }
    }
}

impl Backoff {
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// The next delay; `jitter` is any number, best a random one.
    pub fn next_delay_ms(&mut self, jitter: u64) -> u64 {
        let half = self.step_ms / 2;
        let delay_ms = self.step_ms - half + jitter % (half + 1);
        self.step_ms = self.step_ms.saturating_mul(2).min(LINK_RECONNECT_MS_MAX);
        delay_ms
    }

    /// Begins anew: called once a session has lived for `LINK_SILENCE_MS`, not earlier, or a
    /// backup that welcomes and fails would be called ten times a second for ever.
    pub fn reset(&mut self) {
        *self = Self::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_double_from_100_ms_to_10_s_and_begin_anew_after_success() {
        let mut backoff = Backoff::new();
        // The jitter that gives the whole step: half of it, as the remainder is taken of half + 1.
        let steps: Vec<u64> = [50, 100, 200, 400, 800, 1600, 3200, 5000, 5000]
            .map(|half_ms| backoff.next_delay_ms(half_ms))
            .to_vec();
        assert_eq!(steps, [100, 200, 400, 800, 1600, 3200, 6400, 10_000, 10_000]);
        backoff.reset();
        assert_eq!(backoff.next_delay_ms(0), 50);
    }

    #[test]
    fn any_jitter_stays_between_half_the_step_and_the_whole() {
        for jitter in [0, 1, 49, 50, 51, 12_345, u64::MAX] {
            let mut backoff = Backoff::new();
            for step_ms in [100, 200, 400] {
                let delay_ms = backoff.next_delay_ms(jitter);
                assert!((step_ms / 2..=step_ms).contains(&delay_ms), "{jitter}: {delay_ms}");
            }
        }
    }
}
