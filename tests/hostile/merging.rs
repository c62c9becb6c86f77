//! Power lost, and errors, at every moment while a bundle is merged into a device with its map,
//! and again while the merge is repeated.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use uuid::Uuid;

use dualrestore::bundle::Bundle;
use dualrestore::device::{
    CrashingDevice, Device, Fault, FaultPlan, FaultyDevice, FaultyFolder, Operation, Power,
    RamDevice, Strikes,
};
use dualrestore::error::Result;
use dualrestore::extent::{BlockRange, ByteRange};
use dualrestore::map::{MapIdentity, OverwriteMap};
use dualrestore::merge::{
    Claim, MergeReport, MergeTarget, OfflineTarget, Strand, TargetIdentity, run_all,
};
use dualrestore::units::{BlockSize, Cut, Geometry};

use crate::chance::Chance;
use crate::workshop::{BLOCK, GROUND, Made, Recipe, go_on, merge_options, open, thorough};

/// Blocks that the application wrote before the merge.
const NEWER: BlockRange = BlockRange::new(33, 36);

/// Commits after every second claim that is settled, so that power is lost in commits too.
struct Eager {
    inner: OfflineTarget,
    settled: AtomicU64,
}

impl MergeTarget for Eager {
    fn geometry(&self) -> Geometry {
        self.inner.geometry()
    }

    fn identity(&self) -> TargetIdentity {
        self.inner.identity()
    }

    fn bind(&self, volume: Uuid, cut: Cut) -> Result<()> {
        self.inner.bind(volume, cut)
    }

    fn wanted(&self, blocks: BlockRange) -> Vec<BlockRange> {
        self.inner.wanted(blocks)
    }

    fn in_doubt(&self, blocks: BlockRange) -> Vec<BlockRange> {
        self.inner.in_doubt(blocks)
    }

    fn device(&self) -> Arc<dyn Device> {
        self.inner.device()
    }

    fn claim(&self, blocks: BlockRange) -> Result<Claim> {
        self.inner.claim(blocks)
    }

    fn settle(&self, claim: Claim, result: &Result<()>) {
        self.inner.settle(claim, result);
        if self.settled.fetch_add(1, Ordering::Relaxed) % 2 == 1 {
            // An error here is met again by the commit at the end.
            let _met_again = self.inner.commit();
        }
    }

    fn commit(&self) -> Result<()> {
        self.inner.commit()
    }
}

fn identity(size: usize) -> MapIdentity {
    let geometry = Geometry::new(size as u64, BlockSize::DEFAULT).expect("valid");
    MapIdentity { volume: Uuid::from_u128(7), geometry, generation: 3 }
}

/// What the target must hold in the end: the bundle's bytes under those that are newer.
fn expected(made: &Made) -> Vec<u8> {
    let mut bytes = made.image.clone();
    bytes[NEWER.start as usize * BLOCK..NEWER.end as usize * BLOCK].fill(b'n');
    bytes
}

/// A device and its map, before a merge.
fn fresh(made: &Made) -> (Vec<u8>, Vec<u8>) {
    let mut device = vec![GROUND; made.image.len()];
    device[NEWER.start as usize * BLOCK..NEWER.end as usize * BLOCK].fill(b'n');
    let identity = identity(made.image.len());
    let room = Arc::new(RamDevice::new(OverwriteMap::bytes_needed(identity.geometry)));
    let map = OverwriteMap::create(Arc::clone(&room) as _, identity).expect("created");
    map.mark_current(NEWER);
    map.file().commit_all().expect("committed");
    (device, room.contents())
}

fn merge(
    device: Arc<dyn Device>,
    map: Arc<dyn Device>,
    bundles: &[&Bundle],
) -> Result<MergeReport> {
    let (map, _) = OverwriteMap::open(map, None)?;
    let inner = OfflineTarget::new(device, Arc::new(map))?;
    let target = Eager { inner, settled: AtomicU64::new(0) };
    let mut strands: Vec<Strand<'_>> = Vec::new();
    for (lane, source) in bundles.iter().enumerate() {
        strands.push(Strand { source: *source, target: &target, lane });
    }
    let mut report = run_all(&strands, &merge_options(), &mut go_on)?;
    match report.sources.iter_mut().find_map(|one| one.error.take()) {
        Some(error) => Err(error),
        None => Ok(report),
    }
}

/// A device and a map on one supply.
#[derive(Clone)]
struct Machine {
    device: Arc<CrashingDevice>,
    map: Arc<CrashingDevice>,
}

impl Machine {
    fn new((device, map): &(Vec<u8>, Vec<u8>), power: &Arc<Power>) -> Self {
        Self {
            device: Arc::new(CrashingDevice::from_bytes(device, Arc::clone(power))),
            map: Arc::new(CrashingDevice::from_bytes(map, Arc::clone(power))),
        }
    }

    fn merge(&self, bundles: &[&Bundle]) -> Result<MergeReport> {
        merge(Arc::clone(&self.device) as _, Arc::clone(&self.map) as _, bundles)
    }

    fn crash(&self, chooser: &mut dyn FnMut(usize) -> usize, power: &Arc<Power>) -> Self {
        Self {
            device: Arc::new(self.device.crash(&mut *chooser, Arc::clone(power))),
            map: Arc::new(self.map.crash(&mut *chooser, Arc::clone(power))),
        }
    }

    /// Law 2, after any crash: what the map calls current holds the right bytes.
    #[track_caller]
    fn check(&self, made: &Made, what: &str) {
        let copy = Arc::new(RamDevice::from_bytes(self.map.contents()));
        let (map, _) = OverwriteMap::open(copy, None).expect("a map survives any crash");
        let (bytes, right) = (self.device.contents(), expected(made));
        for run in map.current().runs(BlockRange::new(0, map.geometry().blocks()), true) {
            let span = map.geometry().bytes_of(run);
            let span = span.offset as usize..span.end() as usize;
            assert!(bytes[span.clone()] == right[span.clone()], "{what}: wrong bytes at {span:?}");
        }
    }

    #[track_caller]
    fn check_done(&self, made: &Made, bundles: &[&Bundle], what: &str) {
        let report = self.merge(bundles).expect("merged at last");
        self.check(made, what);
        assert_eq!(report.chunks_damaged, 0, "{what}");
        assert!(self.device.contents() == expected(made), "{what}: it is not complete");
        let again = self.merge(bundles).expect("merged once more");
        assert_eq!(again.bytes_written, 0, "{what}: a third run wrote");
    }
}

fn readable() -> Made {
    Recipe { unreadable: Vec::new(), ..Recipe::small() }.make()
}

type Choosers = Vec<Box<dyn FnMut(usize) -> usize>>;

fn choosers(seed: u64, chances: usize) -> Choosers {
    let mut all: Choosers = vec![Box::new(|_| 0), Box::new(|most| most)];
    for round in 0..chances {
        let mut chance = Chance::new(seed * 100 + round as u64 + 1);
        all.push(Box::new(move |most| chance.below(most + 1)));
    }
    all
}

#[test]
fn power_lost_at_any_moment_of_a_merge_costs_nothing_but_time() {
    let made = readable();
    let bundle = open(&made.folder).expect("whole");
    let before = fresh(&made);
    let steady = Power::steady();
    Machine::new(&before, &steady).check_done(&made, &[&bundle], "without a crash");
    let counted = Power::steady();
    Machine::new(&before, &counted).merge(&[&bundle]).expect("merged");
    for event in 0..counted.events() {
        let machine = Machine::new(&before, &Power::failing_at(event, true));
        machine.merge(&[&bundle]).expect_err("the power went out");
        for (number, mut chooser) in choosers(event, 4).into_iter().enumerate() {
            let what = format!("power lost at event {event}, choice {number}");
            let survivor = machine.crash(&mut chooser, &Power::steady());
            survivor.check(&made, &what);
            survivor.check_done(&made, &[&bundle], &what);
        }
    }
}

/// Two media of the same bundle that share a chunk, and one with all of it.
fn media(made: &Made) -> Vec<Bundle> {
    let (size, middle) = (made.image.len() as u64, 128 << 10);
    [(0, middle), (middle / 2, size), (0, size)]
        .into_iter()
        .map(|(start, end)| {
            let selection = vec![ByteRange::new(start, end - start)];
            let recipe = Recipe { selection, unreadable: Vec::new(), ..Recipe::small() };
            open(&recipe.make().folder).expect("whole")
        })
        .collect()
}

#[test]
fn power_lost_at_any_moment_while_media_are_merged_side_by_side_costs_nothing_but_time() {
    let made = readable();
    let media = media(&made);
    for count in [2, 3] {
        let bundles: Vec<&Bundle> = media[..count].iter().collect();
        let before = fresh(&made);
        let steady = Power::steady();
        Machine::new(&before, &steady).check_done(&made, &bundles, "without a crash");
        let counted = Power::steady();
        Machine::new(&before, &counted).merge(&bundles).expect("merged");
        for event in 0..counted.events() {
            let machine = Machine::new(&before, &Power::failing_at(event, true));
            // Threads may have taken fewer steps than when they were counted.
            let _power_went_out = machine.merge(&bundles);
            for (number, mut chooser) in choosers(event, 2).into_iter().enumerate() {
                let what = format!("{count} media, power lost at event {event}, choice {number}");
                let survivor = machine.crash(&mut chooser, &Power::steady());
                survivor.check(&made, &what);
                survivor.check_done(&made, &bundles, &what);
            }
        }
    }
}

#[test]
fn power_lost_again_while_a_merge_is_repeated_costs_nothing_but_time() {
    let made = readable();
    let bundle = open(&made.folder).expect("whole");
    let before = fresh(&made);
    let counted = Power::steady();
    Machine::new(&before, &counted).merge(&[&bundle]).expect("merged");
    let step = if thorough() { 1 } else { 2 };
    for first in (0..counted.events()).step_by(step) {
        let machine = Machine::new(&before, &Power::failing_at(first, true));
        machine.merge(&[&bundle]).expect_err("the power went out");
        for second in (first % step as u64..counted.events()).step_by(step) {
            let mut chance = Chance::new(first * 1000 + second + 1);
            let again = Power::failing_at(second, true);
            let survivor = machine.crash(&mut |most| chance.below(most + 1), &again);
            if survivor.merge(&[&bundle]).is_ok() {
                break;
            }
            let last = survivor.crash(&mut |most| chance.below(most + 1), &Power::steady());
            let what = format!("power lost at event {first}, and again at {second}");
            last.check(&made, &what);
            last.check_done(&made, &[&bundle], &what);
        }
    }
}

#[test]
fn an_error_at_any_operation_of_target_or_map_is_told_and_a_second_run_completes() {
    let made = readable();
    let bundle = open(&made.folder).expect("whole");
    let before = fresh(&made);
    let faults = [
        (Operation::Write, 5),
        (Operation::Write, 28),
        (Operation::Zero, 28),
        (Operation::Flush, 5),
        (Operation::Read, 5),
    ];
    for (operation, errno) in faults {
        for on_map in [false, true] {
            for at in 0.. {
                let (device, map) = before.clone();
                let plan = FaultPlan::new();
                let faulty = |bytes: Vec<u8>, plan: &FaultPlan| {
                    Arc::new(FaultyDevice::new(RamDevice::from_bytes(bytes), plan.clone()))
                };
                let none = FaultPlan::new();
                let device = faulty(device, if on_map { &none } else { &plan });
                let map = faulty(map, if on_map { &plan } else { &none });
                let fault = Fault::once(operation, errno).striking(Strikes::After(at));
                plan.add(Fault { done_before: 512, ..fault });
                let merged = merge(Arc::clone(&device) as _, Arc::clone(&map) as _, &[&bundle]);
                if plan.struck() == 0 {
                    merged.expect("nothing failed");
                    break;
                }
                let what = format!("{operation:?} {at} fails with {errno}, on the map: {on_map}");
                assert!(merged.is_err(), "{what}: nothing is said of it");
                let after = (device.inner().contents(), map.inner().contents());
                let machine = Machine::new(&after, &Power::steady());
                machine.check(&made, &what);
                machine.check_done(&made, &[&bundle], &what);
            }
        }
    }
}

#[test]
fn a_medium_that_fails_at_any_read_costs_that_chunk_until_it_is_read_again() {
    let made = Recipe { unreadable: Vec::new(), ..Recipe::large(1, 5) }.make();
    for at in 0.. {
        let plan = FaultPlan::new();
        let folder = FaultyFolder::new(Arc::new(made.folder.clone()), plan.clone());
        plan.add(Fault::once(Operation::Read, 5).striking(Strikes::After(at)));
        let machine = Machine::new(&fresh(&made), &Power::steady());
        let merged =
            Bundle::open_in(Arc::new(folder.clone())).and_then(|bundle| machine.merge(&[&bundle]));
        if plan.struck() == 0 {
            assert_eq!(merged.expect("nothing failed").chunks_damaged, 0);
            assert!(at > 10, "several reads were tried");
            break;
        }
        let what = format!("read {at} fails");
        machine.check(&made, &what);
        if let Ok(report) = merged {
            let lost: u64 = report.damaged.iter().map(|range| range.length).sum();
            let newer = NEWER.count() * BLOCK as u64;
            let all = made.image.len() as u64;
            assert!(report.bytes_written + lost + newer >= all, "{what}: {report:?}");
        }
        let bundle = Bundle::open_in(Arc::new(folder)).expect("it can be read now");
        machine.check_done(&made, &[&bundle], &what);
    }
}
