//! Every target for a moment, the same inputs each time: the corpus, then mutations of it.

#![expect(clippy::disallowed_methods, reason = "the corpus is read; a variable asks for more")]

use std::path::Path;

use dualrestore_fuzz::{Mutator, TARGETS, Target};

const ROUNDS: usize = 600;

fn corpus(target: &Target) -> Vec<Vec<u8>> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target.name);
    let mut paths: Vec<_> = std::fs::read_dir(&directory)
        .expect("each target has a corpus")
        .map(|entry| entry.expect("listed").path())
        .collect();
    paths.sort();
    paths.iter().map(|path| std::fs::read(path).expect("read")).collect()
}

fn words(target: &Target) -> Vec<Vec<u8>> {
    let name = format!("dictionaries/{}.dict", target.name);
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(name);
    Mutator::words_of(&std::fs::read_to_string(path).expect("each target has a dictionary"))
}

fn run(name: &str) {
    let target = TARGETS.iter().find(|target| target.name == name).expect("a target");
    let mut seeds = (target.seeds)();
    seeds.extend(corpus(target));
    for seed in &seeds {
        (target.run)(seed);
    }
    let rounds = std::env::var("DUALRESTORE_FUZZ_ROUNDS");
    let rounds = rounds.map_or(ROUNDS, |text| text.parse().expect("a number of rounds"));
    let mut mutator = Mutator::new(1, words(target));
    for _ in 0..rounds {
        (target.run)(&mutator.mutated(&seeds, target.length_max));
    }
}

#[test]
fn no_client_breaks_an_nbd_session() {
    run("nbd");
}

#[test]
fn no_nbd_server_breaks_a_client() {
    run("nbd_client");
}

#[test]
fn no_backup_breaks_a_primary() {
    run("link_primary");
}

#[test]
fn no_primary_breaks_a_backup() {
    run("link_backup");
}

#[test]
fn no_segment_breaks_its_reader() {
    run("bundle_segment");
}

#[test]
fn no_manifest_breaks_its_parser() {
    run("bundle_manifest");
}

#[test]
fn no_map_breaks_its_owner() {
    run("map");
}

#[test]
fn no_intent_log_breaks_its_owner() {
    run("intent_log");
}

#[test]
fn no_catalogue_breaks_its_owner() {
    run("catalogue");
}

#[test]
fn each_target_is_run_here() {
    let names: Vec<&str> = TARGETS.iter().map(|target| target.name).collect();
    let run = [
        "nbd",
        "nbd_client",
        "link_primary",
        "link_backup",
        "bundle_segment",
        "bundle_manifest",
        "map",
        "intent_log",
        "catalogue",
    ];
    assert_eq!(names, run);
}
