//! What all volumes of a process share: the threads for device operations, one that lets time
//! pass, and the clock.
//!
//! Guarantees: a registered volume is told the time about every `TICK_MS`, until it is dropped.
//! Does not know: what a volume does with it.

use std::sync::{Arc, Condvar, Mutex, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::clock::{Instant, MonotonicClock};
use crate::device::WorkerPool;
use crate::error::{Error, Result};

const TICK_MS: u64 = 50;

/// Something that wants to be told the time.
pub trait Timed: Send + Sync {
    fn tick(&self, now: Instant);
}

/// See the module.
#[derive(Debug)]
pub struct Engine {
    pool: Arc<WorkerPool>,
    clock: MonotonicClock,
    ticker: Arc<Ticker>,
    thread: Option<JoinHandle<()>>,
}

struct Ticker {
    state: Mutex<TickerState>,
    stop: Condvar,
}

struct TickerState {
    volumes: Vec<Weak<dyn Timed>>,
    stopping: bool,
}

impl std::fmt::Debug for Ticker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Ticker")
    }
}

impl Engine {
    pub fn new() -> Result<Arc<Self>> {
        let ticker = Arc::new(Ticker {
            state: Mutex::new(TickerState { volumes: Vec::new(), stopping: false }),
            stop: Condvar::new(),
        });
        let clock = MonotonicClock::default();
        let shared = Arc::clone(&ticker);
        let thread = std::thread::Builder::new()
            .name("ticker".into())
            .spawn(move || shared.run(clock))
            .map_err(|error| Error::device("start a thread", &error))?;
        Ok(Arc::new(Self {
            pool: Arc::new(WorkerPool::for_devices()?),
            clock,
            ticker,
            thread: Some(thread),
        }))
    }

    #[must_use]
    pub fn now(&self) -> Instant {
        self.clock.now()
    }

    pub fn register(&self, volume: Weak<dyn Timed>) {
        let mut state = self.ticker.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.volumes.push(volume);
    }

    /// The threads for device operations.
    #[must_use]
    pub fn pool(&self) -> &Arc<WorkerPool> {
        &self.pool
    }

    /// Runs a job on one of the device threads.
    pub fn spawn(&self, job: impl FnOnce() + Send + 'static) {
        self.pool.submit(job);
    }
}

/// Runs a job on a thread of its own, which nobody waits for: for what may stall without end.
pub fn spawn_apart(name: &str, job: impl FnOnce() + Send + 'static) -> Result<()> {
    std::thread::Builder::new()
        .name(name.into())
        .spawn(job)
        .map(|_unawaited| ())
        .map_err(|error| Error::device("start a thread", &error))
}

impl Ticker {
    fn run(&self, clock: MonotonicClock) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        while !state.stopping {
            state.volumes.retain(|volume| volume.strong_count() > 0);
            let volumes: Vec<_> = state.volumes.iter().filter_map(Weak::upgrade).collect();
            drop(state);
            for volume in volumes {
                volume.tick(clock.now());
            }
            state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            if !state.stopping {
                let pause = Duration::from_millis(TICK_MS);
                state =
                    self.stop.wait_timeout(state, pause).unwrap_or_else(PoisonError::into_inner).0;
            }
        }
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.ticker.state.lock().unwrap_or_else(PoisonError::into_inner).stopping = true;
        self.ticker.stop.notify_all();
        if let Some(thread) = self.thread.take()
            && thread.thread().id() != std::thread::current().id()
        {
            thread.join().expect("a volume's tick does not panic");
        }
    }
}
