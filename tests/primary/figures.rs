//! Figures 3A and 3B of the method's description, step by step: six blocks, their overwrite map,
//! and both sides after each step. The numbers are those of the figures.
//!
//! The steps are a table, so that another backup than the model can go through them.

use dualrestore::extent::{BlockRange, ByteRange};
use dualrestore::units::{BlockSize, Geometry};

use crate::stage::{self, FLUSH};
use crate::world::World;
use dualrestore::sim::Value;
use dualrestore::sim::stamp::{self, SECTOR};

/// What happens at a step.
enum Happens {
    Nothing,
    /// A read of this location.
    Read(u64),
    /// Writes to these locations.
    Writes(&'static [(u64, &'static str)]),
    /// The snapshot copy is taken.
    Cut,
    /// What the snapshot copy holds is merged; these locations, and no others, are written.
    Merge(&'static [u64]),
}

struct Step {
    what: &'static str,
    happens: Happens,
    /// The overwrite map afterwards, and its number in the figure.
    map: (&'static str, u32),
    /// Primary and backup afterwards; a dash is a lost block.
    primary: &'static str,
    backup: &'static str,
}

const STEPS: [Step; 8] = [
    Step {
        what: "T0: everything is lost",
        happens: Happens::Nothing,
        map: ("000000", 372),
        primary: "- - - - - -",
        backup: "1 2 3 4 5 6",
    },
    Step {
        what: "read request 347 of location 1 is answered by data block 348",
        happens: Happens::Read(1),
        map: ("100000", 374),
        primary: "1 - - - - -",
        backup: "1 2 3 4 5 6",
    },
    Step {
        what: "data blocks 340",
        happens: Happens::Writes(&[(3, "3a"), (4, "4a")]),
        map: ("101100", 376),
        primary: "1 - 3a 4a - -",
        backup: "1 2 3a 4a 5 6",
    },
    Step {
        what: "data blocks 342",
        happens: Happens::Writes(&[(3, "3b"), (4, "4b"), (6, "6a")]),
        map: ("101101", 378),
        primary: "1 - 3b 4b - 6a",
        backup: "1 2 3b 4b 5 6a",
    },
    Step {
        what: "T1: the snapshot",
        happens: Happens::Cut,
        map: ("101101", 378),
        primary: "1 - 3b 4b - 6a",
        backup: "1 2 3b 4b 5 6a",
    },
    Step {
        what: "data blocks 344",
        happens: Happens::Writes(&[(1, "1a"), (3, "3c")]),
        map: ("101101", 378),
        primary: "1a - 3c 4b - 6a",
        backup: "1a 2 3c 4b 5 6a",
    },
    Step {
        what: "data blocks 346",
        happens: Happens::Writes(&[(1, "1b"), (4, "4c"), (6, "6b")]),
        map: ("101101", 378),
        primary: "1b - 3c 4c - 6b",
        backup: "1b 2 3c 4c 5 6b",
    },
    Step {
        what: "T2: the medium has arrived",
        happens: Happens::Merge(&[2, 5]),
        map: ("111111", 0),
        primary: "1b 2 3c 4c 5 6b",
        backup: "1b 2 3c 4c 5 6b",
    },
];

/// The snapshot copy 352, as it was at T1.
const BUNDLE: &str = "1 2 3b 4b 5 6a";

const NAMES: [&str; 11] = ["3a", "4a", "3b", "4b", "6a", "1a", "3c", "1b", "4c", "6b", "-"];

fn value(name: &str) -> Value {
    match name.parse::<u64>() {
        Ok(location) => stage::old(location - 1),
        Err(_) if name == "-" => stamp::GARBAGE,
        Err(_) => {
            1 + NAMES.iter().position(|held| *held == name).expect("a block of the figure") as u64
        }
    }
}

fn values(names: &str) -> Vec<Value> {
    names.split(' ').map(value).collect()
}

fn at(location: u64) -> ByteRange {
    ByteRange::new((location - 1) * SECTOR, SECTOR)
}

fn take(world: &mut World, step: &Step) {
    match step.happens {
        Happens::Nothing => {}
        Happens::Read(location) => {
            let id = world.read(at(location));
            world.settle();
            assert_eq!(world.found(id), [value("1")]);
        }
        Happens::Writes(writes) => {
            for (location, name) in writes {
                let id = world.write(at(*location), &[value(name)], false);
                world.settle();
                world.assert_ok(id);
            }
        }
        Happens::Cut => {
            let id = world.cut();
            world.settle();
            assert!(world.cuts[&id].is_ok());
            world.bundle.clone_from(&world.backup.cut);
        }
        Happens::Merge(locations) => {
            let claimed = world.merge(world.all()).expect("something is missing");
            let expected: Vec<_> = locations.iter().map(|at| BlockRange::one(at - 1)).collect();
            assert_eq!(claimed, expected);
            world.settle();
        }
    }
}

#[test]
fn figures_3a_and_3b_end_with_1b_2_3c_4c_5_6b_on_both_sides() {
    let sector = BlockSize::new(512).expect("a power of two");
    let geometry = Geometry::new(6 * SECTOR, sector).expect("valid");
    let mut world = stage::begin(geometry, (0..6).collect(), FLUSH);
    world.link_up();
    for step in &STEPS {
        take(&mut world, step);
        let bit = |block| if world.is_current(block) { '1' } else { '0' };
        let map: String = (0..6).map(bit).collect();
        let (expected, number) = step.map;
        assert_eq!(map, expected, "overwrite map {number} after: {}", step.what);
        let all = geometry.all_bytes();
        assert_eq!(world.here(all), values(step.primary), "primary after: {}", step.what);
        assert_eq!(world.there(all), values(step.backup), "backup after: {}", step.what);
    }
    let bundle = world.bundle.as_ref().expect("it was cut");
    let held: Vec<_> = bundle.chunks_exact(SECTOR as usize).map(stamp::value).collect();
    assert_eq!(held, values(BUNDLE));
    world.assert_mirrored();
}
