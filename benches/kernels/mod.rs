//! The hot kernels: bitmaps and maps (`maps.rs`), the link's frames and NBD requests (`wire.rs`).

mod maps;
mod wire;

use crate::Kernel;

pub const KERNELS: &[Kernel] = &[
    Kernel { name: "bitmap_runs_sparse", run: maps::runs_sparse, expected: 256 },
    Kernel { name: "bitmap_runs_alternating", run: maps::runs_alternating, expected: 524_288 },
    Kernel { name: "bitmap_count", run: maps::count, expected: 629_307 },
    Kernel { name: "bitmap_fill", run: maps::fill, expected: 255_937 },
    Kernel { name: "merge_filter", run: maps::merge_filter, expected: 524_224 },
    Kernel { name: "page_commit", run: maps::page_commit, expected: 66 },
    Kernel { name: "frame_encode", run: wire::frame_encode, expected: 412_800 },
    Kernel { name: "frame_decode", run: wire::frame_decode, expected: 409_600 },
    Kernel { name: "frame_decode_small", run: wire::frame_decode_small, expected: 5_050 },
    Kernel { name: "nbd_requests", run: wire::nbd_requests, expected: 100 },
];
