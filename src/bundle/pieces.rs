//! Something that restores bytes, seen piece by piece in the order of its medium.
//!
//! Guarantees: `Piece::open` returns bytes only after every check that the source offers; so what
//! a consumer sees is verified, or of a source that has nothing to verify (law 9).
//! Does not know: where the bytes go.

use std::fmt::Debug;
use std::sync::Arc;

use crate::bundle::source::{Identity, Lineage};
use crate::device::{AlignedBuffer, Device, Engine, FolderFile, Payload};
use crate::error::{Error, Result};
use crate::extent::ByteRange;
use crate::format::bundle::{Checks, ChunkKind, Descriptor, Place, padded};
use crate::format::frames::CutName;

/// What is known of the bytes of a piece.
#[derive(Clone, Debug)]
pub enum Content {
    /// All zero.
    Zero,
    /// A chunk of a bundle, stored at that position of the file.
    Stored {
        file: Arc<dyn FolderFile>,
        position: u64,
        descriptor: Descriptor,
        checks: Arc<Checks>,
        place: Place,
    },
    /// Bytes of a plain image, which carries no checksums.
    Plain(Arc<dyn Device>),
    /// Promised by the source, but damaged or never read; the text says which.
    Missing(&'static str),
}

/// A run of the volume and what a source has for it. At most `BUNDLE_CHUNK_BYTES_MAX` long if it
/// has bytes, of any length otherwise.
#[derive(Clone, Debug)]
pub struct Piece {
    pub range: ByteRange,
    pub content: Content,
}

impl Piece {
    /// Bytes that `read` fetches; 0 if there is nothing to read.
    #[must_use]
    pub fn bytes_to_read(&self) -> usize {
        let length = match &self.content {
            Content::Stored { descriptor, .. } => padded(descriptor.stored_bytes.into()),
            Content::Plain(_) => self.range.length,
            Content::Zero | Content::Missing(_) => 0,
        };
        usize::try_from(length).expect("a piece with bytes is at most 1 MiB")
    }

    /// Whether its bytes are another stretch of memory than its stored form.
    #[must_use]
    pub fn unpacks(&self) -> bool {
        matches!(&self.content, Content::Stored { descriptor, .. }
            if descriptor.kind == ChunkKind::Zstd)
    }

    /// Fetches the stored form into a buffer of `bytes_to_read`.
    pub fn read(&self, stored: &mut [u8]) -> Result<()> {
        assert_eq!(stored.len(), self.bytes_to_read(), "a buffer of the right size");
        match &self.content {
            Content::Stored { file, position, .. } => file.read_at(*position, stored),
            Content::Plain(device) => device.read_at(self.range.offset, stored),
            Content::Zero | Content::Missing(_) => Ok(()),
        }
    }

    /// Verifies the stored form and returns the bytes of the piece, in `stored` itself (decrypted
    /// there) or unpacked into `plain` (at least as long as the piece, if it unpacks).
    pub fn open<'b>(
        &self,
        opener: &mut Opener,
        stored: &'b mut [u8],
        plain: &'b mut [u8],
    ) -> Result<&'b [u8]> {
        let length = usize::try_from(self.range.length).expect("a piece with bytes is small");
        let length = if self.unpacks() { length } else { 0 };
        match &self.content {
            Content::Stored { descriptor, checks, place, .. } => {
                opener.open((checks, *place, descriptor), stored, &mut plain[..length])
            }
            Content::Plain(_) => Ok(stored),
            Content::Zero | Content::Missing(_) => Err(Error::usage("the piece has no bytes")),
        }
    }
}

impl Piece {
    /// Reads and verifies the bytes of a piece that has some, in memory of their own.
    pub(super) fn bytes(&self, opener: &mut Opener) -> Result<Payload> {
        let length = usize::try_from(self.range.length).expect("a piece with bytes is small");
        let mut stored = AlignedBuffer::zeroed(self.bytes_to_read());
        self.read(&mut stored)?;
        let mut plain = AlignedBuffer::zeroed(if self.unpacks() { length } else { 0 });
        self.open(opener, &mut stored, &mut plain)?;
        let bytes = if self.unpacks() { plain } else { stored };
        Ok(Payload::new(bytes).slice(0, length))
    }

    /// Whether the bytes of another follow in the volume and in the file, so that both are one
    /// stretch of memory when they are read.
    pub(super) fn is_followed_by(&self, next: &Self) -> bool {
        let Content::Stored { file, position, descriptor, .. } = &self.content else {
            return false;
        };
        let Content::Stored { file: next_file, position: next_position, descriptor: after, .. } =
            &next.content
        else {
            return false;
        };
        Arc::ptr_eq(file, next_file)
            && (descriptor.kind, after.kind) == (ChunkKind::Data, ChunkKind::Data)
            && self.range.end() == next.range.offset
            && self.range.length == self.bytes_to_read() as u64
            && position + self.range.length == *next_position
    }
}

/// Reads pieces of which each is followed by the next at once, and verifies each by itself.
pub(super) fn read_together(
    group: &[Piece],
    opener: &mut Opener,
) -> Result<(Payload, Vec<Result<()>>)> {
    let Some(Content::Stored { file, position, .. }) = group.first().map(|piece| &piece.content)
    else {
        return Err(Error::usage("expected stored pieces, found others"));
    };
    let mut memory = AlignedBuffer::zeroed(group.iter().map(Piece::bytes_to_read).sum());
    let together = file.read_at(*position, &mut memory);
    let mut at = 0;
    let mut opened = Vec::with_capacity(group.len());
    for piece in group {
        let stored = &mut memory[at..at + piece.bytes_to_read()];
        at += stored.len();
        // One failed read of several pieces says little of each.
        let read = if together.is_ok() { Ok(()) } else { piece.read(stored) };
        opened.push(read.and_then(|()| piece.open(opener, stored, &mut []).map(|_| ())));
    }
    Ok((Payload::new(memory), opened))
}

/// Verifies and unpacks chunks; one per thread, for it keeps the decompressor's memory.
pub struct Opener {
    decompressor: zstd::bulk::Decompressor<'static>,
}

impl Opener {
    pub fn new() -> Result<Self> {
        let decompressor = zstd::bulk::Decompressor::new()
            .map_err(|source| Error::device("prepare decompression", &source))?;
        Ok(Self { decompressor })
    }

    fn open<'b>(
        &mut self,
        (checks, place, descriptor): (&Checks, Place, &Descriptor),
        stored: &'b mut [u8],
        plain: &'b mut [u8],
    ) -> Result<&'b [u8]> {
        let damaged = |what: &str| {
            Err(Error::integrity(format!("a chunk is damaged: {what}"))
                .at_offset(descriptor.range.offset))
        };
        let (stored, padding) = stored.split_at_mut(descriptor.stored_bytes as usize);
        if crc32c::crc32c(stored) != descriptor.crc32c {
            return damaged("its CRC32C does not match");
        }
        if padding.iter().any(|byte| *byte != 0) {
            return damaged("its padding is not zero");
        }
        checks.open(place, descriptor, stored)?;
        let bytes = if descriptor.kind == ChunkKind::Zstd {
            if zstd::zstd_safe::find_frame_compressed_size(stored) != Ok(stored.len()) {
                return damaged("it is not one zstd frame");
            }
            // The place is exactly as long as the chunk, so no frame can ask for more memory.
            match self.decompressor.decompress_to_buffer(stored, plain) {
                Ok(length) if length as u64 == descriptor.range.length => &*plain,
                _ => return damaged("it does not decompress to its length"),
            }
        } else {
            stored
        };
        if !checks.vouches(descriptor, bytes) {
            return damaged("its BLAKE3 does not match");
        }
        Ok(bytes)
    }
}

/// A bundle or an image, as something that a merge or a verification goes through.
pub trait PieceSource: Send + Sync + Debug {
    /// For messages.
    fn name(&self) -> String;
    fn identity(&self) -> Identity;
    /// What it goes on from; `None`: it is no incremental bundle.
    fn lineage(&self) -> Option<Lineage> {
        None
    }
    /// The cut that it is of, if it says by which name the backup knows it.
    fn cut_name(&self) -> Option<CutName> {
        None
    }
    /// Bytes of the volume that it covers: the sum of all pieces.
    fn bytes_total(&self) -> u64;
    /// Whether reads of it usually return without waiting, as `Device::answers_at_once`.
    fn answers_at_once(&self) -> bool;
    /// What must carry out its reads, if not everything can.
    fn engine(&self) -> Option<Engine> {
        None
    }
    /// All pieces, in the order in which the medium is best read. An error ends it.
    fn pieces(&self) -> Box<dyn Iterator<Item = Result<Piece>> + Send + '_>;

    /// Whether `pieces` gives them again when asked again: not what came through a pipe.
    fn is_repeatable(&self) -> bool {
        true
    }

    /// Why fewer pieces came than there are, asked when they have ended.
    fn shortfall(&self) -> Option<Error> {
        None
    }

    /// Ends a wait of `pieces` for bytes that do not come; called from another thread.
    fn interrupt(&self) {}
}
