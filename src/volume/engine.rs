//! What all volumes of a process share: the threads for device operations, one that lets time
//! pass, and the clock.
//!
//! | engine | a job | time | who waits for an answer |
//! |---|---|---|---|
//! | with threads | runs on one of the device threads | a thread tells it | sleeps |
//! | driven | is given to its `Scheduler` | `tick` | lets the scheduler do other work meanwhile |
//!
//! Guarantees: a registered volume is told the time about every `TICK_MS`, or with every `tick` of
//! a driven engine, until it is dropped. A driven engine has no thread: whatever happens is
//! decided by its scheduler, so that a simulation can be repeated.
//! Does not know: what a volume does with it.

use std::fmt;
use std::sync::{Arc, Condvar, Mutex, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError, TryRecvError};

use crate::clock::{Instant, MonotonicClock};
use crate::device::WorkerPool;
use crate::error::{Error, Result};

const TICK_MS: u64 = 50;

/// Something that wants to be told the time.
pub trait Timed: Send + Sync {
    fn tick(&self, now: Instant);
}

/// Work that an engine was given.
pub type Job = Box<dyn FnOnce() + Send>;

/// Runs the work of an engine that has no threads.
pub trait Scheduler: Send + Sync {
    fn take(&self, job: Job);
    /// Does some of the work that there is; `false` if there is none.
    fn work(&self) -> bool;
}

/// See the module.
#[derive(Debug)]
pub struct Engine {
    clock: MonotonicClock,
    volumes: Arc<Volumes>,
    hands: Hands,
}

enum Hands {
    Threads { pool: Arc<WorkerPool>, ticker: Option<JoinHandle<()>> },
    Driven(Arc<dyn Scheduler>),
}

/// Who is told the time.
struct Volumes {
    state: Mutex<VolumesState>,
    stop: Condvar,
}

#[derive(Default)]
struct VolumesState {
    volumes: Vec<Weak<dyn Timed>>,
    stopping: bool,
}

impl fmt::Debug for Volumes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Volumes")
    }
}

impl fmt::Debug for Hands {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Threads { .. } => "Threads",
            Self::Driven(_) => "Driven",
        })
    }
}

impl Engine {
    pub fn new() -> Result<Arc<Self>> {
        let pool = Arc::new(WorkerPool::for_devices()?);
        let volumes = Arc::new(Volumes { state: Mutex::default(), stop: Condvar::new() });
        let clock = MonotonicClock::default();
        let shared = Arc::clone(&volumes);
        let ticker = std::thread::Builder::new()
            .name("ticker".into())
            .spawn(move || shared.run(clock))
            .map_err(|error| Error::device("start a thread", &error))?;
        let hands = Hands::Threads { pool, ticker: Some(ticker) };
        Ok(Arc::new(Self { clock, volumes, hands }))
    }

    /// An engine without threads.
    #[must_use]
    pub fn driven(scheduler: Arc<dyn Scheduler>, clock: MonotonicClock) -> Arc<Self> {
        let volumes = Arc::new(Volumes { state: Mutex::default(), stop: Condvar::new() });
        Arc::new(Self { clock, volumes, hands: Hands::Driven(scheduler) })
    }

    #[must_use]
    pub fn now(&self) -> Instant {
        self.clock.now()
    }

    pub fn register(&self, volume: Weak<dyn Timed>) {
        let mut state = self.volumes.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.volumes.push(volume);
    }

    /// The threads for device operations.
    #[must_use]
    pub fn pool(&self) -> &Arc<WorkerPool> {
        match &self.hands {
            Hands::Threads { pool, .. } => pool,
            Hands::Driven(_) => unreachable!("nobody asks a driven engine for its threads"),
        }
    }

    /// Runs a job on one of the device threads.
    pub fn spawn(&self, job: impl FnOnce() + Send + 'static) {
        match &self.hands {
            Hands::Threads { pool, .. } => pool.submit(job),
            Hands::Driven(scheduler) => scheduler.take(Box::new(job)),
        }
    }

    /// What follows a device operation on its thread; much may happen in between.
    pub fn follow(&self, job: impl FnOnce() + Send + 'static) {
        match &self.hands {
            Hands::Threads { .. } => job(),
            Hands::Driven(scheduler) => scheduler.take(Box::new(job)),
        }
    }

    /// Waits for an answer that others bring, for ever where no time is given.
    pub fn receive<T>(
        &self,
        answers: &Receiver<T>,
        timeout: Option<Duration>,
    ) -> std::result::Result<T, RecvTimeoutError> {
        match (&self.hands, timeout) {
            (Hands::Threads { .. }, Some(timeout)) => answers.recv_timeout(timeout),
            (Hands::Threads { .. }, None) => {
                answers.recv().map_err(|_| RecvTimeoutError::Disconnected)
            }
            (Hands::Driven(scheduler), _) => loop {
                match answers.try_recv() {
                    Ok(answer) => return Ok(answer),
                    Err(TryRecvError::Disconnected) => return Err(RecvTimeoutError::Disconnected),
                    Err(TryRecvError::Empty) if scheduler.work() => {}
                    Err(TryRecvError::Empty) => return Err(RecvTimeoutError::Timeout),
                }
            },
        }
    }

    /// How long to wait for others who work on threads. Those of a driven engine work here and now,
    /// until nothing is left to do or what is awaited is there.
    pub fn patience(&self, timeout: Duration, is_there: impl Fn() -> bool) -> Duration {
        match &self.hands {
            Hands::Threads { .. } => timeout,
            Hands::Driven(scheduler) => {
                while !is_there() && scheduler.work() {}
                Duration::ZERO
            }
        }
    }

    /// Tells the volumes the time.
    pub fn tick(&self) {
        let mut state = self.volumes.state.lock().unwrap_or_else(PoisonError::into_inner);
        let volumes = state.living();
        drop(state);
        for volume in volumes {
            volume.tick(self.clock.now());
        }
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

impl VolumesState {
    fn living(&mut self) -> Vec<Arc<dyn Timed>> {
        self.volumes.retain(|volume| volume.strong_count() > 0);
        self.volumes.iter().filter_map(Weak::upgrade).collect()
    }
}

impl Volumes {
    fn run(&self, clock: MonotonicClock) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        while !state.stopping {
            let volumes = state.living();
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
        let Hands::Threads { ticker, .. } = &mut self.hands else { return };
        self.volumes.state.lock().unwrap_or_else(PoisonError::into_inner).stopping = true;
        self.volumes.stop.notify_all();
        if let Some(thread) = ticker.take()
            && thread.thread().id() != std::thread::current().id()
        {
            thread.join().expect("a volume's tick does not panic");
        }
    }
}
