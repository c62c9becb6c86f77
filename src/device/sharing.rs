//! Independent device operations done side by side by whoever has time: the caller, and threads of
//! a pool that are free.
//!
//! Guarantees: each item is done once, or not at all after one failed; `share` returns when all
//! that began have ended. A pool that is busy is not waited for, so work shared from inside a pool
//! cannot stand still, and others find threads of the pool free.
//! Does not know: what an item is.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use super::WorkerPool;
use crate::error::{Error, Result};

struct Shared<T, F> {
    work: F,
    state: Mutex<State<T>>,
    ended: Condvar,
}

struct State<T> {
    items: VecDeque<T>,
    under_way: usize,
    failure: Option<Error>,
}

impl<T, F: Fn(T) -> Result<()>> Shared<T, F> {
    fn lock(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does items until none is left.
    fn work(&self) {
        let mut state = self.lock();
        while let Some(item) = state.items.pop_front() {
            state.under_way += 1;
            drop(state);
            let done = (self.work)(item);
            state = self.lock();
            state.under_way -= 1;
            if let Err(error) = done {
                state.failure.get_or_insert(error);
                state.items.clear();
            }
        }
        if state.under_way == 0 {
            self.ended.notify_all();
        }
    }
}

/// Does `work` for each item, with at most `helpers` threads of the pool beside the caller; the
/// first failure, if any.
pub fn share<T: Send + 'static>(
    pool: Option<&WorkerPool>,
    helpers: usize,
    items: VecDeque<T>,
    work: impl Fn(T) -> Result<()> + Send + Sync + 'static,
) -> Result<()> {
    let helpers = helpers.min(items.len().saturating_sub(1));
    let state = State { items, under_way: 0, failure: None };
    let shared = Arc::new(Shared { work, state: Mutex::new(state), ended: Condvar::new() });
    if let Some(pool) = pool {
        for _ in 0..helpers {
            let shared = Arc::clone(&shared);
            if !pool.offer(move || shared.work()) {
                break;
            }
        }
    }
    shared.work();
    let waiting = |state: &mut State<T>| state.under_way > 0;
    let mut state =
        shared.ended.wait_while(shared.lock(), waiting).unwrap_or_else(PoisonError::into_inner);
    state.failure.take().map_or(Ok(()), Err)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn every_item_is_done_once_by_the_caller_and_its_helpers() {
        let pool = WorkerPool::new("test", 3).expect("threads");
        for (pool, helpers) in [(None, 3), (Some(&pool), 3), (Some(&pool), 0)] {
            let done: Arc<Vec<AtomicUsize>> = Arc::new((0..200).map(|_| 0.into()).collect());
            let counted = Arc::clone(&done);
            let work = move |item: usize| {
                counted[item].fetch_add(1, Ordering::Relaxed);
                Ok(())
            };
            share(pool, helpers, (0..200).collect(), work).expect("nothing fails");
            assert!(done.iter().all(|count| count.load(Ordering::Relaxed) == 1));
        }
    }

    #[test]
    fn a_failure_is_told_and_what_had_not_begun_is_left() {
        let begun = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&begun);
        let work = move |item: usize| {
            counted.fetch_add(1, Ordering::Relaxed);
            if item == 1 { Err(Error::usage("the second")) } else { Ok(()) }
        };
        let failed = share(None, 0, (0..10).collect(), work).expect_err("the second fails");
        assert!(failed.to_string().contains("the second"));
        assert_eq!(begun.load(Ordering::Relaxed), 2);
    }

    #[test]
    fn work_that_is_shared_from_a_job_of_a_full_pool_comes_to_its_end() {
        let pool = Arc::new(WorkerPool::new("test", 1).expect("threads"));
        let (sent, ended) = crossbeam_channel::bounded(1);
        let inner = Arc::clone(&pool);
        pool.submit(move || {
            let done = share(Some(&inner), 4, (0..100).collect(), |_: usize| Ok(()));
            drop(inner);
            sent.send(done).expect("the test waits");
        });
        ended.recv().expect("it ended").expect("nothing fails");
    }
}
