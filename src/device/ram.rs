//! A device in memory. Durable for as long as the object lives; `flush` has nothing to do.

use std::sync::{PoisonError, RwLock};

use super::Device;
use crate::error::Result;
use crate::extent::ByteRange;

/// See the module.
#[derive(Debug)]
pub struct RamDevice {
    bytes: RwLock<Vec<u8>>,
    size: u64,
}

impl RamDevice {
    /// `size` zero bytes.
    #[must_use]
    pub fn new(size: u64) -> Self {
        Self::from_bytes(vec![0; usize::try_from(size).expect("fits memory")])
    }

    #[must_use]
    pub fn from_bytes(bytes: Vec<u8>) -> Self {
        Self { size: bytes.len() as u64, bytes: RwLock::new(bytes) }
    }

    /// A copy of everything it holds.
    #[must_use]
    pub fn contents(&self) -> Vec<u8> {
        self.bytes.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

fn span(offset: u64, length: usize, size: u64) -> std::ops::Range<usize> {
    let end = offset + length as u64;
    assert!(end <= size, "{offset}+{length} lies outside the device of {size} bytes");
    offset as usize..end as usize
}

impl Device for RamDevice {
    fn size(&self) -> u64 {
        self.size
    }

    fn sector_size(&self) -> u32 {
        512
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let bytes = self.bytes.read().unwrap_or_else(PoisonError::into_inner);
        buffer.copy_from_slice(&bytes[span(offset, buffer.len(), self.size)]);
        Ok(())
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> Result<()> {
        let mut bytes = self.bytes.write().unwrap_or_else(PoisonError::into_inner);
        bytes[span(offset, data.len(), self.size)].copy_from_slice(data);
        Ok(())
    }

    fn zero_at(&self, offset: u64, length: u64) -> Result<()> {
        let mut bytes = self.bytes.write().unwrap_or_else(PoisonError::into_inner);
        bytes[span(offset, length as usize, self.size)].fill(0);
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn next_data(&self, offset: u64) -> Result<Option<ByteRange>> {
        const STEP: usize = 4096;
        let bytes = self.bytes.read().unwrap_or_else(PoisonError::into_inner);
        let from = offset.min(self.size) as usize;
        let holds = |chunk: &[u8]| chunk.iter().any(|byte| *byte != 0);
        let Some(skip) = bytes[from..].chunks(STEP).position(holds) else { return Ok(None) };
        let start = from + skip * STEP;
        let count = bytes[start..].chunks(STEP).take_while(|chunk| holds(chunk)).count();
        let end = (start + count * STEP).min(bytes.len());
        Ok(Some(ByteRange::new(start as u64, (end - start) as u64)))
    }

    fn answers_at_once(&self) -> bool {
        true
    }
}
