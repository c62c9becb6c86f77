//! Whether compressing pays, from what each stage of a bundle's writer was seen to do.
//!
//! | the codec keeps up with the slower of source and sink | then |
//! |---|---|
//! | yes: the sink, or the source, is what everybody waits for | compress: it costs no time |
//! | no: the sink would wait for the codec | store as it is, but try a chunk now and then |
//! | not known yet | compress, so that it becomes known |
//!
//! Guarantees: decides from rates only, which its caller measures; between the two answers lies a
//! margin, so that it does not swing.
//! Does not know: clocks, chunks.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

/// Rates are those of about so many bytes past.
const WINDOW_BYTES: f64 = 128e6;
/// Fewer bytes than this say nothing yet.
const EVIDENCE_BYTES: f64 = 4e6;
/// A codec that is this much too slow is still kept, and one that is this much too fast is taken
/// up again.
const KEEP_FROM: f64 = 0.95;
const BEGIN_FROM: f64 = 1.15;
/// One chunk in so many is tried while compression rests, so that its rate stays known.
const TRY_EACH: u64 = 64;

/// What takes part in making a bundle.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Reading; bytes of the volume.
    Source,
    /// Hashing and compressing on one thread; bytes of the volume.
    Codec,
    /// Writing and flushing; bytes as stored.
    Sink,
}

#[derive(Clone, Copy, Debug, Default)]
struct Rate {
    bytes: f64,
    seconds: f64,
}

impl Rate {
    fn add(&mut self, bytes: u64, nanoseconds: u64) {
        self.bytes += bytes as f64;
        self.seconds += nanoseconds as f64 / 1e9;
        if self.bytes > WINDOW_BYTES {
            self.bytes /= 2.0;
            self.seconds /= 2.0;
        }
    }

    /// Bytes a second, once it is known.
    fn known(self) -> Option<f64> {
        (self.bytes >= EVIDENCE_BYTES).then(|| self.bytes / self.seconds.max(1e-9))
    }
}

/// See the module.
#[derive(Debug)]
pub struct Pace {
    rates: Mutex<[Rate; 3]>,
    threads: f64,
    compressing: AtomicBool,
    asked: AtomicU64,
    untried: AtomicU64,
}

/// The table of the module; rates in bytes a second.
fn pays(source: Option<f64>, codec: Option<f64>, sink: Option<f64>, compressing: bool) -> bool {
    let (Some(codec), Some(sink)) = (codec, sink) else { return true };
    let awaited = source.map_or(sink, |source| source.min(sink));
    codec >= awaited * if compressing { KEEP_FROM } else { BEGIN_FROM }
}

impl Pace {
    /// Of a writer with so many threads that compress.
    #[must_use]
    pub fn new(threads: usize) -> Self {
        Self {
            rates: Mutex::default(),
            threads: threads as f64,
            compressing: AtomicBool::new(true),
            asked: AtomicU64::new(0),
            untried: AtomicU64::new(0),
        }
    }

    /// A stage dealt with so many bytes in that time.
    pub fn note(&self, stage: Stage, bytes: u64, nanoseconds: u64) {
        let mut rates = self.rates.lock().unwrap_or_else(PoisonError::into_inner);
        rates[stage as usize].add(bytes, nanoseconds);
        let [source, codec, sink] = rates.map(Rate::known);
        let codec = codec.map(|one| one * self.threads);
        let before = self.compressing.load(Ordering::Relaxed);
        self.compressing.store(pays(source, codec, sink, before), Ordering::Relaxed);
    }

    /// Whether the next chunk is to be compressed.
    pub fn tries_next(&self) -> bool {
        let number = self.asked.fetch_add(1, Ordering::Relaxed);
        let tries = self.compressing.load(Ordering::Relaxed) || number.is_multiple_of(TRY_EACH);
        self.untried.fetch_add(u64::from(!tries), Ordering::Relaxed);
        tries
    }

    /// Chunks that were stored as they are because the sink would have waited.
    #[must_use]
    pub fn untried(&self) -> u64 {
        self.untried.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MB: u64 = 1_000_000;

    /// So many MB at so many MB a second.
    fn note(pace: &Pace, stage: Stage, megabytes: u64, rate: u64) {
        for _ in 0..megabytes {
            pace.note(stage, MB, 1_000_000_000 / rate);
        }
    }

    fn tried(pace: &Pace) -> usize {
        (0..TRY_EACH * 10).filter(|_| pace.tries_next()).count()
    }

    const ALL: usize = TRY_EACH as usize * 10;

    #[test]
    fn until_rates_are_known_everything_is_tried() {
        let pace = Pace::new(2);
        assert_eq!(tried(&pace), ALL);
        note(&pace, Stage::Sink, 3, 5000);
        note(&pace, Stage::Codec, 3, 1);
        assert_eq!((tried(&pace), pace.untried()), (ALL, 0));
    }

    #[test]
    fn a_slow_sink_is_compressed_for_and_a_fast_one_is_not() {
        let pace = Pace::new(2);
        note(&pace, Stage::Source, 100, 4000);
        note(&pace, Stage::Codec, 100, 300);
        note(&pace, Stage::Sink, 100, 150);
        assert_eq!(tried(&pace), ALL);
        note(&pace, Stage::Sink, 1000, 2000);
        assert_eq!(tried(&pace), 10, "one in {TRY_EACH}");
        assert_eq!(pace.untried(), ALL as u64 - 10);
        note(&pace, Stage::Sink, 1000, 150);
        assert_eq!(tried(&pace), ALL, "the sink became slow again");
    }

    #[test]
    fn more_threads_keep_up_with_a_faster_sink() {
        for (threads, expected) in [(1, 10), (4, ALL)] {
            let pace = Pace::new(threads);
            note(&pace, Stage::Codec, 100, 300);
            note(&pace, Stage::Sink, 1000, 900);
            assert_eq!(tried(&pace), expected, "{threads} threads");
        }
    }

    #[test]
    fn where_the_source_is_slowest_compressing_costs_nothing() {
        let pace = Pace::new(1);
        note(&pace, Stage::Codec, 100, 300);
        note(&pace, Stage::Sink, 1000, 2000);
        assert_eq!(tried(&pace), 10);
        note(&pace, Stage::Source, 100, 200);
        note(&pace, Stage::Sink, 1, 2000);
        assert_eq!(tried(&pace), ALL);
    }

    #[test]
    fn between_the_answers_lies_a_margin() {
        let at = |share: f64, compressing| pays(None, Some(share * 1e9), Some(1e9), compressing);
        assert_eq!([0.9, 1.0, 1.1, 1.2].map(|share| at(share, true)), [false, true, true, true]);
        assert_eq!([0.9, 1.0, 1.1, 1.2].map(|share| at(share, false)), [false, false, false, true]);
    }
}
