//! What is on a medium that a bundle is to go on with.
//!
//! | found | it is |
//! |---|---|
//! | nothing, or the first members, perhaps torn | to be begun |
//! | the bundle's begin manifest and segments, no manifest | to be gone on with |
//! | its manifest, of the medium that comes next | finished; the host's record did not say so |
//! | its manifest, of an earlier medium | passed over |
//! | anything else | refused, and left alone |
//!
//! A segment is closed if header, index, trailer and all descriptor pages are whole and it speaks
//! of what comes next in the selection. Each was durable before the next was begun, so only of the
//! last one the stored bytes may be lost after a power failure: they are read and checked.
//!
//! Guarantees: what is kept is what a reader would accept; what is removed is the segment that was
//! open and the manifest that was not renamed.
//! Does not know: the source.

use std::sync::Arc;

use super::media::BegunBundle;
use super::members::{BEGIN_NAME, MANIFEST_NAME, REPORT_NAME, UNFINISHED_NAME};
use super::reader::{read_manifest, read_member};
use super::segment_reader::{FoundBatch, SegmentReader, read_header};
use crate::device::{AlignedBuffer, Folder, FolderFile};
use crate::error::{Error, Result};
use crate::extent::ByteRange;
use crate::format::bundle::{
    ChunkKind, Descriptor, Done, HexHash, Manifest, Run, SegmentEntry, SegmentHeader, padded,
    segment_name,
};
use crate::limits::{BUNDLE_CHUNK_BYTES_MAX, BUNDLE_MANIFEST_BYTES_MAX};

/// See the module.
#[derive(Debug)]
pub enum Found {
    Earlier,
    Finished(Box<Manifest>),
    /// The segments that it holds.
    Begun(Vec<SegmentEntry>),
}

/// Looks at a medium and removes what was not finished.
pub fn examine(folder: &dyn Folder, begun: &BegunBundle, done: &Done) -> Result<Found> {
    let names = folder.names()?;
    let has = |name: &str| names.iter().any(|held| held == name);
    if has(MANIFEST_NAME) {
        return finished(read_manifest(folder)?.0, begun, done);
    }
    let members = begun.members();
    let ours = members.iter().map(|(name, _)| *name).chain([REPORT_NAME, UNFINISHED_NAME]);
    let ours: Vec<&str> = ours.collect();
    let stranger = names.iter().any(|name| !ours.contains(&&**name) && !is_segment(name));
    if stranger || !members_are_ours(folder, begun, &names)? {
        return Err(not_empty());
    }
    if !has(BEGIN_NAME)
        || read_member(folder, BEGIN_NAME, BUNDLE_MANIFEST_BYTES_MAX)? != begun.bytes
    {
        // The members were not complete, so there was no segment yet.
        return if names.iter().any(|name| is_segment(name)) {
            Err(not_empty())
        } else {
            Ok(Found::Begun(Vec::new()))
        };
    }
    for name in [UNFINISHED_NAME, REPORT_NAME] {
        folder.remove(name)?;
    }
    closed_segments(folder, begun, done, &names).map(Found::Begun)
}

fn not_empty() -> Error {
    Error::usage(
        "expected a new or an empty directory, or one that this bundle was being written to, found \
         other files in it; name another directory or empty this one",
    )
}

fn is_segment(name: &str) -> bool {
    number_of(name).is_some()
}

fn number_of(name: &str) -> Option<u32> {
    let number = name.strip_prefix("seg-")?.strip_suffix(".drs")?.parse().ok()?;
    (segment_name(number) == name).then_some(number)
}

/// Whether each member that is there is the beginning of what we write.
fn members_are_ours(folder: &dyn Folder, begun: &BegunBundle, names: &[String]) -> Result<bool> {
    for (name, bytes) in begun.members() {
        if names.iter().any(|held| held == name)
            && !bytes.starts_with(&read_member(folder, name, BUNDLE_MANIFEST_BYTES_MAX)?)
        {
            return Ok(false);
        }
    }
    Ok(true)
}

fn finished(manifest: Manifest, begun: &BegunBundle, done: &Done) -> Result<Found> {
    if manifest.begin_hash.0 != begun.hash {
        return Err(Error::usage(format!(
            "expected an empty medium, or one of bundle {}, found one of bundle {}: name another",
            begun.manifest.bundle.0, manifest.begin.bundle.0
        )));
    }
    let number = manifest.medium.map_or(1, |medium| medium.number);
    if number <= done.media {
        return Ok(Found::Earlier);
    }
    let goes_on = manifest.segments.first().is_none_or(|first| first.number == done.segment)
        && follows(&manifest.segments, begun, done.position);
    if number == done.media + 1 && goes_on {
        return Ok(Found::Finished(Box::new(manifest)));
    }
    Err(Error::usage(format!(
        "expected an empty medium, or medium {} of the bundle, found medium {number}, which was \
         written after another one: name another",
        done.media + 1
    )))
}

/// Whether the segments cover exactly the part of the selection that begins there.
fn follows(segments: &[SegmentEntry], begun: &BegunBundle, position: u64) -> bool {
    let mut rest = begun.rest(position).into_iter().peekable();
    segments.iter().flat_map(|entry| &entry.coverage).all(|run| {
        let mut at = run.0;
        while at < run.1 {
            let Some(next) = rest.peek_mut() else { return false };
            if next.offset != at {
                return false;
            }
            let end = next.end().min(run.1);
            *next = ByteRange::new(end, next.end() - end);
            if next.is_empty() {
                rest.next();
            }
            at = end;
        }
        true
    })
}

fn closed_segments(
    folder: &dyn Folder,
    begun: &BegunBundle,
    done: &Done,
    names: &[String],
) -> Result<Vec<SegmentEntry>> {
    let mut numbers: Vec<u32> = names.iter().filter_map(|name| number_of(name)).collect();
    numbers.sort_unstable();
    if numbers.first().is_some_and(|first| *first != done.segment) {
        return Err(Error::usage(format!(
            "expected the bundle to go on with segment {}, found segment {} on the medium: it is \
             of an earlier try; empty it, or name another",
            done.segment, numbers[0]
        )));
    }
    let mut closed: Vec<SegmentEntry> = Vec::new();
    let mut position = done.position;
    for (number, expected) in numbers.iter().zip(done.segment..) {
        let entry = (*number == expected)
            .then(|| closed_segment(folder, begun, *number))
            .and_then(Result::ok)
            .filter(|entry| follows(std::slice::from_ref(entry), begun, position));
        let Some(entry) = entry else { break };
        position = entry.coverage.last().map_or(position, |run| run.1);
        closed.push(entry);
    }
    if closed.last().is_some_and(|last| !stored_whole(folder, begun, last)) {
        closed.pop();
    }
    for number in &numbers[closed.len()..] {
        folder.remove(&segment_name(*number))?;
    }
    if let Some(last) = closed.last() {
        folder.open(&last.name)?.flush()?;
    }
    folder.flush()?;
    Ok(closed)
}

fn open_closed(
    folder: &dyn Folder,
    begun: &BegunBundle,
    number: u32,
) -> Result<(SegmentReader, HexHash, Option<HexHash>)> {
    let file = folder.open(&segment_name(number))?;
    let (header, hash) = read_header(file.as_ref())?;
    let expected = begun.header(number);
    let sealed = header.salt.is_some() == begun.encryption.is_some();
    if (SegmentHeader { salt: None, ..header }) != expected || !sealed {
        return Err(Error::identity("the segment is of another bundle"));
    }
    let checks = Arc::new(header.checks(hash, begun.key())?);
    let reader = SegmentReader::open(file, number, begun.geometry(), checks)?;
    Ok((reader, HexHash(hash), header.salt.map(HexHash)))
}

/// The entry of a segment that was closed, from the segment itself.
fn closed_segment(folder: &dyn Folder, begun: &BegunBundle, number: u32) -> Result<SegmentEntry> {
    let (mut reader, header_hash, salt) = open_closed(folder, begun, number)?;
    let not_closed = || Error::integrity("the segment was not closed");
    let trailer = *reader.trailer().ok_or_else(not_closed)?;
    let mut coverage: Vec<Run> = Vec::new();
    let mut chunks = 0;
    while let Some(FoundBatch { batch, .. }) = reader.next_batch() {
        chunks += batch.descriptors.len() as u64;
        for Descriptor { range, .. } in batch.descriptors {
            match coverage.last_mut() {
                Some(last) if last.1 == range.offset => last.1 = range.end(),
                _ => coverage.push(Run::from(range)),
            }
        }
    }
    if reader.root() != trailer.root || chunks != trailer.chunks {
        return Err(not_closed());
    }
    Ok(SegmentEntry {
        name: segment_name(number),
        number,
        bytes: trailer.file_bytes(),
        header_hash,
        root: HexHash(trailer.root),
        chunks,
        data_bytes: trailer.data_bytes,
        zero_bytes: trailer.zero_bytes,
        unreadable_bytes: trailer.unreadable_bytes,
        stored_bytes: trailer.stored_bytes,
        coverage,
        salt,
    })
}

/// Whether all that a segment stores is there, by the CRC32C of each chunk.
fn stored_whole(folder: &dyn Folder, begun: &BegunBundle, entry: &SegmentEntry) -> bool {
    let Ok((mut reader, ..)) = open_closed(folder, begun, entry.number) else { return false };
    let mut memory = AlignedBuffer::zeroed(BUNDLE_CHUNK_BYTES_MAX as usize);
    while let Some(FoundBatch { batch, payload_position, .. }) = reader.next_batch() {
        for descriptor in &batch.descriptors {
            if !chunk_whole(&**reader.file(), payload_position, descriptor, &mut memory) {
                return false;
            }
        }
    }
    true
}

fn chunk_whole(
    file: &dyn FolderFile,
    payload: u64,
    descriptor: &Descriptor,
    memory: &mut [u8],
) -> bool {
    if !descriptor.kind.is_stored() {
        return true;
    }
    let stored = u64::from(descriptor.stored_bytes);
    let bytes = &mut memory[..padded(stored) as usize];
    file.read_at(payload + u64::from(descriptor.payload_offset), bytes).is_ok()
        && crc32c::crc32c(&bytes[..stored as usize]) == descriptor.crc32c
}

/// The runs of a segment that its source could not read.
pub fn unreadable_of(
    folder: &dyn Folder,
    begun: &BegunBundle,
    entry: &SegmentEntry,
) -> Result<Vec<ByteRange>> {
    let (mut reader, ..) = open_closed(folder, begun, entry.number)?;
    let mut runs = Vec::new();
    while let Some(FoundBatch { batch, .. }) = reader.next_batch() {
        let lost = batch.descriptors.iter().filter(|one| one.kind == ChunkKind::Unreadable);
        runs.extend(lost.map(|one| one.range));
    }
    Ok(runs)
}
