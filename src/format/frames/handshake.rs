//! The first frame each way: who we are, which volume we mean, and yes or no with words.
//!
//! Guarantees: a `Hello` or `Welcome` that was read has our magic, a version we speak, a valid
//! geometry, and fields that agree with each other (a mirror Hello has no session yet; a demand or
//! bulk Hello names one). Whether it is the *right* volume is decided by `link::Fence`.

use uuid::Uuid;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::text;
use crate::error::{Error, ErrorKind, Result};
use crate::units::{BlockSize, Geometry};

/// The version of the protocol that this code speaks, and of the frame header.
pub const VERSION: u8 = 1;
/// The backup answers which blocks changed since a cut (Changes, ChangesReply).
pub const FEATURE_CHANGES: u64 = 1;
/// The bytes of blocks may travel packed (Write, Data).
pub const FEATURE_PACKED: u64 = 2;
/// Feature bits that this code knows.
pub const KNOWN_FEATURES: u64 = FEATURE_CHANGES | FEATURE_PACKED;

const MAGIC: [u8; 4] = *b"DRLK";

/// What a connection is for. Each class has a byte stream of its own, so that a demand read never
/// queues behind bulk (trap 42).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum Class {
    /// Writes on their way to the backup, in order.
    Mirror = 1,
    /// Reads that an application waits for.
    Demand = 2,
    /// Reads in the background: hydration, comparison.
    Bulk = 3,
}

impl Class {
    fn from_byte(byte: u8) -> Result<Self> {
        match byte {
            1 => Ok(Self::Mirror),
            2 => Ok(Self::Demand),
            3 => Ok(Self::Bulk),
            _ => Err(Error::format(format!(
                "link Hello: expected class 1 (mirror), 2 (demand) or 3 (bulk), found {byte}"
            ))),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Role {
    Primary = 1,
    Backup = 2,
}

impl Role {
    fn from_byte(byte: u8) -> Result<Self> {
        match byte {
            1 => Ok(Self::Primary),
            2 => Ok(Self::Backup),
            _ => Err(Error::format(format!(
                "link handshake: expected role 1 (primary) or 2 (backup), found {byte}"
            ))),
        }
    }
}

/// Sixteen random bytes that a process draws when it starts. Another boot id means that what the
/// peer had not flushed may be gone (R12).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct BootId(pub [u8; 16]);

impl BootId {
    #[must_use]
    pub fn is_nil(self) -> bool {
        self.0 == [0; 16]
    }
}

/// The primary's first frame on every connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    pub class: Class,
    /// The role the sender has for this volume.
    pub role: Role,
    /// Which volume of the backup; a key of its table, never a path.
    pub name: String,
    /// Nil: "tell me which volume this is" (mirror connections only).
    pub volume: Uuid,
    pub geometry: Geometry,
    pub generation: u64,
    /// Demand and bulk: the session of the mirror connection's Welcome. Mirror: 0.
    pub session_epoch: u64,
    /// Of the sender.
    pub boot_id: BootId,
    /// Demand and bulk: of the backup, from the mirror connection's Welcome. Mirror: nil.
    pub peer_boot_id: BootId,
    /// Features that the sender could use.
    pub features_offered: u64,
    /// Features without which the sender cannot go on; among those offered.
    pub features_required: u64,
}

/// The backup's consent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Welcome {
    pub volume: Uuid,
    pub geometry: Geometry,
    pub generation: u64,
    /// The session that this connection belongs to. 0: none, the backup only tells a primary
    /// without identity which volume this is.
    pub session_epoch: u64,
    /// The last mirrored operation that was applied in this session: 0 in a new one.
    pub applied_sequence: u64,
    /// Of the backup.
    pub boot_id: BootId,
    /// Which backup: drawn when its state was made, the same for as long as that is kept.
    pub backup: Uuid,
    /// Features in use from here on; among those offered.
    pub features: u64,
}

/// Why a handshake was refused; stable numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RefusalCode {
    /// The Hello or Welcome is not understood: magic, version, layout.
    Format,
    Feature,
    UnknownVolume,
    WrongRole,
    WrongVolume,
    WrongGeometry,
    StaleGeneration,
    StaleSession,
    Occupied,
    NoIdentity,
    NotReady,
    NotAllowed,
    Protocol,
    /// A code of a later version.
    Other(u16),
}

const REFUSAL_CODES: [(u16, RefusalCode); 13] = [
    (1, RefusalCode::Format),
    (2, RefusalCode::Feature),
    (3, RefusalCode::UnknownVolume),
    (4, RefusalCode::WrongRole),
    (5, RefusalCode::WrongVolume),
    (6, RefusalCode::WrongGeometry),
    (7, RefusalCode::StaleGeneration),
    (8, RefusalCode::StaleSession),
    (9, RefusalCode::Occupied),
    (10, RefusalCode::NoIdentity),
    (11, RefusalCode::NotReady),
    (12, RefusalCode::NotAllowed),
    (13, RefusalCode::Protocol),
];

impl RefusalCode {
    #[must_use]
    pub fn number(self) -> u16 {
        match self {
            Self::Other(number) => number,
            _ => REFUSAL_CODES
                .iter()
                .find(|(_, code)| *code == self)
                .map(|(number, _)| *number)
                .expect("the table holds every code"),
        }
    }

    #[must_use]
    pub fn from_number(number: u16) -> Self {
        REFUSAL_CODES
            .iter()
            .find(|(known, _)| *known == number)
            .map_or(Self::Other(number), |(_, code)| *code)
    }

    /// Whether connecting again later may help without anybody changing anything.
    #[must_use]
    pub fn is_passing(self) -> bool {
        matches!(self, Self::StaleSession | Self::Occupied | Self::NotReady)
    }

    #[must_use]
    pub fn error_kind(self) -> ErrorKind {
        match self {
            Self::Format | Self::Feature => ErrorKind::Format,
            Self::UnknownVolume
            | Self::WrongRole
            | Self::WrongVolume
            | Self::WrongGeometry
            | Self::StaleGeneration
            | Self::NoIdentity => ErrorKind::Identity,
            Self::Occupied | Self::NotReady => ErrorKind::Busy,
            Self::StaleSession | Self::NotAllowed | Self::Protocol | Self::Other(_) => {
                ErrorKind::Link
            }
        }
    }
}

/// No, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    pub code: RefusalCode,
    pub text: String,
}

impl Refusal {
    #[must_use]
    pub fn new(code: RefusalCode, words: &str) -> Self {
        Self { code, text: text::clean(words) }
    }

    #[must_use]
    pub fn to_error(&self) -> Error {
        Error::new(self.code.error_kind(), self.text.clone())
    }
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct HelloLayout {
    magic: [u8; 4],
    version_lowest: U16,
    version_highest: U16,
    features_offered: U64,
    features_required: U64,
    class: u8,
    role: u8,
    name_length: U16,
    block_size: U32,
    size: U64,
    generation: U64,
    session_epoch: U64,
    volume: [u8; 16],
    boot_id: [u8; 16],
    peer_boot_id: [u8; 16],
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct WelcomeLayout {
    magic: [u8; 4],
    version: U16,
    role: u8,
    zero: u8,
    features: U64,
    block_size: U32,
    zero_again: U32,
    size: U64,
    generation: U64,
    session_epoch: U64,
    applied_sequence: U64,
    volume: [u8; 16],
    boot_id: [u8; 16],
    backup: [u8; 16],
}

/// The versions a Hello offers, lowest and highest. Its first eight bytes mean the same in every
/// version, so that a version that we do not speak can be refused with words.
fn hello_versions(payload: &[u8]) -> Result<(u16, u16)> {
    let Some((&[a, b, c, d, low, low_high, high, high_high], _)) = payload.split_first_chunk()
    else {
        return Err(short("Hello", 8, payload.len()));
    };
    check_magic([a, b, c, d])?;
    let lowest = u16::from_le_bytes([low, low_high]);
    let highest = u16::from_le_bytes([high, high_high]);
    if lowest > highest || lowest == 0 {
        return Err(Error::format(format!(
            "link Hello: expected a range of versions, found {lowest} to {highest}"
        )));
    }
    Ok((lowest, highest))
}

impl Hello {
    pub(super) fn payload_length(&self) -> usize {
        size_of::<HelloLayout>() + self.name.len()
    }

    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        let layout = HelloLayout {
            magic: MAGIC,
            version_lowest: u16::from(VERSION).into(),
            version_highest: u16::from(VERSION).into(),
            features_offered: self.features_offered.into(),
            features_required: self.features_required.into(),
            class: self.class as u8,
            role: self.role as u8,
            name_length: u16::try_from(self.name.len()).expect("a checked volume name").into(),
            block_size: self.geometry.block_size().bytes_u32().into(),
            size: self.geometry.size().into(),
            generation: self.generation.into(),
            session_epoch: self.session_epoch.into(),
            volume: self.volume.into_bytes(),
            boot_id: self.boot_id.0,
            peer_boot_id: self.peer_boot_id.0,
        };
        out.extend_from_slice(layout.as_bytes());
        out.extend_from_slice(self.name.as_bytes());
    }

    pub(super) fn decode(payload: &[u8]) -> Result<Self> {
        let (lowest, highest) = hello_versions(payload)?;
        if lowest != u16::from(VERSION) {
            return Err(Error::format(format!(
                "link Hello: expected version {VERSION}, found {lowest} to {highest}: update the \
                 older side"
            )));
        }
        let (layout, name) = HelloLayout::ref_from_prefix(payload)
            .map_err(|_| short("Hello", size_of::<HelloLayout>(), payload.len()))?;
        if name.len() != usize::from(layout.name_length.get()) {
            return Err(Error::format(format!(
                "link Hello: expected a volume name of {} bytes, found {}",
                layout.name_length,
                name.len()
            )));
        }
        let hello = Self {
            class: Class::from_byte(layout.class)?,
            role: Role::from_byte(layout.role)?,
            name: text::read_name(name, false, "link Hello, volume name")?,
            volume: Uuid::from_bytes(layout.volume),
            geometry: geometry(layout.size.get(), layout.block_size.get())?,
            generation: layout.generation.get(),
            session_epoch: layout.session_epoch.get(),
            boot_id: BootId(layout.boot_id),
            peer_boot_id: BootId(layout.peer_boot_id),
            features_offered: layout.features_offered.get(),
            features_required: layout.features_required.get(),
        };
        hello.check()?;
        Ok(hello)
    }

    /// Whether the fields agree with each other.
    pub fn check(&self) -> Result<()> {
        let opens = self.class == Class::Mirror;
        let words = if self.boot_id.is_nil() {
            "a boot id, found none"
        } else if self.name.is_empty() || !text::is_name(&self.name) {
            "a volume name of 1 to 255 bytes without control characters"
        } else if self.features_required & !self.features_offered != 0 {
            "the required features to be among those offered"
        } else if opens && (self.session_epoch != 0 || !self.peer_boot_id.is_nil()) {
            "no session in the Hello of a mirror connection (it opens one)"
        } else if !opens && (self.session_epoch == 0 || self.peer_boot_id.is_nil()) {
            "the session of the mirror connection in the Hello of a demand or bulk connection"
        } else if !opens && self.volume.is_nil() {
            "the volume's UUID in the Hello of a demand or bulk connection"
        } else {
            return Ok(());
        };
        Err(Error::format(format!("link Hello: expected {words}")))
    }
}

impl Welcome {
    pub(super) fn payload_length() -> usize {
        size_of::<WelcomeLayout>()
    }

    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        let layout = WelcomeLayout {
            magic: MAGIC,
            version: u16::from(VERSION).into(),
            role: Role::Backup as u8,
            zero: 0,
            features: self.features.into(),
            block_size: self.geometry.block_size().bytes_u32().into(),
            zero_again: 0.into(),
            size: self.geometry.size().into(),
            generation: self.generation.into(),
            session_epoch: self.session_epoch.into(),
            applied_sequence: self.applied_sequence.into(),
            volume: self.volume.into_bytes(),
            boot_id: self.boot_id.0,
            backup: self.backup.into_bytes(),
        };
        out.extend_from_slice(layout.as_bytes());
    }

    pub(super) fn decode(payload: &[u8]) -> Result<Self> {
        let layout = WelcomeLayout::ref_from_bytes(payload)
            .map_err(|_| short("Welcome", size_of::<WelcomeLayout>(), payload.len()))?;
        check_magic(layout.magic)?;
        let version = layout.version.get();
        if version != u16::from(VERSION) {
            return Err(Error::format(format!(
                "link Welcome: expected version {VERSION}, found {version}"
            )));
        }
        if Role::from_byte(layout.role)? != Role::Backup {
            return Err(Error::identity("link Welcome: expected a backup, found a primary"));
        }
        if layout.zero != 0 || layout.zero_again.get() != 0 {
            return Err(Error::format("link Welcome: expected zeros in the reserved bytes"));
        }
        let welcome = Self {
            volume: Uuid::from_bytes(layout.volume),
            geometry: geometry(layout.size.get(), layout.block_size.get())?,
            generation: layout.generation.get(),
            session_epoch: layout.session_epoch.get(),
            applied_sequence: layout.applied_sequence.get(),
            boot_id: BootId(layout.boot_id),
            backup: Uuid::from_bytes(layout.backup),
            features: layout.features.get(),
        };
        if welcome.volume.is_nil() || welcome.boot_id.is_nil() || welcome.backup.is_nil() {
            return Err(Error::format(
                "link Welcome: expected the UUIDs of volume and backup and a boot id, found none",
            ));
        }
        Ok(welcome)
    }
}

fn geometry(size: u64, block_size: u32) -> Result<Geometry> {
    BlockSize::new(block_size).and_then(|block_size| Geometry::new(size, block_size)).ok_or_else(
        || {
            Error::format(format!(
                "link handshake: expected a size that is a multiple of 512 and a block size that \
                 is a power of two from 512 to 1 MiB, found {size} and {block_size}"
            ))
        },
    )
}

fn check_magic(magic: [u8; 4]) -> Result<()> {
    if magic == MAGIC {
        return Ok(());
    }
    Err(Error::format(format!(
        "link handshake: expected the magic DRLK, found {}: this is no dualrestore link",
        magic.escape_ascii()
    )))
}

fn short(what: &str, expected: usize, found: usize) -> Error {
    Error::format(format!("link {what}: expected {expected} bytes, found {found}"))
}
