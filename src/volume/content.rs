//! What a stretch of a volume holds: bytes, or zeros without bytes.

use crate::device::{Device, Payload};
use crate::error::Result;

/// Immutable contents of a range.
#[derive(Clone, Debug, PartialEq)]
pub enum Content {
    Bytes(Payload),
    /// This many zero bytes.
    Zeros(u64),
}

impl Content {
    #[must_use]
    pub fn len(&self) -> u64 {
        match self {
            Self::Bytes(payload) => payload.len() as u64,
            Self::Zeros(length) => *length,
        }
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The bytes `start..start + length` of this content.
    #[must_use]
    pub fn slice(&self, start: u64, length: u64) -> Self {
        match self {
            Self::Bytes(payload) => Self::Bytes(payload.slice(start as usize, length as usize)),
            Self::Zeros(held) => {
                assert!(start + length <= *held);
                Self::Zeros(length)
            }
        }
    }

    /// Copies the content into `buffer`, which is as long.
    pub fn copy_to(&self, buffer: &mut [u8]) {
        match self {
            Self::Bytes(payload) => buffer.copy_from_slice(payload),
            Self::Zeros(_) => buffer.fill(0),
        }
    }

    pub fn write_to(&self, device: &dyn Device, offset: u64) -> Result<()> {
        match self {
            Self::Bytes(payload) => device.write_at(offset, payload),
            Self::Zeros(length) => device.zero_at(offset, *length),
        }
    }
}
