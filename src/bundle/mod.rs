//! The shippable copy of a volume, byte by byte in `docs/formats.md`.
//!
//! | word | meaning |
//! |---|---|
//! | source | what a bundle is made from |
//! | stretch | a piece of the source on its way into a bundle |
//! | chunk | at most 1 MiB of a volume, stored and verified as one |
//! | batch | chunks described together, ahead of their bytes |
//! | segment | a file of batches, at most 1 GiB, immutable once closed |
//! | medium | a place for a part of a bundle; each can be read without the others |
//! | stream | a bundle as a tar, read once as it comes |
//! | piece | a chunk on its way out of a bundle or an image |
//! | media set | several media of one bundle, as one source |
//! | extraction | a bundle written out as an image |
//! | pump | reading and verifying of pieces, for merging and verifying alike |
//! | plan, job, slot | which pieces go through memory together, and the memory |

mod assemble;
mod carrying;
mod choosing;
mod contents;
mod encode;
mod encryption;
mod extract;
mod extract_clusters;
mod extract_order;
mod extract_stream;
mod journey;
mod keeping;
mod media;
mod media_set;
mod members;
mod pace;
mod partitions;
mod pieces;
mod plan;
mod pump;
mod random_reader;
mod reader;
mod report;
mod resume;
mod segment_reader;
mod segment_stream;
mod selection;
mod snapshot_source;
mod source;
mod tar_reading;
mod tar_stream;
mod trust;
mod verify;
mod worker;
mod writer;

pub use choosing::{Chosen, Wish, choose};
pub use contents::{BundleChunks, BundleRuns, RunKind};
pub use encode::Compression;
pub use encryption::{Encryption, generate_key, random_salt};
pub use extract::{ExtractProgress, ExtractReport, Extraction, OnExtractProgress, Qcow2Plan};
pub use journey::Journey;
pub use media::{BegunBundle, Media, Medium, NoRecord, Record, write, write_on};
pub use media_set::MediaSet;
pub use pieces::{Content, Opener, Piece, PieceSource};
pub use pump::{
    Begun, Consumer, Crew, Event, Feed, MEMORY_BYTES as READ_MEMORY_BYTES, Opened, Outcome, Word,
    run, run_all, stopped, threads_default,
};
pub use random_reader::RandomReader;
pub use reader::Bundle;
pub use segment_reader::{FoundBatch, SegmentReader, read_header};
pub use snapshot_source::{Release, ReleasingSnapshot};
pub use source::{Identity, ImageSource, Lineage, Source};
pub use tar_stream::TarStream;
pub use trust::Trust;
pub use verify::{VerifyProgress, VerifyReport};
pub use writer::{
    BundleProgress, BundleReport, BundleWriter, MEMORY_BYTES as WRITE_MEMORY_BYTES,
    OnBundleProgress, WriterOptions,
};

#[cfg(test)]
mod encrypted_tests;
#[cfg(test)]
mod extract_tests;
#[cfg(test)]
mod media_tests;
#[cfg(test)]
mod signed_tests;
#[cfg(test)]
mod tar_tests;
#[cfg(test)]
mod tests;
