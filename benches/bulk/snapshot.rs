//! What a snapshot costs the writes of a backup, on real files: no snapshot, first writes after
//! the cut, and writes to blocks that are preserved already.
//!
//! Operations arrive as the link brings them: whatever waits is one batch, and only so much is
//! under way without an answer. Each pass ends with a flush that is part of the time. The passes
//! of one repetition follow each other, so that their ratios mean something on a machine that
//! swings. For large writes there is a fourth one, *bare*: every MiB is read, written to another
//! file and overwritten, by four threads and with nothing else. It is what the disk allows.
//!
//! `cargo run --release -p dualrestore-benches --bin bulk_snapshot -- PLACE [MIB [TIMES [LOAD]]]`
//! where LOAD is the name of a load, or a part of several. `snapshot.py` runs it beside QEMU.

#![expect(clippy::disallowed_methods, reason = "a program of its own, not the core")]

use std::collections::VecDeque;
use std::io::Write;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use dualrestore::clock::MonotonicClock;
use dualrestore::device::{
    AlignedBuffer, Device, FileDevice, FileDirectory, OpenOptions, Payload, WorkerPool,
};
use dualrestore::snapshot::CutOrder;
use dualrestore::units::{BlockSize, Geometry};
use dualrestore::volume::backup::{Answer, BackupVolume, MirrorOperation};
use uuid::Uuid;

const MIB: u64 = 1 << 20;
const EPOCH: u64 = 1;

/// One kind of load.
struct Load {
    name: &'static str,
    direct: bool,
    /// Bytes of a write, and bytes without an answer at a time.
    bytes: u64,
    window: u64,
    random: bool,
    /// How much of the volume a pass writes.
    share: u64,
    /// Bytes written between two flushes; the end is always flushed.
    flush_every: u64,
}

const WHOLE: u64 = u64::MAX;

const LOADS: [Load; 6] = [
    load("4 KiB random, depth 32", true, 4096, 32 * 4096, true, 16, WHOLE),
    load("4 KiB random, depth 32, buffered", false, 4096, 32 * 4096, true, 16, WHOLE),
    load("4 KiB random, window 16 MiB", true, 4096, 16 * MIB, true, 16, WHOLE),
    load("4 KiB random, depth 32, flush each MiB", true, 4096, 32 * 4096, true, 16, MIB),
    load("1 MiB sequential", true, MIB, 16 * MIB, false, 1, WHOLE),
    load("1 MiB sequential, buffered", false, MIB, 16 * MIB, false, 1, WHOLE),
];

const fn load(
    name: &'static str,
    direct: bool,
    bytes: u64,
    window: u64,
    random: bool,
    share: u64,
    flush_every: u64,
) -> Load {
    Load { name, direct, bytes, window, random, share, flush_every }
}

/// Bytes that do not compress and repeat from run to run.
fn noise(bytes: u64) -> Vec<u8> {
    let mut state = 0x9E37_79B9_7F4A_7C15_u64;
    let mut all = Vec::with_capacity(bytes as usize);
    while (all.len() as u64) < bytes {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        all.extend_from_slice(&state.to_le_bytes());
    }
    all
}

struct Bench {
    mirror: Arc<dyn Device>,
    backup: BackupVolume,
    geometry: Geometry,
    content: Payload,
    sequence: u64,
    snapshots: u128,
}

impl Bench {
    fn new(top: &Path, bytes: u64, direct: bool) -> Self {
        let geometry = Geometry::new(bytes, BlockSize::DEFAULT).expect("a valid size");
        let options = OpenOptions { direct, create_size: Some(bytes), ..OpenOptions::default() };
        let device = FileDevice::open(top.join("mirror"), options).expect("a place for files");
        let device: Arc<dyn Device> = Arc::new(device);
        let content = Payload::copy_of(&noise(2 * MIB));
        for at in (0..bytes).step_by(MIB as usize) {
            device.write_at(at, &content[..MIB as usize]).expect("room for the volume");
        }
        device.flush().expect("flushed");
        let directory = FileDirectory::open(top.join("state"), false).expect("a place for state");
        let mirror = Arc::clone(&device);
        let backup = BackupVolume::create(Arc::new(directory), device, geometry, Uuid::nil())
            .expect("an empty place");
        backup.set_pool(&Arc::new(WorkerPool::for_devices().expect("threads")));
        backup.begin_session(EPOCH, 0).expect("the first session");
        Self { mirror, backup, geometry, content, sequence: 0, snapshots: 0 }
    }

    fn cut(&mut self) -> Uuid {
        self.snapshots += 1;
        let snapshot = Uuid::from_u128(self.snapshots);
        let order =
            CutOrder { snapshot, label: String::new(), created_ms: 0, selection: Vec::new() };
        self.backup.snapshot_now(&order).expect("cut");
        snapshot
    }

    /// The operations of a pass: every place once.
    fn operations(&mut self, load: &Load) -> VecDeque<MirrorOperation> {
        let places = self.geometry.size() / load.bytes;
        let count = places / load.share;
        let mut operations = VecDeque::with_capacity(count as usize + 2);
        let mut since_flush = 0;
        for index in 0..count {
            let place = if load.random { scrambled(index, places) } else { index };
            self.sequence += 1;
            let from = (place * 512 % MIB) / 4096 * 4096;
            let data = self.content.slice(from as usize, load.bytes as usize);
            let offset = place * load.bytes;
            operations.push_back(MirrorOperation::Write { sequence: self.sequence, offset, data });
            since_flush += load.bytes;
            if since_flush >= load.flush_every || index + 1 == count {
                self.sequence += 1;
                operations.push_back(MirrorOperation::Flush { sequence: self.sequence });
                since_flush = 0;
            }
        }
        operations
    }

    /// Seconds of the pass that only moves bytes.
    fn bare(&self, top: &Path, direct: bool) -> f64 {
        let size = self.geometry.size();
        let options = OpenOptions { direct, create_size: Some(size), ..OpenOptions::default() };
        let place = top.join("bare");
        let store = FileDevice::open(&place, options).expect("room for the old bytes");
        let next = AtomicU64::new(0);
        let clock = MonotonicClock::default();
        let began = clock.now();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    let mut old = AlignedBuffer::zeroed(MIB as usize);
                    loop {
                        let at = next.fetch_add(MIB, Ordering::Relaxed);
                        if at >= size {
                            return;
                        }
                        self.mirror.read_at(at, &mut old).expect("read");
                        store.write_at(at, &old).expect("kept");
                        let new = &self.content[..MIB as usize];
                        self.mirror.write_at(at, new).expect("written");
                    }
                });
            }
        });
        store.flush().and_then(|()| self.mirror.flush()).expect("flushed");
        let seconds = clock.now().since_ms(began) as f64 / 1000.0;
        std::fs::remove_file(place).expect("made above");
        seconds
    }

    /// Seconds until everything is applied and flushed.
    fn pass(&mut self, load: &Load) -> f64 {
        let operations = self.operations(load);
        let last = self.sequence;
        let clock = MonotonicClock::default();
        let began = clock.now();
        let link = Link::default();
        std::thread::scope(|scope| {
            scope.spawn(|| link.feed(operations, load.window));
            while link.applied() < last {
                let batch = link.arrived();
                for answer in self.backup.apply(EPOCH, batch).expect("well formed") {
                    link.answered(&answer);
                }
            }
        });
        clock.now().since_ms(began) as f64 / 1000.0
    }
}

/// Places in an order that looks random and visits each of `0..places`, a power of two, once.
fn scrambled(index: u64, places: u64) -> u64 {
    assert!(places.is_power_of_two(), "the volume is a power of two");
    let half = places.trailing_zeros().div_ceil(2);
    let mixed = index.wrapping_mul(0x9E37_79B9_7F4A_7C15) % places;
    (mixed ^ (mixed >> half)).wrapping_mul(0xD134_2543_DE82_EF95) % places
}

#[derive(Default)]
struct State {
    waiting: Vec<MirrorOperation>,
    /// Sequence and bytes of what has no answer yet.
    unanswered: VecDeque<(u64, u64)>,
    bytes: u64,
    applied: u64,
}

/// The mirror connection: a window of bytes without an answer.
#[derive(Default)]
struct Link {
    state: Mutex<State>,
    changed: Condvar,
}

impl Link {
    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(
        &self,
        guard: std::sync::MutexGuard<'a, State>,
        until: impl Fn(&State) -> bool,
    ) -> std::sync::MutexGuard<'a, State> {
        let waiting = |state: &mut State| !until(state);
        self.changed.wait_while(guard, waiting).unwrap_or_else(PoisonError::into_inner)
    }

    fn feed(&self, operations: VecDeque<MirrorOperation>, window: u64) {
        let mut state = self.lock();
        for operation in operations {
            let bytes = operation.overwrites().map_or(0, |range| range.length);
            let fits = |state: &State| state.bytes + bytes <= window;
            if !fits(&state) {
                state = self.wait(state, fits);
            }
            state.bytes += bytes;
            state.unanswered.push_back((operation.sequence(), bytes));
            state.waiting.push(operation);
            self.changed.notify_all();
        }
    }

    fn arrived(&self) -> Vec<MirrorOperation> {
        let mut state = self.wait(self.lock(), |state| !state.waiting.is_empty());
        std::mem::take(&mut state.waiting)
    }

    fn applied(&self) -> u64 {
        self.lock().applied
    }

    fn answered(&self, answer: &Answer) {
        let (Answer::Applied { through: sequence } | Answer::Flushed { sequence }) = answer else {
            panic!("the backup failed: {answer:?}")
        };
        let mut state = self.lock();
        state.applied = *sequence;
        while state.unanswered.front().is_some_and(|(held, _)| held <= sequence) {
            let (_, bytes) = state.unanswered.pop_front().expect("looked at");
            state.bytes -= bytes;
        }
        self.changed.notify_all();
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    values[values.len() / 2]
}

fn measure(top: &Path, mib: u64, times: usize, wanted: &str) -> std::io::Result<()> {
    let mut out = std::io::stdout();
    let named = LOADS.iter().any(|load| load.name == wanted);
    let is_wanted = |load: &&Load| match named {
        true => load.name == wanted,
        false => load.name.contains(wanted),
    };
    for load in LOADS.iter().filter(is_wanted) {
        let place = top.join("snapshot-benchmark");
        std::fs::create_dir(&place)?;
        let mut bench = Bench::new(&place, mib * MIB, load.direct);
        bench.pass(load);
        let mut rates: [Vec<f64>; 3] = Default::default();
        let mut ratios: [Vec<f64>; 2] = Default::default();
        let mut bare: [Vec<f64>; 2] = Default::default();
        let written = (mib * MIB / load.share) as f64 / MIB as f64;
        for _ in 0..times {
            let plain = bench.pass(load);
            let snapshot = bench.cut();
            let (first, later) = (bench.pass(load), bench.pass(load));
            bench.backup.snapshots().delete(snapshot).expect("deleted");
            for (rates, seconds) in rates.iter_mut().zip([plain, first, later]) {
                rates.push(written / seconds);
            }
            ratios[0].push(plain / first);
            ratios[1].push(plain / later);
            if load.bytes == MIB {
                let seconds = bench.bare(&place, load.direct);
                bare[0].push(written / seconds);
                bare[1].push(plain / seconds);
            }
        }
        drop(bench);
        std::fs::remove_dir_all(&place)?;
        let [plain, first, later] = rates.map(median);
        let [first_ratio, later_ratio] = ratios.map(median);
        writeln!(
            out,
            "{:40} MiB/s: none {plain:7.1}  first {first:7.1} ({first_ratio:.2})  \
             later {later:7.1} ({later_ratio:.2})",
            load.name
        )?;
        if load.bytes == MIB {
            let [rate, ratio] = bare.map(median);
            writeln!(out, "{:40} MiB/s: bare {rate:7.1} ({ratio:.2})", load.name)?;
        }
    }
    Ok(())
}

fn main() -> std::io::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let number = |at: usize, default: u64| {
        arguments.get(at).map_or(default, |text| text.parse().expect("a number"))
    };
    let top = arguments.first().map_or("/var/tmp", String::as_str);
    let wanted = arguments.get(3).map_or("", String::as_str);
    measure(Path::new(top), number(1, 512), number(2, 5) as usize, wanted)
}
