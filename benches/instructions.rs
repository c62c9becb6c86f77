//! The hot kernels, one per run, for counting instructions under callgrind (`instructions.py`).
//!
//! `instructions KERNEL` prepares fixed input, runs the kernel once inside `measured` (the only
//! function whose instructions are counted) and checks its answer. Without a name it runs all.

use dualrestore::bitmap::Bitmap;
use dualrestore::extent::BlockRange;
use std::hint::black_box;

const BITS: u64 = 1 << 20;
const ALL: BlockRange = BlockRange::new(0, BITS);

/// Everything counted happens in here. Not inlined, so that callgrind finds it by name.
#[inline(never)]
fn measured(kernel: &dyn Fn() -> u64) -> u64 {
    black_box(kernel())
}

fn every(period: u64) -> Bitmap {
    let map = Bitmap::new(BITS, false);
    for at in (0..BITS).step_by(usize::try_from(period).expect("small")) {
        map.fill(BlockRange::one(at), true);
    }
    map
}

fn sum_of_runs(map: &Bitmap) -> u64 {
    map.runs(ALL, true).map(BlockRange::count).sum()
}

struct Kernel {
    name: &'static str,
    run: fn() -> u64,
    expected: u64,
}

const KERNELS: &[Kernel] = &[
    Kernel {
        name: "bitmap_runs_sparse",
        run: || {
            let map = every(4096);
            measured(&|| sum_of_runs(&map))
        },
        expected: BITS / 4096,
    },
    Kernel {
        name: "bitmap_runs_alternating",
        run: || {
            let map = every(2);
            measured(&|| sum_of_runs(&map))
        },
        expected: BITS / 2,
    },
    Kernel {
        name: "bitmap_count",
        run: || {
            let map = every(3);
            measured(&|| (1..64).map(|at| map.count_set(BlockRange::new(at, 30_000))).sum())
        },
        expected: 629_307,
    },
    Kernel {
        name: "bitmap_fill",
        run: || {
            let map = every(4096);
            let range = |at: u64| BlockRange::new(at * 300 + 7, at * 300 + 263);
            measured(&|| (0..1000).map(|at| map.fill(range(at), true)).sum())
        },
        expected: 255_937,
    },
];

fn main() -> Result<(), String> {
    let wanted: Vec<String> = arguments();
    let chosen: Vec<&Kernel> = KERNELS
        .iter()
        .filter(|kernel| wanted.is_empty() || wanted.iter().any(|name| name == kernel.name))
        .collect();
    if chosen.is_empty() {
        return Err(format!("no kernel of {wanted:?}"));
    }
    for kernel in chosen {
        let found = (kernel.run)();
        if found != kernel.expected {
            return Err(format!("{}: expected {}, found {found}", kernel.name, kernel.expected));
        }
    }
    Ok(())
}

/// The names given; cargo adds options of its own.
#[expect(clippy::disallowed_methods, reason = "a program of its own, not the core")]
fn arguments() -> Vec<String> {
    std::env::args().skip(1).filter(|argument| !argument.starts_with("--")).collect()
}
