//! A bundle as a tar that comes through a pipe: gone through once, in the order in which it comes.
//!
//! | member | |
//! |---|---|
//! | `manifest.begin.json`, the manifest, or the first segment's header | whose bundle it is |
//! | a segment | its batches, each chunk handed on as soon as it is there |
//! | the manifest | kept: at the end it says what should have come |
//! | any other | passed by |
//!
//! Guarantees: the identity is known before the first piece is given, and no piece of another
//! bundle follows; members may come in any order; what did not come, or came damaged, is given as
//! missing once the manifest has told of it (law 8). Memory is that of the chunks that a pump
//! holds, a group of them, the manifest, and the runs of damaged segments.
//! Does not know: targets.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

use uuid::Uuid;

use super::media_set::check_whole;
use super::pieces::{Piece, PieceSource};
use super::reader::{cut_name, lineage_of};
use super::source::{Identity, Lineage};
use super::tar_reading::{Ending, Known, Reading};
use crate::device::{ByteStream, Stop};
use crate::error::{Error, Result};
use crate::extent::{ByteRange, ByteRuns};
use crate::format::bundle::{BundleKey, Manifest, locked};
use crate::format::frames::CutName;

/// See the module.
#[derive(Debug)]
pub struct TarStream {
    name: String,
    stop: Stop,
    known: Known,
    cut_name: Option<CutName>,
    lineage: Option<Lineage>,
    selection: Option<Vec<ByteRange>>,
    /// Taken when the pieces are asked for.
    reading: Mutex<Option<Reading>>,
    ending: Mutex<Ending>,
}

impl TarStream {
    /// Reads on until it is known whose bundle it is. `stop` is the stream's own.
    pub fn open(stream: Box<dyn ByteStream>, name: &str, stop: Stop) -> Result<Self> {
        let mut reading = Reading::new(stream);
        while reading.known.is_none() {
            if !reading.next_member()? {
                return Err(reading.nothing());
            }
        }
        // The key of an encrypted bundle comes before its segments.
        while reading.is_encrypted() && reading.wrapped_key.is_none() && !reading.is_at_segment() {
            if !reading.next_member()? {
                break;
            }
        }
        let known = reading.known.expect("just seen");
        if known.base_cut.is_some() && reading.begin.is_none() {
            return Err(Error::format(
                "expected manifest.begin.json before the segments of an incremental bundle, found \
                 a segment: unpack the tar, or make it with `tar --sort=name`",
            ));
        }
        let runs = reading.begin.as_ref().map(|begin| &begin.selection);
        let selection = runs.map(|runs| runs.iter().map(|run| ByteRange::from(*run)).collect());
        Ok(Self {
            name: name.to_owned(),
            stop,
            known,
            cut_name: reading.begin.as_ref().and_then(cut_name),
            lineage: reading.begin.as_ref().and_then(lineage_of),
            selection,
            reading: Mutex::new(Some(reading)),
            ending: Mutex::default(),
        })
    }

    #[must_use]
    pub fn uuid(&self) -> Uuid {
        self.known.bundle
    }

    /// What it is to include. Refused where that comes after the first segment.
    pub fn selection(&self) -> Result<ByteRuns> {
        let selection = self.selection.as_ref().ok_or_else(|| {
            Error::format(
                "expected manifest.begin.json before the segments, found a segment: unpack the \
                 tar, or make it with `tar --sort=name`",
            )
        })?;
        let mut runs = ByteRuns::default();
        for run in selection {
            runs.add(*run);
        }
        Ok(runs)
    }

    /// Refuses one that does not include all of the volume.
    pub fn check_complete(&self) -> Result<()> {
        let whole = self.known.identity.geometry.all_bytes();
        let absent = self.selection()?.gaps(whole).iter().map(|gap| gap.length).sum();
        check_whole(whole.length, absent, self.lineage.is_some())
    }

    /// `key.age`, if the bundle is encrypted and it has come.
    pub fn wrapped_key(&self) -> Result<Option<Vec<u8>>> {
        let reading = self.reading.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(reading) = reading.as_ref() else { return Ok(None) };
        if reading.is_encrypted() && reading.wrapped_key.is_none() {
            return Err(locked(
                "expected key.age before the segments of an encrypted bundle, found none: make \
                 the tar with `tar --sort=name`",
            ));
        }
        Ok(reading.wrapped_key.clone())
    }

    /// Gives the key of an encrypted bundle, and only of one.
    pub fn unlock(&self, key: Option<&BundleKey>) -> Result<()> {
        let mut reading = self.reading.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(reading) = reading.as_mut() else { return Ok(()) };
        if let Some(begin) = &reading.begin {
            begin.expect_key(key)?;
        }
        reading.key = key.cloned();
        Ok(())
    }

    /// Damage that cost no chunk, once all pieces have been given.
    #[must_use]
    pub fn blemishes(&self) -> Vec<String> {
        self.ending().blemishes.clone()
    }

    /// The manifest, once all pieces have been given and if it came.
    #[must_use]
    pub fn manifest(&self) -> Option<Manifest> {
        self.ending().manifest.clone()
    }

    /// Goes through all of it for the manifest alone.
    pub fn read_manifest(&self) -> Result<Manifest> {
        let reading = self.reading.lock().unwrap_or_else(PoisonError::into_inner).take();
        let mut reading =
            reading.ok_or_else(|| Error::usage("the tar was gone through already"))?;
        while reading.manifest.is_none() && reading.next_member()? {}
        let absent =
            || Error::format("the tar has no manifest.json: it was cut off, or unfinished");
        reading.manifest.ok_or_else(absent)
    }

    fn ending(&self) -> MutexGuard<'_, Ending> {
        self.ending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl PieceSource for TarStream {
    fn name(&self) -> String {
        format!("bundle in the tar from {}", self.name)
    }

    fn identity(&self) -> Identity {
        self.known.identity
    }

    fn cut_name(&self) -> Option<CutName> {
        self.cut_name
    }

    fn lineage(&self) -> Option<Lineage> {
        self.lineage.clone()
    }

    fn bytes_total(&self) -> u64 {
        let whole = self.known.identity.geometry.size();
        self.selection.as_ref().map_or(whole, |runs| runs.iter().map(|run| run.length).sum())
    }

    fn pieces(&self) -> Box<dyn Iterator<Item = Result<Piece>> + Send + '_> {
        let reading = self.reading.lock().unwrap_or_else(PoisonError::into_inner).take();
        Box::new(Pieces { source: self, reading, queue: VecDeque::new() })
    }

    fn answers_at_once(&self) -> bool {
        // So that of the workers only the one that plans waits for the stream.
        true
    }

    fn is_repeatable(&self) -> bool {
        false
    }

    fn shortfall(&self) -> Option<Error> {
        self.ending().shortfall.clone()
    }

    fn interrupt(&self) {
        self.stop.now();
    }
}

struct Pieces<'a> {
    source: &'a TarStream,
    /// `None`: at the end.
    reading: Option<Reading>,
    queue: VecDeque<Piece>,
}

impl Iterator for Pieces<'_> {
    type Item = Result<Piece>;

    fn next(&mut self) -> Option<Result<Piece>> {
        loop {
            if let Some(piece) = self.queue.pop_front() {
                return Some(Ok(piece));
            }
            match self.reading.as_mut()?.advance(&mut self.queue) {
                Ok(true) => {}
                Ok(false) => {
                    let reading = self.reading.take().expect("just used");
                    match reading.end(&mut self.queue) {
                        Ok(ending) => *self.source.ending() = ending,
                        Err(error) => return Some(Err(error)),
                    }
                }
                Err(error) => {
                    self.reading = None;
                    return Some(Err(error));
                }
            }
        }
    }
}
