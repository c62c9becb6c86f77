//! Random lives of a volume. `DUALRESTORE_SEED=n` replays one, `DUALRESTORE_LIVES=m` runs so many,
//! from that seed on if both are given.

#![expect(clippy::disallowed_methods, reason = "whoever hunts says how much and what")]

use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;

use crate::schedule::Life;
use crate::world::Trace;

const LIVES: u64 = 1_500;

/// Lives through a seed, or only its first steps and the end; returns what went wrong.
fn live(seed: u64, steps_max: u64, trace: &Trace) -> Result<u64, String> {
    let lived = catch_unwind(AssertUnwindSafe(|| {
        let mut life = Life::new(seed, Rc::clone(trace));
        let steps = life.steps().min(steps_max);
        for _ in 0..steps {
            life.step();
        }
        life.end();
        steps
    }));
    lived.map_err(|panic| {
        let words = panic.downcast_ref::<String>().cloned();
        words
            .or_else(|| panic.downcast_ref::<&str>().map(|words| (*words).to_owned()))
            .unwrap_or_else(|| "no words".to_owned())
    })
}

/// The shortest beginning of a failing life that fails as well, and what happens in it.
fn explain(seed: u64, words: &str) -> String {
    let trace: Trace = Rc::new(RefCell::new(None));
    let shortest = (0..400).find(|steps| live(seed, *steps, &trace).is_err()).unwrap_or(u64::MAX);
    let trace: Trace = Rc::new(RefCell::new(Some(Vec::new())));
    let again = live(seed, shortest, &trace).expect_err("a seed decides everything");
    let lines = trace.borrow_mut().take().unwrap_or_default();
    format!(
        "DUALRESTORE_SEED={seed} fails: {words}\nafter {shortest} steps: {again}\n{}",
        lines.join("\n")
    )
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

#[test]
fn a_primary_answers_and_ends_as_the_oracle_allows_whatever_happens() {
    let silent: Trace = Rc::new(RefCell::new(None));
    let (seed, lives) = (number("DUALRESTORE_SEED"), number("DUALRESTORE_LIVES"));
    let first = seed.unwrap_or(1);
    let lives = lives.unwrap_or(if seed.is_some() { 1 } else { LIVES });
    for seed in first..first + lives {
        if let Err(words) = live(seed, u64::MAX, &silent) {
            panic!("{}", explain(seed, &words));
        }
    }
}
