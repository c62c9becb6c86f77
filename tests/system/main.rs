//! The whole system in simulation: random lives under every mixture of faults.
//!
//! `DUALRESTORE_SEED=n` replays one life, `DUALRESTORE_LIVES=m` runs so many, from that seed on if
//! both are given.

#![expect(clippy::disallowed_methods, reason = "whoever hunts says how much and what")]
#![expect(clippy::print_stdout, reason = "how much was lived through is worth knowing")]

use std::ops::ControlFlow;

use dualrestore::sim::{Campaign, Report, replay, run};

const LIVES: u64 = 4000;

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

fn check(report: &Report) {
    if let Some(failure) = &report.failure {
        panic!(
            "DUALRESTORE_SEED={} fails: {}\nafter {} steps: {}\n{}",
            failure.seed,
            failure.words,
            failure.steps,
            failure.shortest,
            failure.history.join("\n")
        );
    }
}

#[test]
fn the_whole_system_keeps_the_laws_whatever_happens() {
    let (seed, lives) = (number("DUALRESTORE_SEED"), number("DUALRESTORE_LIVES"));
    if let (Some(seed), None) = (seed, lives) {
        check(&replay(seed, number("DUALRESTORE_STEPS")));
        return;
    }
    let campaign = Campaign {
        seed: seed.unwrap_or(1),
        lives: Some(lives.unwrap_or(LIVES)),
        milliseconds: None,
        threads: 2,
    };
    let report = run(&campaign, &mut |_| ControlFlow::Continue(()));
    check(&report);
    let per_life = report.milliseconds as f64 / report.lives as f64;
    println!("{} lives, {} operations, {per_life} ms each", report.lives, report.operations);
    for (name, count) in report.rare.iter() {
        println!("{count:>8} {name}");
    }
    assert_eq!(report.rare.missed(), [] as [&str; 0], "rare states that were never reached");
}
