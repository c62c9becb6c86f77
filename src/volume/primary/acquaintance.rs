//! What a primary knows of its backup: which one it is mirrored to, and what one told of itself.
//!
//! | known | a session is offered by | missing blocks | then |
//! |---|---|---|---|
//! | none | any | any | it is remembered |
//! | one | the same | any | the session goes on |
//! | one | another | none | every current block becomes unsent, durably; then it is remembered |
//! | one | another | some | refused: only the known one has them |
//!
//! Guarantees: a backup that lost its state, or was put in the place of another, is never taken for
//! a mirror that it is not (law 10), nor asked for blocks that it never had (law 1).
//! Does not know: connections.

use std::fmt;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use uuid::Uuid;

use super::volume::PrimaryVolume;
use crate::device::Directory;
use crate::error::{Error, Result};

const RECORD: &str = "known-backup";
const RECORD_BYTES_MAX: u64 = 4096;
const HEAD: &str = "dualrestore-known-backup 1 ";

/// What a backup says of itself to a volume that has no identity yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Introduction {
    pub volume: Uuid,
    pub generation: u64,
    pub backup: Uuid,
}

/// See the module.
pub(super) struct Acquaintance {
    directory: Arc<dyn Directory>,
    known: Mutex<Option<Uuid>>,
    introduced: Mutex<Option<Introduction>>,
    introduction: Condvar,
}

impl fmt::Debug for Acquaintance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Acquaintance").field("known", &self.known()).finish_non_exhaustive()
    }
}

impl Acquaintance {
    pub fn open(directory: Arc<dyn Directory>) -> Result<Self> {
        let record = directory.read(RECORD, RECORD_BYTES_MAX)?;
        let known = record.map(|bytes| decode(&bytes)).transpose()?;
        Ok(Self {
            directory,
            known: Mutex::new(known),
            introduced: Mutex::default(),
            introduction: Condvar::new(),
        })
    }

    pub fn known(&self) -> Option<Uuid> {
        *self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn remember(&self, backup: Uuid) -> Result<()> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        self.directory.replace(RECORD, encode(backup).as_bytes())?;
        *known = Some(backup);
        Ok(())
    }

    /// For a volume that begins anew.
    pub fn forget(&self) -> Result<()> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        self.directory.remove(RECORD)?;
        *known = None;
        Ok(())
    }

    pub fn introduce(&self, introduction: Introduction) {
        let mut introduced = self.introduced.lock().unwrap_or_else(PoisonError::into_inner);
        *introduced = Some(introduction);
        self.introduction.notify_all();
    }

    /// Waits for a backup to introduce itself.
    pub fn wait(&self, patience: Duration) -> Option<Introduction> {
        let introduced = self.introduced.lock().unwrap_or_else(PoisonError::into_inner);
        let (introduced, _) = self
            .introduction
            .wait_timeout_while(introduced, patience, |told| told.is_none())
            .unwrap_or_else(PoisonError::into_inner);
        *introduced
    }
}

fn encode(backup: Uuid) -> String {
    format!("{HEAD}{backup}\n")
}

fn decode(bytes: &[u8]) -> Result<Uuid> {
    let text = std::str::from_utf8(bytes).ok();
    let uuid = text.and_then(|text| text.strip_prefix(HEAD)?.strip_suffix('\n'));
    let uuid = uuid.and_then(|text| Uuid::parse_str(text).ok());
    uuid.filter(|backup| encode(*backup).as_bytes() == bytes).ok_or_else(|| {
        Error::format(format!(
            "expected a line `{HEAD}UUID` in {RECORD}, found another: use the program that wrote \
             it, or remove it, and everything is sent to the backup once more"
        ))
    })
}

impl PrimaryVolume {
    /// A backup that holds a volume told which.
    pub fn introduce(&self, introduction: Introduction) {
        self.acquaintance.introduce(introduction);
    }

    /// Whether a session with this backup may go on without `meet`.
    #[must_use]
    pub fn knows(&self, backup: Uuid) -> bool {
        self.acquaintance.known() == Some(backup)
    }

    /// Gets to know the backup that offers a session, before anything is sent; see the module.
    pub fn meet(&self, backup: Uuid) -> Result<()> {
        let _word = self.hold_word();
        let driver = self.driver_or_refuse()?;
        match self.acquaintance.known() {
            Some(known) if known == backup => return Ok(()),
            None => {}
            Some(known) => {
                let missing = driver.map().missing_bytes();
                if missing > 0 {
                    return Err(Error::identity(format!(
                        "expected backup {known}, which holds the {missing} bytes that are missing \
                         here, found backup {backup}: bring that one back; if it is lost, `restore \
                         {} --lost none` takes this disk as it is for the truth",
                        self.name()
                    )));
                }
                let all = self.geometry().all_blocks();
                driver.with_machine(|machine, now, actions| machine.mark_unsent(all, now, actions));
                driver.commit()?;
                driver.expect_nothing_of_the_backup();
            }
        }
        self.acquaintance.remember(backup)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::{Device, FileDirectory, RamDevice};
    use crate::error::ErrorKind;
    use crate::units::{BlockSize, Geometry};
    use crate::volume::engine::Engine;
    use crate::volume::primary::{Lost, MirrorPolicy, Options};

    const MIB: u64 = 1 << 20;
    const FIRST: Uuid = Uuid::from_u128(1);
    const SECOND: Uuid = Uuid::from_u128(2);

    fn opened(home: &tempfile::TempDir, made: bool) -> Arc<PrimaryVolume> {
        let options = Options {
            policy: MirrorPolicy::Flush,
            backup: true,
            strict: false,
            missing_deadline_ms: 1000,
        };
        PrimaryVolume::open(
            "v",
            Arc::new(FileDirectory::open(home.path(), true).expect("opened")),
            Arc::new(RamDevice::new(MIB)) as Arc<dyn Device>,
            made,
            Geometry::new(MIB, BlockSize::DEFAULT).expect("valid"),
            options,
            Engine::new().expect("started"),
        )
        .expect("opened")
    }

    #[test]
    fn another_backup_is_sent_everything_and_the_known_one_is_not() {
        let home = tempfile::tempdir().expect("a temporary directory");
        let volume = opened(&home, true);
        volume.meet(FIRST).expect("the first ever");
        assert_eq!(volume.status().unsent_bytes, 0);
        volume.close().expect("closed");
        drop(volume);
        let volume = opened(&home, false);
        assert!(volume.knows(FIRST) && !volume.knows(SECOND));
        volume.meet(FIRST).expect("known");
        assert_eq!(volume.status().unsent_bytes, 0);
        volume.meet(SECOND).expect("nothing is missing here");
        assert_eq!(volume.status().unsent_bytes, MIB);
        assert!(volume.knows(SECOND));
    }

    #[test]
    fn another_backup_is_refused_while_only_the_known_one_has_what_is_missing() {
        let home = tempfile::tempdir().expect("a temporary directory");
        let volume = opened(&home, true);
        volume.meet(FIRST).expect("the first ever");
        volume.restore(&Lost::All, Duration::ZERO).expect("declared");
        let refused = volume.meet(SECOND).expect_err("it never had them");
        assert_eq!(refused.kind(), ErrorKind::Identity);
        assert!(refused.to_string().contains(&FIRST.to_string()), "{refused}");
        assert!(volume.knows(FIRST));
        volume.restore(&Lost::None, Duration::ZERO).expect("declared");
        volume.meet(SECOND).expect("this disk is the truth");
    }

    #[test]
    fn a_record_that_is_not_understood_is_refused() {
        assert_eq!(decode(encode(FIRST).as_bytes()).expect("ours"), FIRST);
        for text in ["", "dualrestore-known-backup 2 x\n", &encode(FIRST).to_uppercase()] {
            assert_eq!(decode(text.as_bytes()).expect_err("refused").kind(), ErrorKind::Format);
        }
    }
}
