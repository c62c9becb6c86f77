//! Many lives, on as many threads as there are processors: counted, and the first that breaks a law
//! made as short as it goes.
//!
//! Guarantees: a life depends on its seed alone, whatever thread it runs on; a failure names its
//! seed and how many of its steps suffice.
//! Does not know: the clock of anybody but its own caller; terminals.

use std::cell::Cell;
use std::ops::ControlFlow;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, Once, PoisonError};

use super::life::{Life, Lived};
use super::rare::Counts;
use super::trace::Trace;
use crate::clock::MonotonicClock;
use crate::limits::PROGRESS_INTERVAL_MS;

/// How many lives, from which seed on.
#[derive(Clone, Copy, Debug)]
pub struct Campaign {
    pub seed: u64,
    /// At the most; without it until the time is over.
    pub lives: Option<u64>,
    /// After so many milliseconds no life begins.
    pub milliseconds: Option<u64>,
    pub threads: usize,
}

/// A life in which a law was broken.
#[derive(Clone, Debug)]
pub struct Failure {
    pub seed: u64,
    /// So many steps, then the end, suffice.
    pub steps: u64,
    /// What was wrong, with all steps and with those that suffice.
    pub words: String,
    pub shortest: String,
    /// What happens in the shortest.
    pub history: Vec<String>,
}

/// What a campaign came through.
#[derive(Clone, Debug, Default)]
pub struct Report {
    pub lives: u64,
    pub operations: u64,
    pub rare: Counts,
    pub failure: Option<Failure>,
    pub milliseconds: u64,
}

/// Called on the thread that runs the campaign, now and then; says whether to go on.
pub type OnProgress<'a> = &'a mut dyn FnMut(&Report) -> ControlFlow<()>;

thread_local! {
    static CLOCK: &'static AtomicU64 = Box::leak(Box::new(AtomicU64::new(0)));
    /// A panic on this thread is a finding, told by whoever catches it.
    static FINDING: Cell<bool> = const { Cell::new(false) };
}

/// Findings are not printed where they happen; other panics are, as before.
fn quieten_findings() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            if !FINDING.get() {
                before(panic);
            }
        }));
    });
}

/// Lives through a seed, or only its first steps and the end; says what went wrong.
fn live(seed: u64, steps_max: u64, trace: &Trace) -> Result<Lived, String> {
    quieten_findings();
    FINDING.set(true);
    let clock = CLOCK.with(|clock| *clock);
    let lived =
        catch_unwind(AssertUnwindSafe(|| Life::new(seed, clock, trace.clone()).live(steps_max)));
    FINDING.set(false);
    lived.map_err(|panic| {
        let words = panic.downcast_ref::<String>().cloned();
        words
            .or_else(|| panic.downcast_ref::<&str>().map(|words| (*words).to_owned()))
            .unwrap_or_else(|| "no words".to_owned())
    })
}

/// The shortest beginning of a failing life that fails as well, and what happens in it.
fn shorten(seed: u64, words: String) -> Failure {
    let silent = Trace::default();
    let steps = (0..1_000).find(|steps| live(seed, *steps, &silent).is_err()).unwrap_or(u64::MAX);
    let (shortest, history) = retell(seed, steps);
    Failure { seed, steps, words, shortest, history }
}

fn retell(seed: u64, steps: u64) -> (String, Vec<String>) {
    let trace = Trace::keeping();
    let words = live(seed, steps, &trace).err();
    let words = words.unwrap_or_else(|| "the second time it went well".to_owned());
    (words, trace.take())
}

/// What happens in a life, in words.
#[must_use]
pub fn tell(seed: u64) -> Vec<String> {
    let trace = Trace::keeping();
    let _lived = live(seed, u64::MAX, &trace);
    trace.take()
}

/// Lives through one seed again; `steps`: only so many, then the end.
#[must_use]
pub fn replay(seed: u64, steps: Option<u64>) -> Report {
    let trace = Trace::keeping();
    let mut report = Report { lives: 1, ..Report::default() };
    match live(seed, steps.unwrap_or(u64::MAX), &trace) {
        Ok(lived) => {
            report.operations = lived.operations;
            report.rare = lived.rare;
        }
        Err(words) => {
            let failure = match steps {
                Some(steps) => {
                    Failure { seed, steps, shortest: words.clone(), words, history: trace.take() }
                }
                None => shorten(seed, words),
            };
            report.failure = Some(failure);
        }
    }
    report
}

/// What the threads of a campaign have in common.
struct Shared {
    next: AtomicU64,
    stop: AtomicBool,
    report: Mutex<Report>,
}

/// Runs a campaign. See the module.
pub fn run(campaign: &Campaign, progress: OnProgress<'_>) -> Report {
    let clock = MonotonicClock::default();
    let shared =
        Shared { next: AtomicU64::new(0), stop: AtomicBool::new(false), report: Mutex::default() };
    let (ended, all_ended) = crossbeam_channel::bounded::<()>(campaign.threads);
    std::thread::scope(|scope| {
        for _ in 0..campaign.threads {
            let (shared, ended) = (&shared, ended.clone());
            scope.spawn(move || {
                work(campaign, clock, shared);
                let _told = ended.send(());
            });
        }
        drop(ended);
        let pause = std::time::Duration::from_millis(PROGRESS_INTERVAL_MS);
        let mut running = campaign.threads;
        while running > 0 {
            match all_ended.recv_timeout(pause) {
                Ok(()) => running -= 1,
                Err(_) => {
                    let mut now =
                        shared.report.lock().unwrap_or_else(PoisonError::into_inner).clone();
                    now.milliseconds = clock.now().0;
                    if progress(&now).is_break() {
                        shared.stop.store(true, Ordering::Release);
                    }
                }
            }
        }
    });
    let mut report = shared.report.into_inner().unwrap_or_else(PoisonError::into_inner);
    report.milliseconds = clock.now().0;
    report
}

fn work(campaign: &Campaign, clock: MonotonicClock, shared: &Shared) {
    loop {
        let number = shared.next.fetch_add(1, Ordering::AcqRel);
        let late = campaign.milliseconds.is_some_and(|limit| clock.now().0 >= limit);
        let enough = campaign.lives.is_some_and(|lives| number >= lives);
        if late || enough || shared.stop.load(Ordering::Acquire) {
            return;
        }
        let seed = campaign.seed.wrapping_add(number);
        let lived = live(seed, u64::MAX, &Trace::default());
        let lock = || shared.report.lock().unwrap_or_else(PoisonError::into_inner);
        match lived {
            Ok(lived) => {
                let mut report = lock();
                report.lives += 1;
                report.operations += lived.operations;
                report.rare.add(&lived.rare);
            }
            Err(words) => {
                shared.stop.store(true, Ordering::Release);
                let failure = shorten(seed, words);
                let mut report = lock();
                report.lives += 1;
                report.failure.get_or_insert(failure);
            }
        }
    }
}
