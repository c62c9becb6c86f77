//! What a bundle is made from: a plain image here, the view of a snapshot elsewhere.
//!
//! Does not know: bundles.

use std::fmt::Debug;
use std::sync::Arc;

use uuid::Uuid;

use crate::device::Device;
use crate::error::{Error, Result};
use crate::extent::ByteRange;
use crate::units::{BlockSize, Cut, Geometry};

/// Whose bytes they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Nil: of no volume in particular (a plain image).
    pub volume: Uuid,
    pub geometry: Geometry,
    pub generation: u64,
    /// Sequence number of the cut within the generation.
    pub cut: u64,
}

impl Identity {
    /// The cut that it is of.
    #[must_use]
    pub fn instant(&self) -> Cut {
        Cut { generation: self.generation, sequence: self.cut }
    }

    /// Whether it names a volume.
    #[must_use]
    pub fn is_bound(&self) -> bool {
        !self.volume.is_nil()
    }
}

/// What an incremental source says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lineage {
    pub cut: Cut,
    pub base: Cut,
    /// What changed from base to cut, of the scope; on all media of the bundle together.
    pub selection: Vec<ByteRange>,
    /// Where changes were looked for; `None`: everywhere.
    pub scope: Option<Vec<ByteRange>>,
}

/// Bytes that do not move while a bundle is made of them.
pub trait Source: Send + Sync + Debug {
    fn identity(&self) -> Identity;

    /// The snapshot that it is, if it is one.
    fn snapshot(&self) -> Option<Uuid> {
        None
    }

    /// Fills the buffer; the range lies inside the volume. An error says that something in the
    /// range cannot be read; smaller reads may then succeed.
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()>;

    /// Says that a bundle holds the range durably and will not read it again.
    fn stored(&self, range: ByteRange) {
        let _it_is_kept_all_the_same = range;
    }

    /// Whether what is stored may have been given up, so that it cannot be read once more.
    fn gives_up(&self) -> bool {
        false
    }

    /// The first stretch at or after `offset` that may hold anything but zeros; `None` if there is
    /// none. Whatever lies before it is zero for certain.
    fn next_data(&self, offset: u64) -> Result<Option<ByteRange>> {
        let rest = self.identity().geometry.size().saturating_sub(offset);
        Ok((rest > 0).then_some(ByteRange::new(offset, rest)))
    }
}

/// A file or device as it is: bound to no volume, or what a server says of a snapshot.
#[derive(Debug)]
pub struct ImageSource {
    device: Arc<dyn Device>,
    identity: Identity,
    snapshot: Option<Uuid>,
}

impl ImageSource {
    /// Selected and described in blocks of `block_size`.
    pub fn new(device: Arc<dyn Device>, block_size: BlockSize) -> Result<Self> {
        let size = device.size();
        let geometry = Geometry::new(size, block_size).ok_or_else(|| {
            Error::usage(format!(
                "expected an image whose size is a positive multiple of 512 bytes, found {size}"
            ))
        })?;
        let identity = Identity { volume: Uuid::nil(), geometry, generation: 0, cut: 0 };
        Ok(Self { device, identity, snapshot: None })
    }

    /// All of a snapshot that says whose it is.
    #[must_use]
    pub fn of_snapshot(device: Arc<dyn Device>, identity: Identity, snapshot: Uuid) -> Self {
        assert_eq!(device.size(), identity.geometry.size(), "of this size");
        Self { device, identity, snapshot: Some(snapshot) }
    }
}

impl Source for ImageSource {
    fn identity(&self) -> Identity {
        self.identity
    }

    fn snapshot(&self) -> Option<Uuid> {
        self.snapshot
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        self.device.read_at(offset, buffer)
    }

    fn next_data(&self, offset: u64) -> Result<Option<ByteRange>> {
        self.device.next_data(offset)
    }
}
