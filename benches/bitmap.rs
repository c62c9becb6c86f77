//! Time to find runs, count and fill in a bitmap of 2^26 bits (256 GiB of 4 KiB blocks).

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use dualrestore::bitmap::Bitmap;
use dualrestore::extent::BlockRange;
use std::hint::black_box;

const BITS: u64 = 1 << 26;
const ALL: BlockRange = BlockRange::new(0, BITS);

/// A bitmap in which about one bit of `period` is set, at places that repeat from run to run.
fn scattered(period: u64) -> Bitmap {
    let map = Bitmap::new(BITS, false);
    let mut state = 0x9E37_79B9_7F4A_7C15_u64;
    let mut at = 0;
    while at < BITS {
        map.fill(BlockRange::one(at), true);
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963);
        at += 1 + (state >> 33) % (2 * period - 1);
    }
    map
}

fn scan(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("bitmap scan");
    group.throughput(Throughput::Bytes(BITS / 8));
    for (name, map) in [
        ("uniform pages", Bitmap::new(BITS, false)),
        ("one bit of 1000", scattered(1000)),
        ("one bit of 2", scattered(2)),
    ] {
        group.bench_function(format!("runs, {name}"), |bencher| {
            bencher.iter(|| black_box(&map).runs(ALL, true).map(BlockRange::count).sum::<u64>());
        });
    }
    group.finish();
}

fn change(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("bitmap change");
    group.bench_function("fill and clear 1 MiB of blocks amid others", |bencher| {
        let map = scattered(1000);
        let range = BlockRange::new(12_345, 12_345 + 256);
        bencher.iter(|| black_box(&map).fill(range, true) + black_box(&map).fill(range, false));
    });
    group.bench_function("fill everything", |bencher| {
        let fresh = || Bitmap::new(BITS, false);
        bencher.iter_batched(fresh, |map| map.fill(ALL, true), BatchSize::LargeInput);
    });
    group.bench_function("count across pages", |bencher| {
        let map = scattered(1000);
        let range = BlockRange::new(1_000, BITS - 1_000);
        bencher.iter(|| black_box(&map).count_set(range));
    });
    group.finish();
}

criterion_group!(benches, scan, change);
criterion_main!(benches);
