//! Checked pages: 4096 bytes that carry a CRC32C and a BLAKE3 of themselves.
//!
//! Guarantees: any change of a page is noticed; a page of another segment is noticed, because the
//! BLAKE3 is taken over a context (the hash of the segment's header) and the page. The CRC32C
//! does not cover the context: it is for readers that have no BLAKE3.

use super::Hash;
use crate::error::{Error, Result};

/// Bytes of a page, and what every position in a segment is a multiple of.
pub const PAGE_BYTES: usize = 4096;
/// Bytes of the two checks: CRC32C, then BLAKE3.
const CHECK_BYTES: usize = 36;
/// Where the checks of headers and trailers lie: at the end of the page.
pub const CHECK_AT_END: usize = PAGE_BYTES - CHECK_BYTES;

pub type Page = [u8; PAGE_BYTES];

/// `length` rounded up to whole pages.
#[must_use]
pub const fn padded(length: u64) -> u64 {
    length.next_multiple_of(PAGE_BYTES as u64)
}

fn checks(page: &Page, at: usize, context: &[u8]) -> (u32, Hash) {
    let (before, after) = (&page[..at], &page[at + CHECK_BYTES..]);
    let mut hasher = blake3::Hasher::new();
    hasher.update(context).update(before).update(after);
    (crc32c::crc32c_append(crc32c::crc32c(before), after), *hasher.finalize().as_bytes())
}

/// Writes both checks at `at`; returns the hash.
pub fn seal(page: &mut Page, at: usize, context: &[u8]) -> Hash {
    let (crc, hash) = checks(page, at, context);
    page[at..at + 4].copy_from_slice(&crc.to_le_bytes());
    page[at + 4..at + CHECK_BYTES].copy_from_slice(&hash);
    hash
}

/// Compares both checks at `at`; returns the hash.
pub fn check(page: &Page, at: usize, context: &[u8], what: &str) -> Result<Hash> {
    let (crc, hash) = checks(page, at, context);
    if page[at..at + 4] != crc.to_le_bytes() || page[at + 4..at + CHECK_BYTES] != hash {
        return Err(Error::integrity(format!(
            "the {what} is damaged, or of another segment: its checksums do not match; copy it \
             from the medium again"
        )));
    }
    Ok(hash)
}

/// Whether bytes that must be zero are.
pub fn expect_zero(bytes: &[u8], what: &str) -> Result<()> {
    if bytes.iter().all(|byte| *byte == 0) {
        Ok(())
    } else {
        Err(Error::format(format!("expected zeros in the reserved bytes of the {what}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_flipped_bit_of_a_page_and_another_context_are_noticed() {
        let mut page: Page = std::array::from_fn(|at| (at * 7) as u8);
        seal(&mut page, 28, b"context");
        check(&page, 28, b"context", "page").expect("whole");
        assert!(check(&page, 28, b"another", "page").is_err());
        for bit in 0..PAGE_BYTES * 8 {
            page[bit / 8] ^= 1 << (bit % 8);
            assert!(check(&page, 28, b"context", "page").is_err(), "bit {bit}");
            page[bit / 8] ^= 1 << (bit % 8);
        }
    }
}
