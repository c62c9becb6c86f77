//! The bundle's formats: segment files of checked pages and payloads, and two JSON manifests.
//! Byte by byte in `docs/formats.md`. Bytes to values and back; no I/O.

mod batch;
mod bounded;
mod checks;
mod key;
mod manifest;
mod page;
mod segment;

pub use batch::{
    Batch, ChunkKind, DESCRIPTORS_PER_PAGE, Descriptor, PageHead, encode_batch, pages_for,
    parse_batch, parse_page_head,
};
pub use checks::{Checks, Place};
pub use key::{BundleKey, KEY_BYTES, Salt, locked};
pub use manifest::{
    BeginManifest, Encryption, HexHash, Manifest, Run, SegmentEntry, UuidText, segment_name,
};
pub use page::{PAGE_BYTES, Page, padded};
pub use segment::{IndexEntry, SegmentHeader, Trailer, encode_index, index_bytes, parse_index};

/// BLAKE3, 32 bytes.
pub type Hash = [u8; 32];
