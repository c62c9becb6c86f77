//! What a life begins with, and its own mixture of what may happen.
//!
//! Guarantees: the seed decides everything. Does not know: how anything happens.

use super::chance::Chance;
use super::stamp::SECTOR;
use super::steps::STEPS;
use crate::units::{BlockSize, Geometry, MIB};
use crate::volume::primary::{LagBound, MirrorPolicy, Options};

/// The first bit of a map page that lies in the second sector of its slot.
const PAGE_BREAK: u64 = (512 - 64) * 8;

/// How both sides begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Beginning {
    /// The daemons have made both disks.
    BothEmpty,
    /// The primary's machine is new, the backup is the truth.
    Lost,
    /// The primary is the truth, the backup is new.
    Unsent,
}

/// See the module.
#[derive(Clone, Debug)]
pub struct Setting {
    pub beginning: Beginning,
    pub geometry: Geometry,
    pub options: Options,
    /// Sectors that requests may name; the others are zero throughout.
    pub window: Vec<u64>,
    /// How many of these most requests begin at.
    pub busy: usize,
    /// Reads and writes of the primary's disk count as quick.
    pub quick_disks: bool,
    /// Room for old bytes at the backup, where it is scarce.
    pub store_bytes: Option<u64>,
    /// Bundles are written and read as the product does; else they are what it would read.
    pub real_bundles: bool,
    /// Some bundles lose bits on their way.
    pub rotten_bundles: bool,
    /// Of eight steps of the works, how many look at jobs first.
    pub jobs_first: u64,
    /// How much happens by itself between two steps, at the most.
    pub works_max: u64,
    /// How likely each step of `STEPS` is.
    pub weights: Vec<u64>,
    /// Kinds of requests: read, write, zeroes, trim, cache, flush.
    pub requests: [u64; 6],
    pub steps: u64,
}

fn geometry(chance: &mut Chance) -> Geometry {
    let small = SECTOR * (3 + chance.below(22));
    let block = chance.pick(&[512, 1024, 1024, 2048, 4096]);
    // Seldom more than one hot extent, or a map page whose bits lie in several sectors, which a
    // crash can tear: those volumes are slower to go through.
    let (size, block) = match chance.below(32) {
        0 => (MIB + chance.below(6) * SECTOR + SECTOR, block << 6),
        1 => (2 * MIB + chance.below(6) * SECTOR + SECTOR, 512),
        _ => (small, block),
    };
    Geometry::new(size, BlockSize::new(block).expect("a power of two")).expect("valid")
}

fn window(geometry: Geometry) -> Vec<u64> {
    let sectors = geometry.size() / SECTOR;
    let border = MIB / SECTOR;
    match sectors {
        0..64 => (0..sectors).collect(),
        // The beginning, where the second hot extent begins, the end.
        _ if geometry.block_size().bytes() > 512 => (0..6).chain(border - 8..sectors).collect(),
        // And where the second sector of a map page begins.
        _ => [0..4, border - 2..border + 2, PAGE_BREAK - 3..PAGE_BREAK + 3, 2 * border..sectors]
            .into_iter()
            .flatten()
            .collect(),
    }
}

impl Setting {
    pub fn new(chance: &mut Chance) -> Self {
        let geometry = geometry(chance);
        let beginning = match chance.below(8) {
            0..2 => Beginning::BothEmpty,
            2 => Beginning::Unsent,
            _ => Beginning::Lost,
        };
        let policy = chance.pick(&[
            MirrorPolicy::Flush,
            MirrorPolicy::Flush,
            MirrorPolicy::Write,
            MirrorPolicy::Async(LagBound { bytes: 1 << 20, ms: 5_000 }),
        ]);
        // Harm is rarer in some lives: else nothing ever comes to its end.
        let roughness = chance.pick(&[1, 3, 10]);
        let weights = STEPS.map(|(step, weight, lives)| {
            let has = chance.below(8) < lives;
            let scale = 1 + chance.below(4);
            let often = if step.is_harm() { roughness } else { 10 };
            if has { weight * scale * often } else { 0 }
        });
        let mut requests = [30, 40, 8, 8, 3, 12].map(|weight| weight * chance.below(3));
        requests[1] += 1;
        let window = window(geometry);
        let busy = 1 + chance.index(window.len());
        Self {
            beginning,
            window,
            busy,
            geometry,
            options: Options {
                policy,
                backup: true,
                strict: chance.one_in(5),
                missing_deadline_ms: chance.pick(&[300, 5_000, 1_000_000]),
            },
            quick_disks: chance.one_in(2),
            store_bytes: chance.one_in(6).then(|| 180_000 + chance.below(300_000)),
            real_bundles: chance.one_in(64),
            rotten_bundles: chance.one_in(4),
            jobs_first: 1 + chance.below(7),
            works_max: chance.pick(&[8, 24, 24, 60]),
            weights: weights.to_vec(),
            requests,
            steps: 20 + chance.below(360),
        }
    }
}
