//! A bounded pool of threads that do device operations.
//!
//! Guarantees: every job that was taken runs once; a submitter outside the pool waits while the
//! queue is full, one inside never does (it runs the job itself), so jobs may submit jobs; dropping
//! the pool runs what was taken and joins its threads. A panic in a job ends the process: data is
//! at stake and half of an operation is done.
//! Does not know: what a job does, order between jobs.

#![expect(clippy::disallowed_methods, reason = "a panicked job ends the process")]

use std::cell::Cell;
use std::fmt;
use std::thread::{self, JoinHandle};

use crossbeam_channel::{Receiver, Sender, TrySendError, bounded};

use crate::error::{Error, Result};

type Job = Box<dyn FnOnce() + Send>;

thread_local! {
    static IN_POOL: Cell<bool> = const { Cell::new(false) };
}

/// See the module.
pub struct WorkerPool {
    jobs: Option<Sender<Job>>,
    threads: Vec<JoinHandle<()>>,
}

impl fmt::Debug for WorkerPool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WorkerPool").field("threads", &self.threads.len()).finish_non_exhaustive()
    }
}

/// Ends the process when it is dropped by a panic.
struct AbortOnPanic;

impl Drop for AbortOnPanic {
    fn drop(&mut self) {
        if thread::panicking() {
            // The panic's own message has been printed by now.
            std::process::abort();
        }
    }
}

impl WorkerPool {
    /// `threads` threads named `NAME-0`, `NAME-1`, ..; as many jobs again may wait.
    pub fn new(name: &str, threads: usize) -> Result<Self> {
        assert!(threads > 0, "a pool without threads never runs a job");
        let (jobs, taken) = bounded::<Job>(threads);
        let spawn = |index: usize| {
            let taken: Receiver<Job> = taken.clone();
            thread::Builder::new().name(format!("{name}-{index}")).spawn(move || {
                IN_POOL.set(true);
                for job in taken {
                    run(job);
                }
            })
        };
        let threads = (0..threads)
            .map(spawn)
            .collect::<std::io::Result<Vec<_>>>()
            .map_err(|error| Error::device("start a thread", &error))?;
        Ok(Self { jobs: Some(jobs), threads })
    }

    /// The pool of `limits::DEVICE_THREADS` threads.
    pub fn for_devices() -> Result<Self> {
        Self::new("device", crate::limits::DEVICE_THREADS)
    }

    /// Takes the job only if a thread or a place in the queue is free; whether it did.
    pub fn offer(&self, job: impl FnOnce() + Send + 'static) -> bool {
        let jobs = self.jobs.as_ref().expect("taken only by drop");
        jobs.try_send(Box::new(job)).is_ok()
    }

    pub fn submit(&self, job: impl FnOnce() + Send + 'static) {
        let jobs = self.jobs.as_ref().expect("taken only by drop");
        let job: Job = Box::new(job);
        if !IN_POOL.get() {
            jobs.send(job).expect("the threads outlive the sender");
            return;
        }
        match jobs.try_send(job) {
            Ok(()) => {}
            Err(TrySendError::Full(job)) => run(job),
            Err(TrySendError::Disconnected(_)) => unreachable!("the threads outlive the sender"),
        }
    }
}

fn run(job: Job) {
    let _guard = AbortOnPanic;
    job();
}

impl Drop for WorkerPool {
    fn drop(&mut self) {
        drop(self.jobs.take());
        let own = thread::current().id();
        for thread in self.threads.drain(..) {
            // A job may hold the last reference to its own pool; its thread ends by itself then.
            if thread.thread().id() != own {
                thread.join().expect("a panicking job has ended the process");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::ExitStatusExt;
    use std::process::Command;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn every_job_runs_before_the_pool_is_gone() {
        let count = Arc::new(AtomicUsize::new(0));
        let pool = WorkerPool::new("test", 3).expect("threads");
        for _ in 0..100 {
            let count = Arc::clone(&count);
            pool.submit(move || {
                count.fetch_add(1, Ordering::Relaxed);
            });
        }
        drop(pool);
        assert_eq!(count.load(Ordering::Relaxed), 100);
    }

    #[test]
    fn a_job_that_submits_more_than_fits_does_not_wait_for_itself() {
        let count = Arc::new(AtomicUsize::new(0));
        let pool = Arc::new(WorkerPool::new("test", 1).expect("threads"));
        let (inner, counter) = (Arc::clone(&pool), Arc::clone(&count));
        let (done, finished) = bounded(0);
        pool.submit(move || {
            for _ in 0..50 {
                let counter = Arc::clone(&counter);
                inner.submit(move || {
                    counter.fetch_add(1, Ordering::Relaxed);
                });
            }
            drop(inner);
            done.send(()).expect("the test waits");
        });
        finished.recv().expect("the job finished");
        drop(pool);
        assert_eq!(count.load(Ordering::Relaxed), 50);
    }

    #[test]
    fn a_panic_in_a_job_ends_the_process() {
        const CHILD: &str = "DUALRESTORE_TEST_PANIC_IN_A_JOB";
        if std::env::var_os(CHILD).is_some() {
            let pool = WorkerPool::new("test", 1).expect("threads");
            pool.submit(|| panic!("a job went wrong"));
            drop(pool);
            return;
        }
        let program = std::env::current_exe().expect("its own path");
        let ended = Command::new(program)
            .args(["--exact", "--nocapture"])
            .arg("device::pool::tests::a_panic_in_a_job_ends_the_process")
            .env(CHILD, "1")
            .output()
            .expect("started");
        assert_eq!(ended.status.signal(), Some(6), "{ended:?}");
        assert!(String::from_utf8_lossy(&ended.stderr).contains("a job went wrong"));
    }
}
