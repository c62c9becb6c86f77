//! A bundle made of a snapshot while mirrored writes go on: the medium may be slow, the
//! preservation store full, and what the bundle holds given back.

use std::fmt;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::{Arc, Mutex};

use uuid::Uuid;

use super::{Answer, BackupVolume, MirrorOperation};
use crate::bundle::{
    BegunBundle, Bundle, Content, Media, Medium, NoRecord, Opener, PieceSource, Release,
    ReleasingSnapshot, WriterOptions, write, write_on,
};
use crate::device::{
    Capacity, CrashingDirectory, Device, Directory, Folder, FolderFile, Payload, Power, RamDevice,
    RamFolder,
};
use crate::error::{Error, ErrorKind, Result};
use crate::extent::ByteRange;
use crate::format::bundle::Done;
use crate::snapshot::{Condition, CutOrder, SnapshotStatus};
use crate::units::{BlockSize, Geometry};

const MIB: u64 = 1 << 20;
const SIZE: u64 = 48 * MIB;
/// Journal and maps take 12 MiB and some pages, preservation leaves a sixteenth: 6 MiB are left.
const CRAMPED: u64 = 20 * MIB;
const AMPLE: u64 = 1 << 30;
const SNAPSHOT: Uuid = Uuid::from_u128(1);

fn segment(number: u64) -> String {
    format!("seg-{number:08}.drs")
}

type Hook = Box<dyn FnOnce() -> Result<()> + Send>;

/// A medium that does something before it begins a file, and may fail by it.
struct Hooked {
    folder: RamFolder,
    before: String,
    hook: Mutex<Option<Hook>>,
}

impl Hooked {
    fn new(folder: &RamFolder, before: u64, hook: Hook) -> Arc<Self> {
        let (folder, hook) = (folder.clone(), Mutex::new(Some(hook)));
        Arc::new(Self { folder, before: segment(before), hook })
    }
}

impl fmt::Debug for Hooked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.folder.fmt(f)
    }
}

impl Folder for Hooked {
    fn path(&self) -> &Path {
        self.folder.path()
    }
    fn names(&self) -> Result<Vec<String>> {
        self.folder.names()
    }
    fn create(&self, name: &str) -> Result<Arc<dyn FolderFile>> {
        if name == self.before {
            let hook = self.hook.lock().expect("no panic").take();
            hook.map_or(Ok(()), |hook| hook())?;
        }
        self.folder.create(name)
    }
    fn open(&self, name: &str) -> Result<Arc<dyn FolderFile>> {
        self.folder.open(name)
    }
    fn rename(&self, from: &str, to: &str) -> Result<()> {
        self.folder.rename(from, to)
    }
    fn flush(&self) -> Result<()> {
        self.folder.flush()
    }
    fn remove(&self, name: &str) -> Result<()> {
        self.folder.remove(name)
    }
}

/// One medium.
struct One(Option<Arc<dyn Folder>>);

impl Media for One {
    fn next(&mut self, _: u32) -> Result<Option<Medium>> {
        Ok(self.0.take().map(|folder| Medium { folder, bytes_max: None }))
    }
    fn has_more(&self) -> bool {
        self.0.is_some()
    }
}

fn image() -> Vec<u8> {
    let mut bytes = vec![0; SIZE as usize];
    blake3::Hasher::new().update(b"cut").finalize_xof().fill(&mut bytes);
    bytes
}

/// A backup of which a snapshot was cut when it held `image`.
struct Rig {
    backup: BackupVolume,
    sequence: Mutex<u64>,
}

impl Rig {
    fn new(capacity: u64) -> Arc<Self> {
        let home = CrashingDirectory::new(Power::steady()).with_capacity(Capacity::new(capacity));
        let disk: Arc<dyn Device> = Arc::new(RamDevice::from_bytes(image()));
        let geometry = Geometry::new(SIZE, BlockSize::DEFAULT).expect("valid");
        let home = Arc::new(home) as Arc<dyn Directory>;
        let backup =
            BackupVolume::create(home, disk, geometry, Uuid::from_u128(9)).expect("created");
        backup.begin_session(1, 0).expect("begun");
        let rig = Arc::new(Self { backup, sequence: Mutex::new(0) });
        rig.cut(SNAPSHOT);
        rig
    }

    fn cut(&self, snapshot: Uuid) {
        let order =
            CutOrder { snapshot, label: String::new(), created_ms: 0, selection: Vec::new() };
        self.backup.snapshot_now(&order).expect("cut");
    }

    /// Writes the range MiB by MiB and flushes; fails unless all of it is answered.
    fn overwrite(&self, from: u64, to: u64) {
        let mut sequence = self.sequence.lock().expect("no panic");
        for at in from..to {
            *sequence += 1;
            let data = Payload::copy_of(&vec![at as u8; MIB as usize]);
            let write = MirrorOperation::Write { sequence: *sequence, offset: at * MIB, data };
            *sequence += 1;
            let flush = MirrorOperation::Flush { sequence: *sequence };
            let answers = self.backup.apply(1, vec![write, flush]).expect("taken");
            assert!(matches!(answers.last(), Some(Answer::Flushed { .. })), "{answers:?}");
        }
    }

    fn status(&self) -> SnapshotStatus {
        let listed = self.backup.snapshots().list();
        listed.into_iter().find(|one| one.cut.snapshot == SNAPSHOT).expect("kept")
    }

    fn source(&self, when: Release) -> ReleasingSnapshot {
        let view = Arc::new(self.backup.view(SNAPSHOT).expect("intact"));
        ReleasingSnapshot::new(view, when).expect("nothing stands against it")
    }
}

fn options() -> WriterOptions {
    WriterOptions {
        bundle: Uuid::from_u128(0xb0),
        segment_bytes_max: 2 << 20,
        threads: 1,
        ..WriterOptions::default()
    }
}

fn bundle_on(source: &ReleasingSnapshot, medium: Arc<dyn Folder>) -> Result<()> {
    let mut media = One(Some(medium));
    write(source, &mut media, &options(), &mut NoRecord, &mut |_| ControlFlow::Continue(()))
        .map(drop)
}

/// The bundle holds every byte as it was at the cut.
fn assert_is_the_cut(folder: &RamFolder) {
    let bundle = Bundle::open_in(Arc::new(folder.clone())).expect("whole");
    let mut opener = Opener::new().expect("made");
    let (expected, mut at) = (image(), 0);
    for piece in bundle.pieces() {
        let piece = piece.expect("there");
        let run = piece.range.offset as usize..piece.range.end() as usize;
        assert_eq!(run.start, at, "nothing is left out");
        at = run.end;
        assert!(!matches!(piece.content, Content::Zero | Content::Missing(_)), "noise");
        let (mut stored, mut plain) = (vec![0; piece.bytes_to_read()], vec![0; run.len()]);
        piece.read(&mut stored).expect("read");
        let bytes = piece.open(&mut opener, &mut stored, &mut plain).expect("verified");
        assert!(bytes == &expected[run], "{:?} is not of the cut", piece.range);
    }
    assert_eq!(at, expected.len());
}

#[test]
fn mirrored_writes_and_flushes_go_on_while_the_medium_of_a_bundle_takes_nothing() {
    let (rig, folder) = (Rig::new(AMPLE), RamFolder::new());
    let writer = Arc::clone(&rig);
    // The medium stands still for as long as this takes.
    let hook = move || {
        writer.overwrite(0, SIZE / MIB);
        Ok(())
    };
    let medium = Hooked::new(&folder, 3, Box::new(hook));
    bundle_on(&rig.source(Release::Never), medium).expect("made");
    assert_eq!(*rig.sequence.lock().expect("no panic"), 2 * SIZE / MIB);
    assert_is_the_cut(&folder);
    assert_eq!((rig.status().preserved_bytes, rig.status().released_bytes), (SIZE, 0));
}

/// Makes a bundle during which more is overwritten than the store has room for, all of it of what
/// the medium holds already.
fn bundle_in_a_cramped_place(when: Release) -> (Result<()>, Arc<Rig>, RamFolder) {
    let (rig, folder) = (Rig::new(CRAMPED), RamFolder::new());
    let writer = Arc::clone(&rig);
    let hook = move || {
        writer.overwrite(0, 16);
        Ok(())
    };
    // A segment has nearly two MiB; the assembler may be some behind with what it says.
    let medium = Hooked::new(&folder, 20, Box::new(hook));
    let made = bundle_on(&rig.source(when), medium);
    (made, rig, folder)
}

#[test]
fn trap_26_a_full_store_gives_back_what_a_bundle_holds_and_the_snapshot_stays_whole() {
    let (made, rig, folder) = bundle_in_a_cramped_place(Release::WhenFull);
    made.expect("the snapshot did not break");
    assert_is_the_cut(&folder);
    let status = rig.status();
    assert_eq!(status.condition, Condition::Intact);
    assert!(status.released_bytes > 0 && status.preserved_bytes < 8 * MIB, "{status:?}");
}

#[test]
fn trap_26_a_full_store_breaks_a_snapshot_that_is_never_to_give_anything_back() {
    // What was read ahead of the medium may be all that was left.
    let (_, rig, _) = bundle_in_a_cramped_place(Release::Never);
    assert!(matches!(rig.status().condition, Condition::Broken(_)));
}

#[test]
fn what_always_gives_back_takes_no_room_any_more_and_can_be_read_from_the_bundle_only() {
    let (rig, folder) = (Rig::new(AMPLE), RamFolder::new());
    rig.overwrite(0, 24);
    bundle_on(&rig.source(Release::Always), Arc::new(folder.clone())).expect("made");
    assert_is_the_cut(&folder);
    assert_eq!((rig.status().preserved_bytes, rig.status().released_bytes), (0, SIZE));
    rig.overwrite(0, SIZE / MIB);
    assert_eq!(rig.status().preserved_bytes, 0, "nothing is preserved for it any more");
    let view = rig.backup.view(SNAPSHOT).expect("it is still there");
    let refused = view.read_at(0, &mut [0; 4096]).expect_err("given back");
    assert!(refused.to_string().contains("given back"), "{refused}");
}

#[test]
fn a_bundle_that_was_cut_off_goes_on_without_what_was_given_back() {
    let (rig, folder) = (Rig::new(AMPLE), RamFolder::new());
    let hook = || Err(Error::new(ErrorKind::Device, "pulled out").with_errno(5));
    let source = rig.source(Release::Always);
    let medium = Hooked::new(&folder, 15, Box::new(hook));
    bundle_on(&source, medium).expect_err("pulled out");
    assert!(rig.status().released_bytes > 8 * MIB, "{:?}", rig.status());
    rig.overwrite(0, SIZE / MIB);
    let begun = BegunBundle::new(&source, &options()).expect("the same");
    let mut media = One(Some(Arc::new(folder.clone())));
    let go_on = &mut |_: &_| ControlFlow::Continue(());
    write_on(&source, &mut media, &options(), (&begun, Done::default()), &mut NoRecord, go_on)
        .expect("gone on with");
    assert_is_the_cut(&folder);
    assert_eq!(rig.status().released_bytes, SIZE);
}

#[test]
fn nothing_is_given_back_that_an_older_snapshot_needs() {
    let rig = Rig::new(CRAMPED);
    let newer = Uuid::from_u128(2);
    rig.cut(newer);
    let chain = rig.backup.snapshots();
    let view = || Arc::new(rig.backup.view(newer).expect("intact"));
    let refused = ReleasingSnapshot::new(view(), Release::Always).expect_err("1 may need them");
    assert_eq!(refused.kind(), ErrorKind::Busy);
    chain.offer(newer, ByteRange::new(0, SIZE)).expect("known");
    rig.overwrite(0, 24);
    assert!(chain.list().iter().all(|one| one.released_bytes == 0), "{:?}", chain.list());
    assert!(matches!(rig.status().condition, Condition::Broken(_)), "as without a bundle");
}
