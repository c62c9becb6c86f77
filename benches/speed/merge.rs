//! Merge of a bundle and of a raw image into a device with a map, half of which is current.

use std::ops::ControlFlow;
use std::sync::Arc;

use criterion::{BatchSize, Criterion, Throughput};
use dualrestore::bundle::{Bundle, BundleWriter, ImageSource, WriterOptions};
use dualrestore::device::{RamDevice, RamFolder};
use dualrestore::extent::BlockRange;
use dualrestore::map::{MapIdentity, OverwriteMap};
use dualrestore::merge::{ImagePieces, MergeOptions, MergeSource, OfflineTarget, run};
use dualrestore::units::BlockSize;
use uuid::Uuid;

use crate::{BLOCK, VOLUME_BYTES, geometry, noise};

fn bundle(image: &Arc<RamDevice>) -> Bundle {
    let folder = RamFolder::new();
    let source = ImageSource::new(Arc::clone(image) as _, BlockSize::DEFAULT).expect("an image");
    BundleWriter::create_in(&folder, &source, &WriterOptions::default(), &mut |_| {
        ControlFlow::Continue(())
    })
    .expect("memory does not fail");
    Bundle::open_in(Arc::new(folder)).expect("just written")
}

/// Every other MiB is current already.
fn target() -> OfflineTarget {
    let geometry = geometry();
    let map = Arc::new(RamDevice::new(OverwriteMap::bytes_needed(geometry)));
    let identity = MapIdentity { volume: Uuid::nil(), geometry, generation: 0 };
    let map = OverwriteMap::create(map, identity).expect("memory does not fail");
    let run = (1 << 20) / BLOCK;
    for start in (0..geometry.blocks()).step_by(2 * run as usize) {
        map.mark_current(BlockRange::new(start, start + run));
    }
    OfflineTarget::new(Arc::new(RamDevice::new(VOLUME_BYTES)), Arc::new(map)).expect("large enough")
}

pub fn merge(criterion: &mut Criterion) {
    let image = Arc::new(RamDevice::from_bytes(noise(VOLUME_BYTES)));
    let sources: [(&str, Box<dyn MergeSource>); 2] = [
        ("a bundle", Box::new(bundle(&image))),
        ("a raw image", Box::new(ImagePieces::new(Arc::clone(&image) as _).expect("an image"))),
    ];
    let mut group = criterion.benchmark_group("merge into a half current volume");
    group.throughput(Throughput::Bytes(VOLUME_BYTES / 2)).sample_size(20);
    for (name, source) in &sources {
        group.bench_function(*name, |bencher| {
            let merged = |target: OfflineTarget| {
                let report = run(source.as_ref(), &target, &MergeOptions::default(), &mut |_| {
                    ControlFlow::Continue(())
                })
                .expect("memory does not fail");
                assert_eq!(report.bytes_written, VOLUME_BYTES / 2);
                target
            };
            bencher.iter_batched(target, merged, BatchSize::PerIteration);
        });
    }
    group.finish();
}
