//! Media that come, stay, stall, are exchanged or are too old, on a volume without a backup.

#![expect(clippy::disallowed_methods, reason = "a test moves media and spoils records")]

use std::ops::ControlFlow;
use std::sync::{Condvar, Mutex};
use std::time::Duration;

use super::*;
use crate::bundle::{BundleWriter, ImageSource, Source, WriterOptions};
use crate::device::{Device, FileDirectory, Folder, FolderFile, RamDevice, RamFolder};
use crate::error::ErrorKind;
use crate::extent::ByteRange;
use crate::units::{BlockSize, Geometry};
use crate::volume::engine::Engine;
use crate::volume::primary::{Lost, MirrorPolicy, Options};
use crate::volume::service::Command;

const SIZE: u64 = 1 << 20;

/// A snapshot of a volume that holds sevens.
#[derive(Debug)]
struct Sevens(ImageSource, Uuid, u64);

impl Source for Sevens {
    fn identity(&self) -> Identity {
        Identity { volume: self.1, generation: self.2, ..self.0.identity() }
    }

    fn snapshot(&self) -> Option<Uuid> {
        Some(Uuid::from_u128(5))
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        self.0.read_at(offset, buffer)
    }
}

fn sevens(volume: &PrimaryVolume) -> Sevens {
    let image = Arc::new(RamDevice::from_bytes(vec![7; SIZE as usize]));
    let image = ImageSource::new(image, BlockSize::DEFAULT).expect("an image");
    let (volume, generation) = volume.hello_identity();
    Sevens(image, volume, generation)
}

fn bundle(volume: &PrimaryVolume, path: &Path) {
    let options = WriterOptions { threads: 1, ..WriterOptions::default() };
    BundleWriter::create(path, &sevens(volume), &options, &mut |_| ControlFlow::Continue(()))
        .expect("made");
}

struct Place {
    home: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        let home = tempfile::tempdir().expect("a temporary directory");
        std::fs::create_dir(home.path().join("state")).expect("made");
        Self { home }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.home.path().join(name)
    }

    fn try_open(&self, made: bool, deadline_ms: u64) -> Result<Arc<PrimaryVolume>> {
        let options = Options {
            policy: MirrorPolicy::Flush,
            backup: false,
            strict: false,
            missing_deadline_ms: deadline_ms,
        };
        PrimaryVolume::open(
            "v",
            Arc::new(FileDirectory::open(self.path("state"), true)?),
            Arc::new(RamDevice::new(SIZE)) as Arc<dyn Device>,
            made,
            Geometry::new(SIZE, BlockSize::DEFAULT).expect("valid"),
            options,
            Engine::new().expect("started"),
        )
    }

    /// A volume that lost everything.
    fn lost(&self) -> Arc<PrimaryVolume> {
        let volume = self.try_open(true, 1000).expect("opened");
        volume.restore(&Lost::All, Duration::ZERO).expect("declared");
        volume
    }
}

fn read(volume: &PrimaryVolume, offset: u64, length: u64) -> Result<Vec<u8>> {
    let range = ByteRange::new(offset, length);
    let read = volume.driver_or_refuse()?.wait_for(Command::Read { range })?;
    Ok(read.expect("a read has bytes").to_vec())
}

/// The state of the only medium, once it is no longer being looked for.
fn state_when_found(volume: &PrimaryVolume) -> (&'static str, Option<Error>) {
    loop {
        let media = volume.media();
        assert_eq!(media.len(), 1);
        if media[0].state != "opening" {
            return (media[0].state, media[0].error.clone());
        }
        std::thread::yield_now();
    }
}

#[test]
fn what_is_attached_is_found_again_after_a_restart_unless_it_is_another() {
    let place = Place::new();
    let volume = place.lost();
    let medium = place.path("medium");
    bundle(&volume, &medium);
    assert_eq!(volume.attach(&medium).expect("attached").state, "attached");
    assert_eq!(read(&volume, 4096, 8192).expect("read"), vec![7; 8192]);
    volume.close().expect("closed");
    drop(volume);
    let volume = place.try_open(false, 1000).expect("opened");
    assert_eq!(state_when_found(&volume).0, "attached");
    assert_eq!(read(&volume, 65_536, 4096).expect("read"), vec![7; 4096]);
    volume.close().expect("closed");
    // Another bundle lies in its place.
    std::fs::rename(&medium, place.path("elsewhere")).expect("moved");
    let stranger = Place::new().lost();
    bundle(&stranger, &medium);
    drop(volume);
    let volume = place.try_open(false, 1000).expect("opened");
    let (state, error) = state_when_found(&volume);
    assert_eq!(state, "refused");
    assert_eq!(error.expect("with words").kind(), ErrorKind::Identity);
    assert!(volume.detach(&medium).expect("detached") && volume.media().is_empty());
    assert!(!volume.detach(&medium).expect("there is none"));
    volume.close().expect("closed");
    drop(volume);
    assert!(place.try_open(false, 1000).expect("opened").media().is_empty());
}

#[test]
fn a_loss_detaches_and_what_is_of_before_it_needs_the_backup() {
    let place = Place::new();
    let volume = place.lost();
    let medium = place.path("medium");
    bundle(&volume, &medium);
    volume.attach(&medium).expect("attached");
    assert_eq!(volume.attach(&medium).expect("attached again").state, "attached");
    assert_eq!(volume.media().len(), 1);
    volume.restore(&Lost::All, Duration::ZERO).expect("declared");
    assert!(volume.media().is_empty());
    assert!(!place.path("state").join(RECORD).exists());
    let refused = volume.attach(&medium).expect_err("older than the loss");
    assert_eq!(refused.kind(), ErrorKind::Identity);
    assert!(refused.to_string().contains("when the link is up"), "{refused}");
    assert!(volume.media().is_empty());
    volume.attach(Path::new("medium")).expect_err("not absolute");
}

#[test]
fn a_record_that_is_not_understood_is_refused_and_a_stale_one_is_removed() {
    let place = Place::new();
    let volume = place.lost();
    let medium = place.path("medium");
    bundle(&volume, &medium);
    volume.attach(&medium).expect("attached");
    let record = place.path("state").join(RECORD);
    let text = std::fs::read_to_string(&record).expect("recorded");
    volume.close().expect("closed");
    drop(volume);
    for (from, to) in [("\"version\": 1", "\"version\": 2"), ("\"media\"", "\"other\"")] {
        std::fs::write(&record, text.replace(from, to)).expect("written");
        let refused = place.try_open(false, 1000).expect_err("not understood");
        assert_eq!(refused.kind(), ErrorKind::Format);
    }
    let stale = text.replace("\"generation\": 1", "\"generation\": 0");
    std::fs::write(&record, stale).expect("written");
    assert!(place.try_open(false, 1000).expect("opened").media().is_empty());
    assert!(!record.exists());
}

/// A folder whose files answer nothing while the gate is shut.
#[derive(Clone, Debug)]
struct Stalling(RamFolder, Arc<(Mutex<bool>, Condvar)>);

#[derive(Debug)]
struct StallingFile(Arc<dyn FolderFile>, Arc<(Mutex<bool>, Condvar)>);

impl FolderFile for StallingFile {
    fn length(&self) -> Result<u64> {
        self.0.length()
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let (shut, opened) = &*self.1;
        let open = opened.wait_while(shut.lock().expect("sound"), |shut| *shut);
        drop(open);
        self.0.read_at(offset, buffer)
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> Result<()> {
        self.0.write_at(offset, data)
    }

    fn flush(&self) -> Result<()> {
        self.0.flush()
    }
}

impl Folder for Stalling {
    fn path(&self) -> &Path {
        self.0.path()
    }

    fn names(&self) -> Result<Vec<String>> {
        self.0.names()
    }

    fn create(&self, name: &str) -> Result<Arc<dyn FolderFile>> {
        self.0.create(name)
    }

    fn open(&self, name: &str) -> Result<Arc<dyn FolderFile>> {
        Ok(Arc::new(StallingFile(self.0.open(name)?, Arc::clone(&self.1))))
    }

    fn rename(&self, from: &str, to: &str) -> Result<()> {
        self.0.rename(from, to)
    }

    fn flush(&self) -> Result<()> {
        self.0.flush()
    }
}

#[test]
fn a_medium_that_stalls_holds_up_no_read_past_its_deadline_nor_the_end() {
    let place = Place::new();
    let volume = place.try_open(true, 400).expect("opened");
    volume.restore(&Lost::All, Duration::ZERO).expect("declared");
    let folder = RamFolder::new();
    let options = WriterOptions { threads: 1, ..WriterOptions::default() };
    BundleWriter::create_in(
        &folder,
        &sevens(&volume),
        &options,
        &mut |_| ControlFlow::Continue(()),
    )
    .expect("made");
    let gate = Arc::new((Mutex::new(false), Condvar::new()));
    let stalling = Stalling(folder, Arc::clone(&gate));
    let reader = Bundle::open_in(Arc::new(stalling)).expect("whole");
    let reader = Arc::new(RandomReader::new(reader).expect("no overlap"));
    let path = Path::new("/stalling");
    let attachment = volume.admit(path, &reader, None).expect("right");
    volume.attachments().push(attachment);
    *gate.0.lock().expect("sound") = true;
    let failed = read(&volume, 0, 4096).expect_err("nobody answers");
    assert_eq!(failed.kind(), ErrorKind::Timeout);
    assert_eq!(volume.media()[0].state, "gone");
    assert!(volume.detach(path).expect("nobody waits for it"));
    volume.close().expect("nor here");
    *gate.0.lock().expect("sound") = false;
    gate.1.notify_all();
}
