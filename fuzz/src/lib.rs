//! Fuzz targets: one function for each parser of bytes from outside, what each begins from, and a
//! mutator that needs no instrumentation.
//!
//! Guarantees: a target panics only if the parser behind it has a fault. Where bytes carry
//! checksums, the first byte of the input says whether they are made right before they are parsed
//! (odd) or left as they are (even): else no mutated byte would get past the checksums.

mod bundle;
mod link;
mod mutation;
mod nbd;
#[path = "../../tests/nbd/ram_service.rs"]
pub mod ram_service;
#[path = "../../tests/hostile/seals.rs"]
pub mod seals;
#[path = "../../tests/nbd/session_driver.rs"]
pub mod session_driver;
mod state;
#[path = "../../tests/nbd/wire.rs"]
pub mod wire;

pub use bundle::{bundle_manifest, bundle_segment};
pub use link::{link_backup, link_primary};
pub use mutation::Mutator;
pub use nbd::{nbd, nbd_client};
pub use state::{catalogue, intent_log, map};

/// A parser to be tried.
#[derive(Clone, Copy)]
pub struct Target {
    pub name: &'static str,
    pub run: fn(&[u8]),
    /// Good inputs to begin from.
    pub seeds: fn() -> Vec<Vec<u8>>,
    /// Inputs are not longer than this.
    pub length_max: usize,
}

/// All of them.
pub const TARGETS: [Target; 9] = [
    Target { name: "nbd", run: nbd, seeds: nbd::seeds, length_max: 64 << 10 },
    Target { name: "nbd_client", run: nbd_client, seeds: nbd::client_seeds, length_max: 64 << 10 },
    Target { name: "link_primary", run: link_primary, seeds: link::seeds, length_max: 64 << 10 },
    Target { name: "link_backup", run: link_backup, seeds: link::seeds, length_max: 64 << 10 },
    Target {
        name: "bundle_segment",
        run: bundle_segment,
        seeds: bundle::segment_seeds,
        length_max: 256 << 10,
    },
    Target {
        name: "bundle_manifest",
        run: bundle_manifest,
        seeds: bundle::manifest_seeds,
        length_max: 16 << 10,
    },
    Target { name: "map", run: map, seeds: state::map_seeds, length_max: 256 << 10 },
    Target {
        name: "intent_log",
        run: intent_log,
        seeds: state::intent_seeds,
        length_max: 16 << 10,
    },
    Target {
        name: "catalogue",
        run: catalogue,
        seeds: state::catalogue_seeds,
        length_max: 16 << 10,
    },
];

/// The mode byte and the rest; `None` of an empty input.
fn modes(bytes: &[u8]) -> Option<(bool, &[u8])> {
    let (mode, rest) = bytes.split_first()?;
    Some((mode % 2 == 1, rest))
}

/// Seeds for both modes.
fn both_modes(seeds: &[Vec<u8>]) -> Vec<Vec<u8>> {
    let with = |mode: u8| seeds.iter().map(move |seed| [&[mode], &seed[..]].concat());
    with(0).chain(with(1)).collect()
}
