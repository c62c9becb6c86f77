//! Which media are attached to a primary volume, and what is remembered of that.
//!
//! | state | event | next |
//! |---|---|---|
//! | none | `attach`: it is of this volume and generation | attached, recorded |
//! | recorded | the volume is opened | opening, on a thread that nobody waits for |
//! | opening | it is there and right | attached |
//! | opening | it is not there, or not what was attached | refused, with words |
//! | attached, of an earlier generation | the session that vouched for it ends | unvouched |
//! | attached | the machine says that it is gone | gone; `attach` again when it is back |
//! | any | `detach`, a loss is declared | none |
//!
//! Guarantees: law 7: volume, geometry and generation are compared before anything is read from a
//! medium, and again when it is found after a start.
//! Does not know: how media are read.

use std::path::{Path, PathBuf};
use std::sync::{Arc, MutexGuard, PoisonError, Weak};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::asking::Vouched;
use super::media::{MediumCondition, MediumId, Supply};
use super::merging::vouched_for;
use super::volume::PrimaryVolume;
use crate::bundle::{Bundle, Identity, PieceSource, RandomReader};
use crate::device::Directory;
use crate::error::{Error, ErrorKind, Result};
use crate::extent::BlockRange;
use crate::format::bundle::{BundleKey, UuidText};
use crate::limits::MEDIA_MAX;
use crate::map::MapIdentity;
use crate::volume::engine::spawn_apart;

const RECORD: &str = "attached-media";
const RECORD_BYTES_MAX: u64 = 1 << 20;
const FORMAT: &str = "dualrestore attached media";
const VERSION: u32 = 1;

/// One medium, as `status` tells of it.
#[derive(Clone, Debug)]
pub struct AttachmentStatus {
    pub path: PathBuf,
    pub bundle: Uuid,
    pub generation: u64,
    pub cut: u64,
    /// `opening`, `attached`, `unvouched`, `gone` or `refused`.
    pub state: &'static str,
    pub error: Option<Error>,
    pub bytes_covered: u64,
    pub bytes_supplied: u64,
    pub reads_damaged: u64,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Attachment {
    path: PathBuf,
    bundle: Uuid,
    generation: u64,
    cut: u64,
    bytes_covered: u64,
    state: State,
}

#[derive(Debug)]
enum State {
    Opening,
    Attached(MediumId),
    Refused(Error),
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Record {
    format: String,
    version: u32,
    /// Of the volume when they were attached.
    volume: UuidText,
    generation: u64,
    media: Vec<RecordedMedium>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RecordedMedium {
    path: String,
    bundle: UuidText,
}

impl PrimaryVolume {
    fn attachments(&self) -> MutexGuard<'_, Vec<Attachment>> {
        self.attachments.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on missing blocks are read from the bundle in this directory, where it has them.
    /// One that is attached already is opened anew. Durable when it returns.
    pub fn attach(&self, path: &Path) -> Result<AttachmentStatus> {
        self.attach_with(path, None)
    }

    /// The same of an encrypted bundle. Its key is not recorded: after a start it is refused until
    /// it is attached again.
    pub fn attach_with(&self, path: &Path, key: Option<&BundleKey>) -> Result<AttachmentStatus> {
        if path.to_str().is_none() || !path.is_absolute() {
            return Err(Error::usage("expected an absolute path in UTF-8").at_path(path));
        }
        self.driver_or_refuse()?;
        // A medium may take its time: before the lock.
        let reader = Arc::new(RandomReader::new(Bundle::open_with(path, key)?)?);
        let asked = self.ask_about(&reader).map_err(|error| error.at_path(path))?;
        let _word = self.hold_word();
        let attachment = self.admit(path, &reader, asked)?;
        self.forget(path);
        let mut held = self.attachments();
        if held.len() >= MEDIA_MAX {
            let words = format!("a volume has at most {MEDIA_MAX} media attached: detach one");
            drop(held);
            self.drop_medium(&attachment);
            return Err(Error::usage(words));
        }
        let status = self.status_of(&attachment);
        held.push(attachment);
        drop(held);
        self.record_media()?;
        Ok(status)
    }

    /// Nothing is read from this directory any more; `false` if it was not attached.
    pub fn detach(&self, path: &Path) -> Result<bool> {
        let _word = self.hold_word();
        let was = self.forget(path);
        self.record_media()?;
        Ok(was)
    }

    /// The attached media, in the order in which they were attached.
    #[must_use]
    pub fn media(&self) -> Vec<AttachmentStatus> {
        self.attachments().iter().map(|held| self.status_of(held)).collect()
    }

    fn status_of(&self, attachment: &Attachment) -> AttachmentStatus {
        let told = match &attachment.state {
            State::Attached(medium) => self.live().and_then(|driver| {
                driver.with_machine(|machine, _, _| machine.medium_status(*medium))
            }),
            State::Opening | State::Refused(_) => None,
        };
        let condition = told.as_ref().map(|told| told.condition.clone());
        let (state, error) = match (&attachment.state, condition) {
            (State::Opening, _) => ("opening", None),
            (State::Refused(error), _) => ("refused", Some(error.clone())),
            (_, Some(MediumCondition::Attached)) => ("attached", None),
            (State::Attached(medium), Some(MediumCondition::Unvouched)) => {
                let driver = self.live();
                ("unvouched", driver.and_then(|driver| driver.medium_problem(*medium)))
            }
            (_, Some(MediumCondition::Gone(error))) => ("gone", Some(error)),
            (_, None) => ("gone", None),
        };
        AttachmentStatus {
            path: attachment.path.clone(),
            bundle: attachment.bundle,
            generation: attachment.generation,
            cut: attachment.cut,
            state,
            error,
            bytes_covered: attachment.bytes_covered,
            bytes_supplied: told.as_ref().map_or(0, |told| told.bytes_supplied),
            reads_damaged: told.as_ref().map_or(0, |told| told.reads_damaged),
        }
    }

    /// Hands an open bundle to the machine, if it is of this volume. To be called where no other
    /// generation can begin.
    ///
    /// `vouched`: what the backup says of one of an earlier generation, if it was asked already.
    fn admit(
        &self,
        path: &Path,
        reader: &Arc<RandomReader>,
        vouched: Option<Vouched>,
    ) -> Result<Attachment> {
        let driver = self.driver_or_refuse()?;
        let bundle = reader.bundle();
        let identity = bundle.identity();
        let held = driver.map().identity();
        check_identity(&identity, held).map_err(|error| error.at_path(path))?;
        let needs_vouching = identity.generation < held.generation;
        let older = bundle.cut_name().filter(|_| needs_vouching);
        let supply = Supply { coverage: self.blocks_of(reader), needs_vouching };
        let medium = driver.attach(reader, supply, older)?;
        match vouched {
            Some(vouched) => driver.vouch(medium, vouched),
            None if older.is_some() => driver.ask_for_media(),
            None => {}
        }
        Ok(Attachment {
            path: path.to_path_buf(),
            bundle: reader.bundle().uuid(),
            generation: identity.generation,
            cut: identity.cut,
            bytes_covered: reader.coverage().iter().map(|range| range.length).sum(),
            state: State::Attached(medium),
        })
    }

    /// Whole blocks that a bundle speaks of.
    fn blocks_of(&self, reader: &RandomReader) -> Vec<BlockRange> {
        let covered = reader.coverage();
        let blocks = covered.iter().map(|range| self.geometry().covered(*range));
        blocks.filter(|run| !run.is_empty()).collect()
    }

    /// What the backup says of a bundle of an earlier generation.
    fn ask_about(&self, reader: &RandomReader) -> Result<Option<Vouched>> {
        let driver = self.driver_or_refuse()?;
        let (identity, held) = (reader.bundle().identity(), driver.map().identity());
        check_identity(&identity, held)?;
        if identity.generation == held.generation {
            return Ok(None);
        }
        vouched_for(&driver, reader.bundle(), &self.blocks_of(reader)).map(Some)
    }

    fn forget(&self, path: &Path) -> bool {
        let mut held = self.attachments();
        let Some(at) = held.iter().position(|one| one.path == path) else { return false };
        let attachment = held.remove(at);
        drop(held);
        self.drop_medium(&attachment);
        true
    }

    fn drop_medium(&self, attachment: &Attachment) {
        if let (State::Attached(medium), Some(driver)) = (&attachment.state, self.live()) {
            driver.detach(*medium);
        }
    }

    /// A new generation has begun: what was attached is of the one before.
    pub(super) fn forget_media(&self) {
        self.attachments().clear();
        // A record that cannot be removed now is of no use at the next start, and removed there.
        let _later = self.directory().remove(RECORD);
    }

    fn record_media(&self) -> Result<()> {
        let held = self.attachments();
        if held.is_empty() {
            return self.directory().remove(RECORD);
        }
        let identity = self.driver_or_refuse()?.map().identity();
        let media = held.iter().map(|one| RecordedMedium {
            path: one.path.to_str().expect("checked when it was attached").to_owned(),
            bundle: UuidText(one.bundle),
        });
        let record = Record {
            format: FORMAT.into(),
            version: VERSION,
            volume: UuidText(identity.volume),
            generation: identity.generation,
            media: media.collect(),
        };
        let text = serde_json::to_vec_pretty(&record).expect("a record is plain values");
        self.directory().replace(RECORD, &text)
    }

    /// Looks for the media of the record, on a thread of its own: one that stalls keeps nobody.
    pub(super) fn find_recorded_media(self: &Arc<Self>) -> Result<()> {
        let Some(record) = read_record(&**self.directory())? else { return Ok(()) };
        let Some(driver) = self.live() else { return Ok(()) };
        let identity = driver.map().identity();
        if (record.volume.0, record.generation) != (identity.volume, identity.generation) {
            // A crash came between the new generation and the end of the record.
            return self.directory().remove(RECORD);
        }
        self.attachments().extend(record.media.iter().map(|one| Attachment {
            path: PathBuf::from(&one.path),
            bundle: one.bundle.0,
            generation: 0,
            cut: 0,
            bytes_covered: 0,
            state: State::Opening,
        }));
        let volume = Arc::downgrade(self);
        spawn_apart("media-find", move || find_each(&volume, &record.media))
    }

    fn find_again(&self, path: &Path, bundle: Uuid) {
        let opened = Bundle::open(path).and_then(|found| {
            if found.uuid() == bundle {
                return RandomReader::new(found);
            }
            let found = found.uuid();
            Err(Error::identity(format!("expected bundle {bundle}, found {found}")).at_path(path))
        });
        let _word = self.hold_word();
        let is_awaited =
            |held: &Attachment| held.path == path && matches!(held.state, State::Opening);
        if !self.attachments().iter().any(is_awaited) {
            return;
        }
        let found = opened.and_then(|reader| self.admit(path, &Arc::new(reader), None));
        let mut held = self.attachments();
        let place = held.iter_mut().find(|held| is_awaited(held)).expect("the word is held");
        match found {
            Ok(attachment) => *place = attachment,
            Err(error) if error.kind() == ErrorKind::Locked => {
                place.state = State::Refused(key_forgotten().at_path(path));
            }
            Err(error) => place.state = State::Refused(error),
        }
    }
}

/// A key never lies on a disk in the clear, so that a start has none.
fn key_forgotten() -> Error {
    Error::new(
        ErrorKind::Locked,
        "encrypted, and its key is not kept over a restart: attach it again with --identity or \
         --passphrase-file; until then missing blocks come over the link",
    )
}

fn find_each(volume: &Weak<PrimaryVolume>, media: &[RecordedMedium]) {
    for medium in media {
        let Some(volume) = volume.upgrade() else { return };
        volume.find_again(Path::new(&medium.path), medium.bundle.0);
    }
}

fn read_record(directory: &dyn Directory) -> Result<Option<Record>> {
    let Some(bytes) = directory.read(RECORD, RECORD_BYTES_MAX)? else { return Ok(None) };
    let found: Option<Record> = serde_json::from_slice(&bytes).ok();
    let known = found.filter(|found| (found.format.as_str(), found.version) == (FORMAT, VERSION));
    known.map(Some).ok_or_else(|| {
        Error::format(format!(
            "expected a {FORMAT:?} of version {VERSION} in {RECORD}, found another: use the \
             program that wrote it, or remove it and attach the media again"
        ))
    })
}

/// Law 7, for a bundle that is to supply missing blocks.
fn check_identity(bundle: &Identity, volume: MapIdentity) -> Result<()> {
    if bundle.volume != volume.volume {
        let found = if bundle.is_bound() {
            format!("one of volume {}", bundle.volume)
        } else {
            "one that names no volume".to_owned()
        };
        return Err(Error::identity(format!(
            "expected a bundle of volume {}, found {found}: attach one of this volume",
            volume.volume
        )));
    }
    if bundle.geometry.size() != volume.geometry.size() {
        return Err(Error::identity(format!(
            "expected a bundle of the volume's {} bytes, found one of {}",
            volume.geometry.size(),
            bundle.geometry.size()
        )));
    }
    if bundle.generation > volume.generation {
        return Err(Error::identity(format!(
            "expected a bundle of generation {} at the most, found one of generation {}: this \
             volume is not what the bundle was made of",
            volume.generation, bundle.generation
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests;
