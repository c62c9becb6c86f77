//! Bundles made of snapshots, on their way to the primary.
//!
//! | bundle | holds | damage |
//! |---|---|---|
//! | real, in some lives | the product's segments, in memory, written and read by it | a bit |
//! | assumed | what a reader of such a bundle would give | chunks that it would refuse |
//!
//! Guarantees: what is damaged is known to be. Does not know: who merges it.

use std::collections::BTreeSet;
use std::ops::ControlFlow;
use std::sync::Arc;

use uuid::Uuid;

use super::world::World;
use crate::bundle::{
    Bundle, BundleWriter, Identity, Piece, PieceSource, RandomReader, Source, WriterOptions,
};
use crate::device::{AlignedBuffer, Folder, RamFolder};
use crate::error::{Error, Result};
use crate::extent::ByteRange;
use crate::format::frames::CutName;
use crate::snapshot::SnapshotView;

const CARRIED_MAX: usize = 3;
/// What is damaged together in an assumed bundle.
const CHUNK_BYTES: u64 = 1024;

/// What a reader of a bundle would give.
#[derive(Debug)]
struct Assumed {
    identity: Identity,
    cut: CutName,
    bytes: Vec<u8>,
    /// Chunks that are damaged.
    damaged: BTreeSet<u64>,
}

impl PieceSource for Assumed {
    fn name(&self) -> String {
        "assumed bundle".to_owned()
    }

    fn identity(&self) -> Identity {
        self.identity
    }

    fn cut_name(&self) -> Option<CutName> {
        Some(self.cut)
    }

    fn bytes_total(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn answers_at_once(&self) -> bool {
        true
    }

    fn pieces(&self) -> Box<dyn Iterator<Item = Result<Piece>> + Send + '_> {
        unreachable!("it is read where it is wanted")
    }
}

/// A bundle on the shelf.
#[derive(Clone)]
pub struct Carried {
    from: From,
    /// Some of its bytes were changed on the way.
    pub damaged: bool,
}

#[derive(Clone)]
enum From {
    Real(Arc<RandomReader>),
    Assumed(Arc<Assumed>),
}

impl Carried {
    pub fn source(&self) -> &dyn PieceSource {
        match &self.from {
            From::Real(reader) => reader.bundle(),
            From::Assumed(assumed) => &**assumed,
        }
    }

    /// What it holds of the range, verified.
    pub fn read(&self, range: ByteRange, buffer: &mut [u8]) -> Result<()> {
        match &self.from {
            From::Real(reader) => reader.read_at(range.offset, buffer).map(|_| ()),
            From::Assumed(assumed) => {
                let chunks = range.offset / CHUNK_BYTES..range.end().div_ceil(CHUNK_BYTES);
                if assumed.damaged.range(chunks).next().is_some() {
                    return Err(Error::integrity("the chunk is damaged"));
                }
                let span = range.offset as usize..range.end() as usize;
                buffer.copy_from_slice(&assumed.bytes[span]);
                Ok(())
            }
        }
    }
}

impl World {
    /// Makes a bundle of one of the snapshots, most often of the latest.
    pub fn make_bundle(&mut self) {
        let count = self.snapshots.imaged.len();
        if count == 0 || self.shelf.len() >= CARRIED_MAX && self.chance.one_in(2) {
            return;
        }
        let at = if self.chance.one_in(3) { self.chance.index(count) } else { count - 1 };
        let id = self.snapshots.imaged[at].id;
        let Some(view) = self.view(id) else { return };
        let made = if self.setting.real_bundles { self.pack(&view) } else { self.assume(&view) };
        self.look();
        let Some(carried) = made else { return };
        self.note(|| format!("bundle of {id}, damaged: {}", carried.damaged));
        self.shelf.truncate(CARRIED_MAX - 1);
        self.shelf.insert(0, carried);
    }

    fn assume(&mut self, view: &SnapshotView) -> Option<Carried> {
        let identity = Source::identity(view);
        let mut bytes = AlignedBuffer::zeroed(identity.geometry.size() as usize);
        view.read_at(0, &mut bytes).ok()?;
        let cut = view.cut();
        let cut =
            CutName { snapshot: cut.snapshot, generation: cut.generation, sequence: cut.sequence };
        let mut damaged = BTreeSet::new();
        if self.setting.rotten_bundles && self.chance.one_in(2) {
            damaged.insert(self.chance.below(identity.geometry.size().div_ceil(CHUNK_BYTES)));
        }
        let is_damaged = !damaged.is_empty();
        let assumed = Assumed { identity, cut, bytes: bytes.to_vec(), damaged };
        Some(Carried { from: From::Assumed(Arc::new(assumed)), damaged: is_damaged })
    }

    fn pack(&mut self, view: &SnapshotView) -> Option<Carried> {
        let folder = RamFolder::new();
        let bundle = Uuid::from_u128(u128::from(self.new_id()) << 64);
        let options = WriterOptions { bundle, threads: 1, ..WriterOptions::default() };
        let made =
            BundleWriter::create_in(&folder, view, &options, &mut |_| ControlFlow::Continue(()));
        made.ok()?;
        let damaged = self.setting.rotten_bundles && self.chance.one_in(2) && self.damage(&folder);
        let Ok(reader) = Bundle::open_in(Arc::new(folder)).and_then(RandomReader::new) else {
            assert!(damaged, "a bundle that was just made cannot be opened");
            return None;
        };
        Some(Carried { from: From::Real(Arc::new(reader)), damaged })
    }

    /// Changes a bit of a segment; `false` if there is none.
    fn damage(&mut self, folder: &RamFolder) -> bool {
        let names = folder.names().unwrap_or_default();
        let Some(name) = names.iter().find(|name| name.ends_with(".drs")) else {
            return false;
        };
        let mut bytes = folder.contents(name).expect("it was listed");
        let at = self.chance.index(bytes.len());
        bytes[at] ^= 1 << self.chance.below(8);
        folder.replace(name, bytes);
        true
    }
}
