//! What a bundle holds, in the order in which it is stored: as runs, and chunk by chunk.
//!
//! Guarantees: bytes are given only after every check of their chunk (law 9); of runs that touch
//! and are alike one is made; what is damaged, unreadable or not included is in no run (law 8).
//! Memory is that of a batch's descriptors and of one stretch of at most 1 MiB.
//! Does not know: who reads.

use std::collections::VecDeque;
use std::sync::Arc;

use super::pieces::{Content, Opener, Piece, read_together};
use super::reader::{Bundle, Pieces};
use crate::device::Payload;
use crate::error::{Error, Result};
use crate::extent::ByteRange;
use crate::limits::BUNDLE_CHUNK_BYTES_MAX;

const CHUNK_BYTES: usize = BUNDLE_CHUNK_BYTES_MAX as usize;

/// What a run is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunKind {
    Data,
    Zero,
}

type AllPieces = Box<dyn Iterator<Item = Result<Piece>> + Send>;

fn pieces_of(bundle: Arc<Bundle>) -> AllPieces {
    let segments = bundle.segments().len();
    Box::new(Pieces::of((0..segments).map(move |segment| (Arc::clone(&bundle), segment))))
}

/// Runs of a bundle, ascending.
pub struct BundleRuns {
    pieces: AllPieces,
    held: Option<(ByteRange, RunKind)>,
    /// The first byte after all runs so far.
    end: u64,
}

impl BundleRuns {
    #[must_use]
    pub fn of(bundle: Arc<Bundle>) -> Self {
        Self { pieces: pieces_of(bundle), held: None, end: 0 }
    }

    /// The next run; `None` after the last.
    pub fn next_run(&mut self) -> Result<Option<(ByteRange, RunKind)>> {
        for piece in self.pieces.by_ref() {
            let Piece { range, content } = piece?;
            let kind = match content {
                Content::Stored { .. } | Content::Plain(_) => RunKind::Data,
                Content::Zero => RunKind::Zero,
                Content::Missing(_) => continue,
            };
            if range.offset < self.end {
                return Err(Error::format(
                    "expected descriptors in ascending order, found one that goes back",
                )
                .at_offset(range.offset));
            }
            self.end = range.end();
            match &mut self.held {
                Some((run, held)) if *held == kind && run.end() == range.offset => {
                    run.length += range.length;
                }
                held => {
                    if let Some(run) = held.replace((range, kind)) {
                        return Ok(Some(run));
                    }
                }
            }
        }
        Ok(self.held.take())
    }
}

/// Stretches of a bundle that have bytes, one after the other: chunks that follow each other, read
/// together.
pub struct BundleChunks {
    pieces: AllPieces,
    opener: Opener,
    /// Read from the pieces, and not read into memory yet.
    next: Option<Piece>,
    ready: VecDeque<Result<(u64, Payload)>>,
}

impl BundleChunks {
    pub fn of(bundle: Arc<Bundle>) -> Result<Self> {
        let (pieces, opener) = (pieces_of(bundle), Opener::new()?);
        Ok(Self { pieces, opener, next: None, ready: VecDeque::new() })
    }

    /// The next stretch, of at most `BUNDLE_CHUNK_BYTES_MAX`, and where it lies in the volume;
    /// `None` after the last. After an error of one chunk the next may be asked for.
    pub fn next_chunk(&mut self) -> Result<Option<(u64, Payload)>> {
        while self.ready.is_empty() {
            let Some(first) = self.next_piece()? else { return Ok(None) };
            match first.content {
                Content::Zero => {}
                Content::Missing(why) => {
                    return Err(Error::integrity(why).at_offset(first.range.offset));
                }
                Content::Stored { .. } | Content::Plain(_) if first.unpacks() => {
                    let bytes = first.bytes(&mut self.opener)?;
                    return Ok(Some((first.range.offset, bytes)));
                }
                Content::Stored { .. } | Content::Plain(_) => self.read_on(first)?,
            }
        }
        self.ready.pop_front().transpose()
    }

    fn next_piece(&mut self) -> Result<Option<Piece>> {
        self.next.take().map_or_else(|| self.pieces.next().transpose(), |piece| Ok(Some(piece)))
    }

    /// Reads a piece and those that follow it at once, and verifies each.
    fn read_on(&mut self, first: Piece) -> Result<()> {
        let mut group = vec![first];
        let mut bytes = group[0].bytes_to_read();
        while let Some(piece) = self.next_piece()? {
            let last = &group[group.len() - 1];
            if !last.is_followed_by(&piece) || bytes + piece.bytes_to_read() > CHUNK_BYTES {
                self.next = Some(piece);
                break;
            }
            bytes += piece.bytes_to_read();
            group.push(piece);
        }
        let (memory, opened) = read_together(&group, &mut self.opener)?;
        self.join(&group, opened, &memory);
        Ok(())
    }

    /// Makes one stretch of what was verified and lies side by side.
    fn join(&mut self, group: &[Piece], opened: Vec<Result<()>>, memory: &Payload) {
        let mut at = 0;
        let mut run: Option<(u64, usize, usize)> = None;
        for (piece, opened) in group.iter().zip(opened) {
            let length = piece.range.length as usize;
            match opened {
                Ok(()) => {
                    let (_, _, held) = run.get_or_insert((piece.range.offset, at, 0));
                    *held += length;
                }
                Err(error) => {
                    let before =
                        run.take().map(|(offset, at, held)| (offset, memory.slice(at, held)));
                    self.ready.extend(before.map(Ok));
                    self.ready.push_back(Err(error));
                }
            }
            at += piece.bytes_to_read();
        }
        let last = run.map(|(offset, at, held)| (offset, memory.slice(at, held)));
        self.ready.extend(last.map(Ok));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bundle::tests::{SIZE, go_on, image, options, source_of, with_changed};
    use crate::bundle::{BundleWriter, WriterOptions};
    use crate::device::RamFolder;
    use crate::error::ErrorKind;

    fn made(options: &WriterOptions) -> RamFolder {
        let folder = RamFolder::new();
        let source = source_of(image());
        BundleWriter::create_in(&folder, &source, options, &mut |_| go_on()).expect("made");
        folder
    }

    fn opened(folder: &RamFolder) -> Arc<Bundle> {
        Arc::new(Bundle::open_in(Arc::new(folder.clone())).expect("whole"))
    }

    fn runs_of(folder: &RamFolder) -> Vec<(ByteRange, RunKind)> {
        let mut runs = BundleRuns::of(opened(folder));
        std::iter::from_fn(|| runs.next_run().expect("ascending")).collect()
    }

    #[test]
    fn runs_ascend_are_joined_and_tell_zeros_from_contents() {
        let runs = runs_of(&made(&options()));
        let mut at = 0;
        let mut kind = None;
        for (range, held) in &runs {
            assert_eq!(range.offset, at, "all of the volume is in the bundle");
            assert_ne!(kind, Some(*held), "runs that touch are joined");
            let bytes = &image()[range.offset as usize..range.end() as usize];
            assert!(*held == RunKind::Data || bytes.iter().all(|byte| *byte == 0), "{range:?}");
            (at, kind) = (range.end(), Some(*held));
        }
        assert_eq!(at, SIZE as u64);
        assert!(runs.len() > 4, "{runs:?}");
    }

    #[test]
    fn what_is_not_included_or_not_described_any_more_is_in_no_run() {
        let selection = vec![ByteRange::new(4096, 8192), ByteRange::new(4 << 20, 4096)];
        let runs = runs_of(&made(&WriterOptions { selection: selection.clone(), ..options() }));
        assert_eq!(runs.iter().map(|run| run.0).collect::<Vec<_>>(), selection);
        let folder = made(&options());
        let bad = with_changed(&folder, "seg-00000000.drs", |bytes| bytes[4096 + 99] ^= 1);
        assert!(runs_of(&bad).first().expect("others").0.offset > 0);
    }

    #[test]
    fn chunks_are_the_bytes_of_the_image_and_one_that_is_damaged_costs_itself() {
        let folder = made(&options());
        let bad = with_changed(&folder, "seg-00000000.drs", |bytes| bytes[40_000] ^= 1);
        for (folder, damaged) in [(folder, 0), (bad, 1)] {
            let mut chunks = BundleChunks::of(opened(&folder)).expect("made");
            let (mut bytes, mut refused, mut longest) = (0, 0, 0);
            loop {
                match chunks.next_chunk() {
                    Ok(None) => break,
                    Ok(Some((offset, chunk))) => {
                        assert!(chunk[..] == image()[offset as usize..][..chunk.len()]);
                        bytes += chunk.len() as u64;
                        longest = longest.max(chunk.len());
                    }
                    Err(error) => {
                        assert_eq!(error.kind(), ErrorKind::Integrity);
                        refused += 1;
                    }
                }
            }
            assert_eq!(refused, damaged);
            assert!(longest > 512 << 10, "those that follow each other are read as one");
            let runs = runs_of(&folder);
            let data = runs.iter().filter(|run| run.1 == RunKind::Data);
            let data: u64 = data.map(|run| run.0.length).sum();
            let lost = data - bytes;
            assert!(lost == 0 || damaged == 1 && lost <= 64 << 10, "{lost} bytes");
        }
    }
}
