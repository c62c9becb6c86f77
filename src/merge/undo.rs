//! Keeps what an offline merge overwrites, and puts it back.
//!
//! | step of a merge that keeps | a crash before the next leaves |
//! |---|---|
//! | old bytes into the store, durable | bytes that no map names |
//! | their bits into the kept map, durable | bytes that are there twice |
//! | the target is overwritten | |
//!
//! | step of putting back | a crash before the next leaves |
//! |---|---|
//! | a replica takes its newest cut only, durable | a target to be put back again |
//! | kept blocks become missing in the target's map, durable | the same |
//! | old bytes into the target, durable | the state before the merge |
//!
//! The files are those of a snapshot: a store with old bytes at the volume's own offsets, and a map
//! of role 3. Guarantees: each block is kept once, as it was before the first merge.
//! Does not know: who else wrote to the target since.

use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use super::target::{MergeTarget, OfflineTarget};
use crate::device::{AlignedBuffer, Device, FileDevice, OpenOptions};
use crate::error::{Error, Result};
use crate::extent::{BlockRange, ByteRange, subtract};
use crate::limits::COPY_BYTES;
use crate::map::{MapFile, MapIdentity, MapRole};
use crate::units::{CutSpan, Geometry};

const KEPT: usize = 0;

/// Old bytes, and which blocks they are of.
#[derive(Debug)]
pub struct Undo {
    store: Arc<dyn Device>,
    map: MapFile,
    geometry: Geometry,
    commits: Mutex<Commits>,
    committed: Condvar,
}

/// Blocks kept by several threads become durable together.
#[derive(Debug, Default)]
struct Commits {
    asked: u64,
    done: u64,
    busy: bool,
    failed: Option<Error>,
}

impl Undo {
    /// Files at `path` and `path` with `.map` after it, new or of an earlier merge into the same
    /// target.
    pub fn open(path: &Path, target: MapIdentity) -> Result<Self> {
        let mut map_path = path.as_os_str().to_owned();
        map_path.push(".map");
        let map_path = Path::new(&map_path);
        if path.exists() != map_path.exists() {
            return Err(Error::usage(format!(
                "expected a new place for what is overwritten, or {} with {} beside it, found one \
                 of them: bring the other back, or name another file",
                path.display(),
                map_path.display()
            )));
        }
        let known = path.exists();
        let open = |path: &Path, size| {
            let options =
                OpenOptions { create_size: Some(size), lock: true, ..OpenOptions::default() };
            FileDevice::open(path, options)
        };
        let map_size = MapFile::bytes_needed(target.geometry, MapRole::Preserved);
        let map = Arc::new(open(map_path, map_size)?);
        let store = Arc::new(open(path, target.geometry.size())?);
        let map = match known {
            true => MapFile::open(map, MapRole::Preserved),
            false => MapFile::create(map, target, MapRole::Preserved),
        };
        Self::assemble(store, map.map_err(|error| error.at_path(map_path))?, target)
            .map_err(|error| error.at_path(path))
    }

    fn assemble(store: Arc<dyn Device>, map: MapFile, target: MapIdentity) -> Result<Self> {
        let held = map.identity();
        // A map that was bound to no volume may have been bound by the very merge that kept this.
        let foreign = held.volume != target.volume && !held.volume.is_nil();
        if held.geometry != target.geometry || foreign {
            return Err(Error::identity(format!(
                "expected what was kept of volume {} of {} bytes, found volume {} of {} bytes: \
                 name another file",
                target.volume,
                target.geometry.size(),
                held.volume,
                held.geometry.size()
            )));
        }
        let geometry = target.geometry;
        Ok(Self { store, map, geometry, commits: Mutex::default(), committed: Condvar::new() })
    }

    fn commits(&self) -> MutexGuard<'_, Commits> {
        self.commits.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps the bytes that `device` holds there, unless they are kept already. Durable when it
    /// returns.
    pub(super) fn keep(&self, device: &dyn Device, runs: &[BlockRange]) -> Result<()> {
        let kept = self.map.plane(KEPT);
        let new: Vec<BlockRange> =
            runs.iter().flat_map(|run| subtract(*run, kept.runs(*run, true))).collect();
        for run in &new {
            copy(device, &*self.store, self.geometry.bytes_of(*run), Zeros::AreThere)?;
        }
        if new.is_empty() {
            return Ok(());
        }
        let mut commits = self.commits();
        for run in &new {
            self.map.fill(KEPT, *run, true);
        }
        commits.asked += 1;
        self.wait_durable(commits)
    }

    /// One thread makes durable what all have asked for, the others wait.
    fn wait_durable<'a>(&'a self, mut commits: MutexGuard<'a, Commits>) -> Result<()> {
        let ticket = commits.asked;
        while commits.done < ticket {
            if let Some(error) = &commits.failed {
                return Err(error.clone());
            }
            if commits.busy {
                commits = self.committed.wait(commits).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            commits.busy = true;
            let (all, capture) = (commits.asked, self.map.capture(usize::MAX));
            drop(commits);
            let result = self.store.flush().and_then(|()| self.map.commit(&capture));
            commits = self.commits();
            commits.busy = false;
            match result {
                Ok(()) => commits.done = all,
                Err(error) => commits.failed = Some(error),
            }
            self.committed.notify_all();
        }
        Ok(())
    }

    /// Puts everything back; returns its bytes. The target is as before the merges that kept it.
    pub fn put_back(&self, target: &OfflineTarget) -> Result<u64> {
        let runs: Vec<BlockRange> =
            self.map.plane(KEPT).runs(self.geometry.all_blocks(), true).collect();
        let map = target.map();
        if let Some(CutSpan { newest, .. }) = map.file().span() {
            // What is missing again may have changed since all cuts but the newest (law 7).
            map.file().set_span(CutSpan { oldest: newest, newest })?;
        }
        map.make_missing(&runs)?;
        let device = target.device();
        let mut bytes = 0;
        for run in runs {
            let range = self.geometry.bytes_of(run);
            copy(&*self.store, &*device, range, Zeros::AreWritten)?;
            bytes += range.length;
        }
        device.flush()?;
        Ok(bytes)
    }
}

/// Whether a target that nothing was written to reads as zeros.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Zeros {
    AreThere,
    AreWritten,
}

fn copy(from: &dyn Device, to: &dyn Device, range: ByteRange, zeros: Zeros) -> Result<()> {
    let mut buffer = AlignedBuffer::zeroed(range.length.min(COPY_BYTES) as usize);
    let mut at = range.offset;
    while at < range.end() {
        let count = (range.end() - at).min(COPY_BYTES);
        let bytes = &mut buffer[..count as usize];
        from.read_at(at, bytes)?;
        match crate::device::is_zero(bytes) {
            true if zeros == Zeros::AreThere => {}
            true => to.zero_at(at, count)?,
            false => to.write_at(at, bytes)?,
        }
        at += count;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::ops::ControlFlow;

    use uuid::Uuid;

    use super::*;
    use crate::device::RamDevice;
    use crate::map::OverwriteMap;
    use crate::merge::{ImagePieces, MergeOptions, run};
    use crate::units::{BlockSize, Cut};

    const SIZE: u64 = (4 << 20) + 512;

    fn target(bytes: Vec<u8>) -> (Arc<RamDevice>, OfflineTarget) {
        let geometry = Geometry::new(SIZE, BlockSize::DEFAULT).expect("valid");
        let map = Arc::new(RamDevice::new(OverwriteMap::bytes_needed(geometry)));
        let identity = MapIdentity { volume: Uuid::nil(), geometry, generation: 0 };
        let map = OverwriteMap::create(map, identity).expect("created");
        let device = Arc::new(RamDevice::from_bytes(bytes));
        let target = OfflineTarget::new(Arc::clone(&device) as _, Arc::new(map)).expect("made");
        (device, target)
    }

    #[test]
    fn what_a_merge_overwrote_is_put_back_and_missing_again() {
        let home = tempfile::tempdir().expect("a temporary directory");
        let mut before: Vec<u8> = (0..SIZE).map(|at| (at / 512 % 250) as u8 + 1).collect();
        before[1 << 20..2 << 20].fill(0);
        let (device, plain) = target(before.clone());
        plain.map().mark_current(BlockRange::new(10, 20));
        let map = Arc::clone(plain.shared_map());
        let undo = Undo::open(&home.path().join("undo"), map.identity()).expect("new");
        let keeping = plain.keeping(undo);
        let image = Arc::new(RamDevice::from_bytes(vec![0xab; SIZE as usize]));
        let source = ImagePieces::new(image).expect("an image");
        let mut go_on = |_: &_| ControlFlow::Continue(());
        let options = MergeOptions::default();
        run(&source, &keeping, &options, &mut go_on).expect("merged");
        assert_eq!(device.contents()[0], 0xab);
        assert_eq!(map.missing_bytes(), 0);
        drop(keeping);
        let undo = Undo::open(&home.path().join("undo"), map.identity()).expect("opened");
        let again = OfflineTarget::new(Arc::clone(&device) as _, Arc::clone(&map)).expect("made");
        assert_eq!(undo.put_back(&again).expect("put back"), SIZE - 10 * 4096);
        assert!(device.contents() == before);
        assert_eq!(map.current_bytes(), 10 * 4096);
    }

    #[test]
    fn one_of_two_files_or_those_of_another_volume_are_refused() {
        let home = tempfile::tempdir().expect("a temporary directory");
        let path = home.path().join("undo");
        let (_, target) = target(vec![0; SIZE as usize]);
        let identity = MapIdentity { volume: Uuid::from_u128(8), ..target.map().identity() };
        drop(Undo::open(&path, identity).expect("new"));
        let foreign = MapIdentity { volume: Uuid::from_u128(9), ..identity };
        assert!(Undo::open(&path, foreign).expect_err("foreign").to_string().contains("kept of"));
        let elsewhere = home.path().join("else");
        std::os::unix::fs::symlink(&path, &elsewhere).expect("linked");
        let refused = Undo::open(&elsewhere, identity).expect_err("no map beside it");
        assert!(refused.to_string().contains("found one of them"), "{refused}");
    }

    #[test]
    fn what_was_kept_before_the_map_was_bound_is_put_back_after_it() {
        let home = tempfile::tempdir().expect("a temporary directory");
        let path = home.path().join("undo");
        let (device, plain) = target(vec![5; SIZE as usize]);
        let map = Arc::clone(plain.shared_map());
        let keeping = plain.keeping(Undo::open(&path, map.identity()).expect("new"));
        let cut = Cut { generation: 3, sequence: 9 };
        keeping.bind(Uuid::from_u128(7), cut).expect("bound");
        // As after an incremental bundle was merged whole.
        let earlier = Cut { generation: 3, sequence: 1 };
        map.file().set_span(CutSpan { oldest: earlier, newest: cut }).expect("wider");
        assert_eq!(keeping.fill(BlockRange::new(0, 3), None).expect("filled"), 3 * 4096);
        drop(keeping);
        let again = OfflineTarget::new(Arc::clone(&device) as _, Arc::clone(&map)).expect("made");
        let undo = Undo::open(&path, map.identity()).expect("of the same target");
        assert_eq!(undo.put_back(&again).expect("put back"), 3 * 4096);
        assert!(device.contents().iter().all(|byte| *byte == 5));
        // Law 7: an earlier cut would fill what is missing again with what changed since.
        assert_eq!(map.file().span(), Some(CutSpan { oldest: cut, newest: cut }));
    }
}
