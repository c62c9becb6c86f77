//! The host's records of bundles that are not complete: on their way over several media, or
//! stopped.
//!
//! One directory a bundle, named by its UUID, with one record in it; locked while the bundle is
//! being written. It is made before the first medium is touched, replaced when a medium is
//! finished, and removed when the bundle is complete.
//!
//! Guarantees: a bundle is written by one process at a time; which one is meant is never guessed.
//! Does not know: what the media hold meanwhile (`resume.rs` looks).

use std::path::{Path, PathBuf};

use uuid::Uuid;

use super::encryption::{Encryption, random_salt};
use super::media::{BegunBundle, Record};
use crate::device::{Directory, FileDirectory};
use crate::error::{Error, ErrorKind, Result};
use crate::format::bundle::{BeginManifest, BundleKey, Done, KeptKey, ProgressRecord};
use crate::limits::{BUNDLE_MANIFEST_BYTES_MAX, BUNDLES_UNFINISHED_MAX};

const RECORD_NAME: &str = "progress";
/// The begun manifest inside a string, every character of it escaped.
const RECORD_BYTES_MAX: u64 = 2 * BUNDLE_MANIFEST_BYTES_MAX;

/// See the module.
#[derive(Debug)]
pub struct KeptRecord {
    state: PathBuf,
    bundle: Uuid,
    home: FileDirectory,
    record: ProgressRecord,
}

impl Record for KeptRecord {
    fn keep(&mut self, done: &Done) -> Result<()> {
        self.record.done = done.clone();
        self.home.replace(RECORD_NAME, &self.record.encode())
    }
}

impl KeptRecord {
    /// Of a new bundle; durable when it returns.
    pub fn begin(state: &Path, begun: &BegunBundle, mut record: ProgressRecord) -> Result<Self> {
        forget_oldest(state)?;
        let bundle = begun.manifest.bundle.0;
        let home = FileDirectory::open(state.join(bundle.to_string()), true)?;
        record.done = Done::default();
        record.sealed_with = begun.encryption.as_ref().map(|how| KeptKey {
            key: how.key.text().as_str().into(),
            wrapped: how.wrapped_key.clone(),
        });
        home.replace(RECORD_NAME, &record.encode())?;
        Ok(Self { state: state.to_path_buf(), bundle, home, record })
    }

    /// The bundle of that source that is not complete. `seen` are those that the given media hold:
    /// they tell which one is meant if there are several.
    pub fn find(state: &Path, source: &str, seen: &[Uuid]) -> Result<Self> {
        let mut found = Vec::new();
        for bundle in bundles(state)? {
            let held = Self::open(state, bundle);
            match held {
                Ok(Some(held)) if held.record.source == source => found.push(held),
                Ok(_) => {}
                Err(error) if seen.contains(&bundle) => return Err(error),
                // Of another bundle: being written, or not understood.
                Err(_) => {}
            }
        }
        if found.iter().any(|held| seen.contains(&held.bundle)) {
            found.retain(|held| seen.contains(&held.bundle));
        }
        let mut found = found.into_iter();
        match (found.next(), found.next()) {
            (Some(only), None) => Ok(only),
            (None, _) => Err(Error::usage(format!(
                "expected a bundle of {source} to go on with, found none that was stopped or waits \
                 for a medium: begin one without --continue"
            ))),
            (Some(one), Some(other)) => Err(Error::usage(format!(
                "several bundles of {source} are unfinished ({} of {}, {} of {}): name a medium of \
                 the one that is meant first, with --to",
                one.bundle,
                one.place(),
                other.bundle,
                other.place()
            ))),
        }
    }

    fn open(state: &Path, bundle: Uuid) -> Result<Option<Self>> {
        let home = FileDirectory::open(state.join(bundle.to_string()), true)?;
        let Some(bytes) = home.read(RECORD_NAME, RECORD_BYTES_MAX)? else { return Ok(None) };
        let at = |error: Error| error.at_path(&state.join(bundle.to_string()).join(RECORD_NAME));
        let record = ProgressRecord::decode(&bytes).map_err(at)?;
        Ok(Some(Self { state: state.to_path_buf(), bundle, home, record }))
    }

    fn place(&self) -> String {
        format!("medium {}", self.record.done.media + 1)
    }

    /// What the bundle is encrypted with: the same key on all media, a salt of its own for each
    /// segment.
    pub fn encryption(&self) -> Result<Option<Encryption>> {
        let Some(kept) = &self.record.sealed_with else { return Ok(None) };
        Ok(Some(Encryption {
            key: BundleKey::parse(kept.key.as_bytes())?,
            wrapped_key: kept.wrapped.clone(),
            salts: random_salt,
        }))
    }

    #[must_use]
    pub fn record(&self) -> &ProgressRecord {
        &self.record
    }

    /// The bundle is complete, or nothing of it was kept.
    pub fn forget(self) -> Result<()> {
        remove(&self.state, self.bundle)
    }
}

fn bundles(state: &Path) -> Result<Vec<Uuid>> {
    let names = FileDirectory::open(state, false)?.names()?;
    Ok(names.iter().filter_map(|name| Uuid::try_parse(name).ok()).collect())
}

fn remove(state: &Path, bundle: Uuid) -> Result<()> {
    FileDirectory::open(state, false)?.remove(&bundle.to_string())
}

/// Makes room for one more. What cannot be understood goes first, what is being written stays.
fn forget_oldest(state: &Path) -> Result<()> {
    let mut known = Vec::new();
    for bundle in bundles(state)? {
        match KeptRecord::open(state, bundle) {
            Err(error) if error.kind() == ErrorKind::Busy => {}
            Err(_) | Ok(None) => known.push((0, bundle)),
            Ok(Some(held)) => {
                let begin = BeginManifest::parse(held.record.begin.as_bytes())?;
                known.push((begin.created_unix_s, bundle));
            }
        }
    }
    known.sort_unstable();
    let spare = (known.len() + 1).saturating_sub(BUNDLES_UNFINISHED_MAX);
    known[..spare].iter().try_for_each(|(_, bundle)| remove(state, *bundle))
}
