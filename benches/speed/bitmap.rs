//! Time to find runs, count and fill in a bitmap of 2^26 bits (256 GiB of 4 KiB blocks).

use criterion::{BatchSize, Criterion, Throughput};
use dualrestore::bitmap::Bitmap;
use dualrestore::extent::BlockRange;
use std::hint::black_box;

const BITS: u64 = 1 << 26;
const ALL: BlockRange = BlockRange::new(0, BITS);

/// A bitmap in which about one bit of `period` is set.
fn scattered(period: u64) -> Bitmap {
    let map = Bitmap::new(BITS, false);
    let mut steps = crate::scattered(2 * period - 1);
    let mut at = 0;
    while at < BITS {
        map.fill(BlockRange::one(at), true);
        at += 1 + steps.next().expect("endless");
    }
    map
}

pub fn scan(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("map scan");
    group.throughput(Throughput::Bytes(BITS / 8));
    for (name, map) in [
        ("uniform pages", Bitmap::new(BITS, false)),
        ("one bit of 1000", scattered(1000)),
        ("one bit of 20", scattered(20)),
    ] {
        group.bench_function(format!("runs, {name}"), |bencher| {
            bencher.iter(|| black_box(&map).runs(ALL, true).map(BlockRange::count).sum::<u64>());
        });
    }
    group.finish();
}

pub fn change(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("map change");
    let map = scattered(1000);
    group.bench_function("fill and clear 1 MiB of blocks amid others", |bencher| {
        let range = BlockRange::new(12_345, 12_345 + 256);
        bencher.iter(|| black_box(&map).fill(range, true) + black_box(&map).fill(range, false));
    });
    group.bench_function("fill everything", |bencher| {
        let fresh = || Bitmap::new(BITS, false);
        bencher.iter_batched(fresh, |map| map.fill(ALL, true), BatchSize::LargeInput);
    });
    group.bench_function("count across pages", |bencher| {
        let range = BlockRange::new(1_000, BITS - 1_000);
        bencher.iter(|| black_box(&map).count_set(range));
    });
    group.finish();
}
