//! Word kernels: masks, edges and counts on u64 words. Pure functions, no atomics.

/// A word with bits `from..to` set (`to` may be 64).
#[must_use]
#[inline]
pub fn mask(from: u32, to: u32) -> u64 {
    debug_assert!(from <= to && to <= 64);
    if from == to {
        return 0;
    }
    (u64::MAX << from) & (u64::MAX >> (64 - to))
}

/// The first bit at or after `from` in `word` that equals `value`, if any.
#[must_use]
#[inline]
pub fn next_equal(word: u64, from: u32, value: bool) -> Option<u32> {
    if from >= 64 {
        return None;
    }
    let candidates = if value { word } else { !word } & (u64::MAX << from);
    (candidates != 0).then(|| candidates.trailing_zeros())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mask_covers_exactly_its_bits() {
        for from in 0..=64 {
            for to in from..=64 {
                let word = mask(from, to);
                for bit in 0..64 {
                    assert_eq!(word >> bit & 1 == 1, bit >= from && bit < to);
                }
            }
        }
    }

    #[test]
    fn next_equal_finds_the_first_bit_from_there() {
        assert_eq!(next_equal(0b1010, 2, true), Some(3));
        assert_eq!(next_equal(0b1010, 1, false), Some(2));
        assert_eq!(next_equal(u64::MAX, 0, false), None);
        assert_eq!(next_equal(0, 64, true), None);
    }
}
