//! Checked pages: 4096 bytes that carry a CRC32C and a hash of themselves.
//!
//! Guarantees: any change of a page is noticed; a page of another segment is noticed, because the
//! hash is taken over the hash of the segment's header and the page; in an encrypted bundle it is
//! an HMAC instead. The CRC32C is of the page alone: it is for readers that have neither.

use super::Hash;
use super::checks::Checks;
use crate::error::{Error, Result};

/// Bytes of a page, and what every position in a segment is a multiple of.
pub const PAGE_BYTES: usize = 4096;
/// Bytes of the two checks: CRC32C, then hash.
const CHECK_BYTES: usize = 36;
/// Where the checks of headers and trailers lie: at the end of the page.
pub const CHECK_AT_END: usize = PAGE_BYTES - CHECK_BYTES;

pub type Page = [u8; PAGE_BYTES];

/// `length` rounded up to whole pages.
#[must_use]
pub const fn padded(length: u64) -> u64 {
    length.next_multiple_of(PAGE_BYTES as u64)
}

fn checks_of(page: &Page, at: usize, checks: &Checks) -> (u32, Hash) {
    let (before, after) = (&page[..at], &page[at + CHECK_BYTES..]);
    let crc = crc32c::crc32c_append(crc32c::crc32c(before), after);
    (crc, checks.of_page(before, after))
}

/// Writes both checks at `at`; returns the hash.
pub fn seal(page: &mut Page, at: usize, checks: &Checks) -> Hash {
    let (crc, hash) = checks_of(page, at, checks);
    page[at..at + 4].copy_from_slice(&crc.to_le_bytes());
    page[at + 4..at + CHECK_BYTES].copy_from_slice(&hash);
    hash
}

/// Compares both checks at `at`; returns the hash.
pub fn check(page: &Page, at: usize, checks: &Checks, what: &str) -> Result<Hash> {
    let (crc, hash) = checks_of(page, at, checks);
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
    use crate::format::bundle::BundleKey;
    use uuid::Uuid;

    #[test]
    fn every_flipped_bit_of_a_page_another_header_and_another_key_are_noticed() {
        let (key, other) = ([1, 2].map(|byte| BundleKey::new(Uuid::nil(), [byte; 32]))).into();
        let encrypted = |key: &BundleKey| Checks::encrypted([5; 32], key, &[6; 32], 0);
        for (right, wrong) in [
            (Checks::plain([5; 32]), Checks::plain([6; 32])),
            (encrypted(&key), encrypted(&other)),
            (encrypted(&key), Checks::plain([5; 32])),
        ] {
            let mut page: Page = std::array::from_fn(|at| (at * 7) as u8);
            seal(&mut page, 28, &right);
            check(&page, 28, &right, "page").expect("whole");
            assert!(check(&page, 28, &wrong, "page").is_err());
            for bit in 0..PAGE_BYTES * 8 {
                page[bit / 8] ^= 1 << (bit % 8);
                assert!(check(&page, 28, &right, "page").is_err(), "bit {bit}");
                page[bit / 8] ^= 1 << (bit % 8);
            }
        }
    }
}
