//! A bitmap in pages that exist only once they differ from a uniform value.
//!
//! A 16 TiB volume of 4 KiB blocks has 2^32 bits, 512 MiB. A page that is all clear or all set
//! costs 40 bytes instead, so memory follows what was touched. A page holds exactly the bits of
//! one page of the map file (`format::map`), so commits copy pages whole.
//!
//! Guarantees: reading is lock-free and may run beside any change; single-word changes are atomic.
//! Changes of one bitmap by several threads at a time are safe word by word.
//! Does not know: what a bit means, files, which pages await a commit.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

use super::kernels::{mask, next_equal};
use super::runs::Runs;
use crate::extent::BlockRange;

/// Words in a page: 4096 bytes less the 64-byte header that a page has in the map file.
pub const PAGE_WORDS: usize = 504;
/// Bits in a page.
pub const PAGE_BITS: u64 = PAGE_WORDS as u64 * 64;

type Words = Box<[AtomicU64; PAGE_WORDS]>;

#[derive(Debug, Default)]
struct Page {
    /// Present once the page was not uniform.
    words: OnceLock<Words>,
    /// The value of every bit while `words` is absent.
    uniform: AtomicBool,
    /// Set bits in the page, kept by every change; meaningful only while `words` is present.
    set_bits: AtomicU64,
}

/// `len` bits, see the module.
#[derive(Debug)]
pub struct Bitmap {
    len: u64,
    pages: Box<[Page]>,
    /// Held while a page changes between uniform and present.
    transition: Mutex<()>,
}

impl Bitmap {
    /// `len` bits, each equal to `value`.
    #[must_use]
    pub fn new(len: u64, value: bool) -> Self {
        let count = usize::try_from(len.div_ceil(PAGE_BITS)).expect("a page table fits memory");
        let pages: Box<[Page]> = (0..count)
            .map(|_| Page { uniform: AtomicBool::new(value), ..Page::default() })
            .collect();
        Self { len, pages, transition: Mutex::new(()) }
    }

    /// Number of bits.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.len
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Number of pages.
    #[must_use]
    pub fn pages(&self) -> usize {
        self.pages.len()
    }

    /// The bits of page `page`.
    #[must_use]
    #[inline]
    pub fn page_range(&self, page: usize) -> BlockRange {
        let start = page as u64 * PAGE_BITS;
        BlockRange::new(start, (start + PAGE_BITS).min(self.len))
    }

    /// The page that holds bit `bit`.
    #[must_use]
    pub fn page_of(bit: u64) -> usize {
        usize::try_from(bit / PAGE_BITS).expect("a page index fits memory")
    }

    #[must_use]
    #[inline]
    pub fn get(&self, bit: u64) -> bool {
        assert!(bit < self.len, "bit {bit} of {}", self.len);
        let (page, within) = split(bit);
        match self.pages[page].words.get() {
            Some(words) => words[within / 64].load(Ordering::Acquire) >> (within % 64) & 1 == 1,
            None => self.pages[page].uniform.load(Ordering::Acquire),
        }
    }

    /// Whether every bit of `range` equals `value` (true when it is empty).
    #[must_use]
    pub fn all_equal(&self, range: BlockRange, value: bool) -> bool {
        self.next(range, !value).is_none()
    }

    /// Whether any bit of `range` is set.
    #[must_use]
    pub fn any_set(&self, range: BlockRange) -> bool {
        self.next(range, true).is_some()
    }

    /// The first bit in `range` that equals `value`.
    #[must_use]
    #[inline]
    pub fn next(&self, range: BlockRange, value: bool) -> Option<u64> {
        assert!(range.is_empty() || range.end <= self.len, "{range:?} of {}", self.len);
        let mut at = range.start;
        while at < range.end {
            let (page, within) = split(at);
            let page_start = at - within as u64;
            let page_end = (page_start + PAGE_BITS).min(range.end);
            match self.uniform_value(page) {
                Some(held) if held == value => return Some(at),
                Some(_) => at = page_end,
                None => {
                    let words = self.pages[page].words.get().expect("not uniform: present");
                    let mut word = within / 64;
                    let mut bit = (within % 64) as u32;
                    let last = usize::try_from((page_end - page_start).div_ceil(64))
                        .expect("within a page");
                    while word < last {
                        let held = words[word].load(Ordering::Acquire);
                        if let Some(found) = next_equal(held, bit, value) {
                            let found = page_start + word as u64 * 64 + u64::from(found);
                            return (found < range.end).then_some(found);
                        }
                        word += 1;
                        bit = 0;
                    }
                    at = page_end;
                }
            }
        }
        None
    }

    /// Maximal runs of bits equal to `value` within `range`, ascending.
    #[must_use]
    #[inline]
    pub fn runs(&self, range: BlockRange, value: bool) -> Runs<'_> {
        Runs::new(self, range, value)
    }

    /// Number of set bits in `range`.
    #[must_use]
    pub fn count_set(&self, range: BlockRange) -> u64 {
        let mut total = 0;
        let mut at = range.start;
        while at < range.end {
            let (page, within) = split(at);
            let page_start = at - within as u64;
            let page_end = (page_start + PAGE_BITS).min(range.end);
            let whole = within == 0 && page_end == self.page_range(page).end;
            total += match (self.uniform_value(page), whole) {
                (Some(true), _) => page_end - at,
                (Some(false), _) => 0,
                (None, true) => self.pages[page].set_bits.load(Ordering::Acquire),
                (None, false) => {
                    let words = self.pages[page].words.get().expect("not uniform: present");
                    word_pieces(within, (page_end - page_start) as usize)
                        .map(|(word, bits)| {
                            u64::from((words[word].load(Ordering::Acquire) & bits).count_ones())
                        })
                        .sum()
                }
            };
            at = page_end;
        }
        total
    }

    /// Set bits of the whole map.
    #[must_use]
    pub fn count_all(&self) -> u64 {
        self.count_set(BlockRange::new(0, self.len))
    }

    /// Gives every bit of `range` the value; returns how many bits changed.
    pub fn fill(&self, range: BlockRange, value: bool) -> u64 {
        self.fill_with(range, value, |_| {})
    }

    /// As `fill`, and tells `changed` each page in which a bit changed.
    pub fn fill_with(&self, range: BlockRange, value: bool, mut changed: impl FnMut(usize)) -> u64 {
        assert!(range.is_empty() || range.end <= self.len, "{range:?} of {}", self.len);
        let mut total = 0;
        let mut at = range.start;
        while at < range.end {
            let (page, within) = split(at);
            let page_start = at - within as u64;
            let page_end = (page_start + PAGE_BITS).min(range.end);
            let in_page = self.fill_page(page, within, (page_end - page_start) as usize, value);
            if in_page > 0 {
                changed(page);
            }
            total += in_page;
            at = page_end;
        }
        total
    }

    fn fill_page(&self, index: usize, from: usize, to: usize, value: bool) -> u64 {
        let page = &self.pages[index];
        let bits = self.page_range(index).count();
        if page.words.get().is_none() {
            let _held = self.transition.lock().unwrap_or_else(PoisonError::into_inner);
            if page.words.get().is_none() {
                let uniform = page.uniform.load(Ordering::Acquire);
                if uniform == value {
                    return 0;
                }
                if from == 0 && to as u64 == bits {
                    page.uniform.store(value, Ordering::Release);
                    return bits;
                }
                page.set_bits.store(if uniform { bits } else { 0 }, Ordering::Release);
                let words = uniform_words(uniform, bits);
                page.words.set(words).expect("only set with the transition lock held");
            }
        }
        let words = page.words.get().expect("made above");
        let mut changed = 0;
        for (word, bits) in word_pieces(from, to) {
            let before = if value {
                words[word].fetch_or(bits, Ordering::AcqRel)
            } else {
                words[word].fetch_and(!bits, Ordering::AcqRel)
            };
            let flipped = if value { !before & bits } else { before & bits };
            changed += u64::from(flipped.count_ones());
        }
        if value {
            page.set_bits.fetch_add(changed, Ordering::AcqRel);
        } else {
            page.set_bits.fetch_sub(changed, Ordering::AcqRel);
        }
        changed
    }

    /// `Some(value)` if every bit of the page is known to be `value` without reading its words.
    #[must_use]
    #[inline]
    pub fn uniform_value(&self, page: usize) -> Option<bool> {
        let held = &self.pages[page];
        if held.words.get().is_none() {
            return Some(held.uniform.load(Ordering::Acquire));
        }
        let set = held.set_bits.load(Ordering::Acquire);
        if set == 0 {
            Some(false)
        } else if set == self.page_range(page).count() {
            Some(true)
        } else {
            None
        }
    }

    /// A copy of the words of a page; bits after the end of the map are clear.
    #[must_use]
    pub fn copy_page(&self, page: usize) -> Box<[u64; PAGE_WORDS]> {
        let mut copy = Box::new([0; PAGE_WORDS]);
        match self.pages[page].words.get() {
            Some(words) => {
                for (to, from) in copy.iter_mut().zip(words.iter()) {
                    *to = from.load(Ordering::Acquire);
                }
            }
            None if self.pages[page].uniform.load(Ordering::Acquire) => {
                for (word, bits) in word_pieces(0, self.page_range(page).count() as usize) {
                    copy[word] = bits;
                }
            }
            None => {}
        }
        copy
    }

    /// Gives a page the words read from a map file. `None` if a bit after the end is set.
    #[must_use]
    pub fn load_page(&self, page: usize, words: &[u64; PAGE_WORDS]) -> Option<()> {
        let range = self.page_range(page);
        let bits = range.count() as usize;
        let mut valid = [0u64; PAGE_WORDS];
        for (word, piece) in word_pieces(0, bits) {
            valid[word] = piece;
        }
        if words.iter().zip(&valid).any(|(held, valid)| held & !valid != 0) {
            return None;
        }
        let set: u64 = words.iter().map(|word| u64::from(word.count_ones())).sum();
        if set == 0 || set == bits as u64 {
            self.fill(range, set != 0);
            return Some(());
        }
        // A page is made present by clearing it if it was set; then the words are laid over.
        self.fill(BlockRange::new(range.start, range.start + 1), words[0] & 1 == 1);
        self.fill(BlockRange::new(range.start, range.start + 1), words[0] & 1 == 0);
        let held = self.pages[page].words.get().expect("a single bit was changed");
        for (to, from) in held.iter().zip(words) {
            to.store(*from, Ordering::Release);
        }
        self.pages[page].set_bits.store(set, Ordering::Release);
        Some(())
    }
}

fn uniform_words(value: bool, bits: u64) -> Words {
    let mut words = Box::new([const { AtomicU64::new(0) }; PAGE_WORDS]);
    if value {
        for (word, piece) in word_pieces(0, bits as usize) {
            *words[word].get_mut() = piece;
        }
    }
    words
}

#[inline]
fn split(bit: u64) -> (usize, usize) {
    let page = Bitmap::page_of(bit);
    (page, (bit - page as u64 * PAGE_BITS) as usize)
}

/// The words that bits `from..to` of a page touch, each with the mask of those bits.
fn word_pieces(from: usize, to: usize) -> impl Iterator<Item = (usize, u64)> {
    let words = if from < to { from / 64..(to - 1) / 64 + 1 } else { 0..0 };
    words.map(move |word| {
        let low = if word == from / 64 { (from % 64) as u32 } else { 0 };
        let high = if word == (to - 1) / 64 { ((to - 1) % 64 + 1) as u32 } else { 64 };
        (word, mask(low, high))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_map_of_sixteen_tebibytes_costs_its_page_table_only() {
        let map = Bitmap::new(1 << 32, false);
        assert_eq!(map.count_all(), 0);
        map.fill(BlockRange::new(0, 1 << 32), true);
        assert_eq!(map.count_all(), 1 << 32);
        assert_eq!(map.next(BlockRange::new(0, 1 << 32), false), None);
        assert!(map.pages.iter().all(|page| page.words.get().is_none()));
    }

    #[test]
    fn a_page_copied_out_loads_back() {
        let map = Bitmap::new(PAGE_BITS + 100, true);
        map.fill(BlockRange::new(PAGE_BITS + 3, PAGE_BITS + 9), false);
        let other = Bitmap::new(PAGE_BITS + 100, false);
        for page in 0..2 {
            assert_eq!(other.load_page(page, &map.copy_page(page)), Some(()));
        }
        assert_eq!(other.count_all(), PAGE_BITS + 94);
        let mut beyond = [0; PAGE_WORDS];
        beyond[PAGE_WORDS - 1] = 1;
        assert_eq!(other.load_page(1, &beyond), None, "a bit after the end is refused");
    }

    proptest! {
        #[test]
        fn a_bitmap_equals_an_array_of_bools(
            start_value: bool,
            steps in prop::collection::vec(
                (0u64..PAGE_BITS * 2 + 70, 0u64..PAGE_BITS + 90, any::<bool>()), 1..12)
        ) {
            let len = PAGE_BITS * 2 + 77;
            let map = Bitmap::new(len, start_value);
            let mut array = vec![start_value; len as usize];
            for (start, count, value) in steps {
                let end = (start + count).min(len);
                let range = BlockRange::new(start, end);
                let expected =
                    array[start as usize..end as usize].iter().filter(|b| **b != value).count();
                prop_assert_eq!(map.fill(range, value), expected as u64);
                array[start as usize..end as usize].fill(value);
                prop_assert_eq!(
                    map.count_all(), array.iter().filter(|b| **b).count() as u64);
                let part = BlockRange::new(start, (start + 300).min(len));
                let set: Vec<u64> = map.runs(part, true)
                    .flat_map(|run| run.start..run.end).collect();
                let expected: Vec<u64> =
                    (part.start..part.end).filter(|i| array[*i as usize]).collect();
                prop_assert_eq!(set, expected);
                prop_assert_eq!(map.count_set(part),
                    (part.start..part.end).filter(|i| array[*i as usize]).count() as u64);
            }
        }
    }
}
