//! A bundle from its order to its last medium: begun or gone on with, on directories.
//!
//! | ended by | media | record |
//! |---|---|---|
//! | the last medium | whole | removed |
//! | no further medium at hand | whole | kept: `--continue` with the next one |
//! | an error or a request to stop | closed segments stay | kept, if any stayed |
//!
//! Guarantees: every medium that is named is looked at before the first byte is written; a bundle
//! of which nothing was kept leaves nothing behind.
//! Does not know: how a source is named, what tells that it did not change.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use uuid::Uuid;

use super::keeping::KeptRecord;
use super::media::{BegunBundle, Media, Medium, NoRecord, write_on};
use super::members::{BEGIN_NAME, MANIFEST_NAME};
use super::reader::{read_manifest, read_member};
use super::resume::{Found, examine};
use super::selection::normalised;
use super::source::Source;
use super::writer::{BundleReport, OnBundleProgress, WriterOptions, check};
use crate::device::{FileFolder, Folder};
use crate::error::{Error, Result};
use crate::format::bundle::{BeginManifest, Done, ProgressRecord, Run};
use crate::limits::BUNDLE_MANIFEST_BYTES_MAX;

/// What to make, and where.
#[derive(Debug)]
pub struct Journey<'a> {
    pub source: &'a dyn Source,
    /// What the source is called, and what would differ if it were another or had changed.
    pub name: &'a str,
    pub mark: &'a str,
    /// In order.
    pub media: &'a [PathBuf],
    /// Bytes of all files of one medium; `None`: as many as it takes.
    pub medium_bytes_max: Option<u64>,
    /// Go on with a bundle of that source which is not complete.
    pub proceed: bool,
    /// Where the host keeps its records; `None`: nobody can go on with this bundle.
    pub state: Option<&'a Path>,
}

impl Journey<'_> {
    /// Makes the bundle, or as much of it as the media take.
    pub fn make(
        &self,
        options: &WriterOptions,
        progress: OnBundleProgress<'_>,
    ) -> Result<BundleReport> {
        check(options)?;
        if !options.selection.is_empty() {
            normalised(&options.selection, self.source.identity().geometry)?;
        }
        self.check_paths()?;
        let mut media = Directories::new(self);
        let mut options = options.clone();
        let (begun, mut kept) = if self.proceed {
            let kept = self.find(&options)?;
            options.segment_bytes_max = kept.record().segment_bytes_max;
            options.encryption = kept.encryption()?;
            let begin = kept.record().begin.clone().into_bytes();
            (BegunBundle::from_bytes(begin, options.encryption.clone())?, Some(kept))
        } else {
            let begun = BegunBundle::new(self.source, &options)?;
            let record =
                ProgressRecord::new(self.name, self.mark, &begun.bytes, options.segment_bytes_max);
            let kept = self.state.map(|state| KeptRecord::begin(state, &begun, record));
            (begun, kept.transpose()?)
        };
        let done = kept.as_ref().map_or_else(Done::default, |kept| kept.record().done.clone());
        let begin = (&begun, done);
        let written = match &mut kept {
            Some(kept) => write_on(self.source, &mut media, &options, begin, kept, progress),
            None => write_on(self.source, &mut media, &options, begin, &mut NoRecord, progress),
        };
        let over = match &written {
            Ok(report) => report.bytes_left == 0,
            Err(_) => {
                let done = kept.as_ref().map(|kept| kept.record().done.clone());
                !media.keep_what_is_closed(&begun, &done.unwrap_or_default())
            }
        };
        if let (true, Some(kept)) = (over, kept) {
            kept.forget()?;
        }
        written
    }

    /// Refuses what could not be written on, before anything is made.
    fn check_paths(&self) -> Result<()> {
        for (at, path) in self.media.iter().enumerate() {
            if self.media[..at].contains(path) {
                return Err(Error::usage(
                    "expected each medium once, found this one twice: name another",
                )
                .at_path(path));
            }
            if !self.proceed && path.exists() {
                FileFolder::create(path)?;
            }
        }
        Ok(())
    }

    /// The record of the bundle to go on with, if this is still the same source and selection.
    fn find(&self, options: &WriterOptions) -> Result<KeptRecord> {
        let state = self.state.ok_or_else(|| {
            Error::usage("expected a place where records of unfinished bundles are kept")
        })?;
        let seen: Vec<Uuid> = self.media.iter().filter_map(|path| bundle_on(path)).collect();
        let kept = KeptRecord::find(state, self.name, &seen)?;
        let record = kept.record();
        if record.mark != self.mark {
            return Err(Error::identity(format!(
                "expected {} as it was when the bundle was begun ({}), found it changed ({}): make \
                 the bundle anew, without --continue",
                self.name, record.mark, self.mark
            )));
        }
        let begin = BeginManifest::parse(record.begin.as_bytes())?;
        let identity = self.source.identity();
        let volume = begin.volume.map_or(Uuid::nil(), |volume| volume.0);
        let same = (volume, begin.generation, begin.cut)
            == (identity.volume, identity.generation, identity.cut);
        if !same || begin.geometry()? != identity.geometry {
            return Err(Error::identity(format!(
                "expected volume {volume} at generation {}, cut {}, of which the bundle was begun, \
                 found another: make a new bundle, without --continue",
                begin.generation, begin.cut
            )));
        }
        if !options.selection.is_empty() {
            let wished = normalised(&options.selection, identity.geometry)?;
            if !wished.iter().map(|range| Run::from(*range)).eq(begin.selection) {
                return Err(Error::usage(
                    "expected the selection that the bundle was begun with, found another: leave \
                     it out to go on, or make a new bundle without --continue",
                ));
            }
        }
        Ok(kept)
    }
}

/// The bundle that a directory holds a medium of, finished or not.
fn bundle_on(path: &Path) -> Option<Uuid> {
    let folder = FileFolder::open(path).ok()?;
    if let Ok((manifest, _)) = read_manifest(&folder) {
        return Some(manifest.begin.bundle.0);
    }
    let begin = read_member(&folder, BEGIN_NAME, BUNDLE_MANIFEST_BYTES_MAX).ok()?;
    BeginManifest::parse(&begin).ok().map(|begin| begin.bundle.0)
}

/// Directories as media.
struct Directories {
    paths: VecDeque<PathBuf>,
    bytes_max: Option<u64>,
    proceed: bool,
    latest: Option<Arc<FileFolder>>,
}

impl Directories {
    fn new(journey: &Journey<'_>) -> Self {
        Self {
            paths: journey.media.iter().cloned().collect(),
            bytes_max: journey.medium_bytes_max,
            proceed: journey.proceed,
            latest: None,
        }
    }

    /// After a failure: whether anything is worth going on with. What is not is removed.
    fn keep_what_is_closed(&self, begun: &BegunBundle, done: &Done) -> bool {
        let Some(folder) = &self.latest else { return done.media > 0 };
        let finished = folder.names().is_ok_and(|names| names.iter().any(|n| n == MANIFEST_NAME));
        let held = match examine(&**folder, begun, done) {
            Ok(Found::Begun(held)) => !held.is_empty(),
            Ok(Found::Finished(_)) => true,
            Ok(Found::Earlier) | Err(_) => false,
        };
        if !held && !finished {
            folder.discard();
        }
        held || done.media > 0
    }
}

impl Media for Directories {
    fn next(&mut self, _: u32) -> Result<Option<Medium>> {
        self.latest = None;
        let Some(path) = self.paths.pop_front() else { return Ok(None) };
        let folder = match self.proceed {
            true => FileFolder::resume(&path)?,
            false => FileFolder::create(&path)?,
        };
        let folder = Arc::new(folder);
        self.latest = Some(Arc::clone(&folder));
        Ok(Some(Medium { folder, bytes_max: self.bytes_max }))
    }

    fn has_more(&self) -> bool {
        !self.paths.is_empty()
    }
}
