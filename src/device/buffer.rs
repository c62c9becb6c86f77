//! Buffers that `O_DIRECT` accepts, and cheap shared slices of them. One of the three files that
//! may use `unsafe`.
//!
//! Guarantees: memory is aligned to 4 KiB (2 MiB and on huge pages from 2 MiB of size), zeroed
//! when made (but for `used` and `from_slice`), freed once. Single pages, which guests' requests
//! take and give back by the hundred thousand, are kept for the next on the same thread.
//! A `Payload` is immutable: bytes on their way to a disk and to the link at the same time cannot
//! change (trap 20).

#![expect(unsafe_code, reason = "aligned allocation has no safe form in std")]

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::cell::RefCell;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::Arc;

const PAGE_BYTES: usize = 4096;
const HUGE_PAGE_BYTES: usize = 2 << 20;

/// Pages kept by a thread: as many as a connection has requests under way.
const KEPT_PAGES: usize = 128;

/// Pages that were given back on this thread.
struct Kept(Vec<NonNull<u8>>);

impl Drop for Kept {
    fn drop(&mut self) {
        for page in self.0.drain(..) {
            // SAFETY: a kept page came from `zeroed` with this layout and belongs to nobody.
            unsafe { dealloc(page.as_ptr(), PAGE) }
        }
    }
}

thread_local! {
    static KEPT: RefCell<Kept> = const { RefCell::new(Kept(Vec::new())) };
}

const PAGE: Layout = match Layout::from_size_align(PAGE_BYTES, PAGE_BYTES) {
    Ok(layout) => layout,
    Err(_) => panic!("a page is a power of two"),
};

/// `len` bytes of aligned memory.
#[derive(Debug)]
pub struct AlignedBuffer {
    start: NonNull<u8>,
    len: usize,
    layout: Layout,
}

// SAFETY: the buffer owns its memory exclusively; `&AlignedBuffer` only reads it.
unsafe impl Send for AlignedBuffer {}
// SAFETY: as above; there is no interior mutability.
unsafe impl Sync for AlignedBuffer {}

impl AlignedBuffer {
    /// `len` zeroed bytes.
    #[must_use]
    pub fn zeroed(len: usize) -> Self {
        let align = if len >= HUGE_PAGE_BYTES { HUGE_PAGE_BYTES } else { PAGE_BYTES };
        let capacity = len.max(1).next_multiple_of(PAGE_BYTES);
        let layout = Layout::from_size_align(capacity, align).expect("a sane buffer size");
        // SAFETY: the layout has a size above zero.
        let Some(start) = NonNull::new(unsafe { alloc_zeroed(layout) }) else {
            handle_alloc_error(layout)
        };
        if align == HUGE_PAGE_BYTES {
            // SAFETY: the range was just allocated; advice does not change its contents. A kernel
            // without huge pages refuses, which only costs speed.
            let _advice = unsafe {
                rustix::mm::madvise(
                    start.as_ptr().cast(),
                    capacity,
                    rustix::mm::Advice::LinuxHugepage,
                )
            };
        }
        Self { start, len, layout }
    }

    /// `len` bytes of anything: for who overwrites all of them.
    #[must_use]
    pub fn used(len: usize) -> Self {
        let kept = if (1..=PAGE_BYTES).contains(&len) {
            KEPT.try_with(|kept| kept.borrow_mut().0.pop()).ok().flatten()
        } else {
            None
        };
        match kept {
            Some(start) => Self { start, len, layout: PAGE },
            None => Self::zeroed(len),
        }
    }

    /// A copy of `bytes`.
    #[must_use]
    pub fn from_slice(bytes: &[u8]) -> Self {
        let mut buffer = Self::used(bytes.len());
        buffer.copy_from_slice(bytes);
        buffer
    }
}

impl Drop for AlignedBuffer {
    fn drop(&mut self) {
        let kept = self.layout == PAGE
            && KEPT.try_with(|kept| {
                let pages = &mut kept.borrow_mut().0;
                let room = pages.len() < KEPT_PAGES;
                if room {
                    pages.push(self.start);
                }
                room
            }) == Ok(true);
        if kept {
            return;
        }
        // SAFETY: allocated in `zeroed` with this very layout, and not kept.
        unsafe { dealloc(self.start.as_ptr(), self.layout) }
    }
}

impl Deref for AlignedBuffer {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: `start` points at `len` initialised bytes owned by `self`.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl DerefMut for AlignedBuffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `self` is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

/// An immutable slice of a shared buffer. Clones share the memory.
#[derive(Clone, Debug)]
pub struct Payload {
    buffer: Arc<AlignedBuffer>,
    start: usize,
    len: usize,
}

impl Payload {
    #[must_use]
    pub fn new(buffer: AlignedBuffer) -> Self {
        let len = buffer.len();
        Self { buffer: Arc::new(buffer), start: 0, len }
    }

    #[must_use]
    pub fn copy_of(bytes: &[u8]) -> Self {
        Self::new(AlignedBuffer::from_slice(bytes))
    }

    /// The bytes `start..start + len` of this payload.
    #[must_use]
    pub fn slice(&self, start: usize, len: usize) -> Self {
        assert!(start + len <= self.len, "{start}+{len} of {}", self.len);
        Self { buffer: Arc::clone(&self.buffer), start: self.start + start, len }
    }
}

impl Deref for Payload {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.buffer[self.start..self.start + self.len]
    }
}

impl PartialEq for Payload {
    fn eq(&self, other: &Self) -> bool {
        self[..] == other[..]
    }
}

/// Whether all bytes are zero.
#[must_use]
pub fn is_zero(bytes: &[u8]) -> bool {
    let (words, rest) = bytes.as_chunks::<64>();
    rest.iter().all(|byte| *byte == 0)
        && words.iter().all(|word| word.iter().fold(0, |seen, byte| seen | byte) == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_is_aligned_and_zeroed() {
        for len in [0, 1, 4096, (2 << 20) - 1, 2 << 20, (2 << 20) + 512] {
            let buffer = AlignedBuffer::zeroed(len);
            assert_eq!(buffer.len(), len);
            assert_eq!(buffer.as_ptr().align_offset(PAGE_BYTES), 0);
            assert!(buffer.iter().all(|byte| *byte == 0));
        }
        assert_eq!(AlignedBuffer::zeroed(4 << 20).as_ptr().align_offset(HUGE_PAGE_BYTES), 0);
    }

    #[test]
    fn a_page_that_was_given_back_is_used_again_and_a_zeroed_one_is_zeroed() {
        let first = AlignedBuffer::from_slice(&[7; 4096]);
        let place = first.as_ptr();
        drop(first);
        let again = AlignedBuffer::used(512);
        assert_eq!((again.as_ptr(), again.len()), (place, 512));
        drop(again);
        assert!(AlignedBuffer::zeroed(4096).iter().all(|byte| *byte == 0));
        let many: Vec<_> = (0..KEPT_PAGES + 9).map(|_| AlignedBuffer::zeroed(4096)).collect();
        drop(many);
        KEPT.with_borrow(|kept| assert_eq!(kept.0.len(), KEPT_PAGES));
    }

    #[test]
    fn a_slice_of_a_payload_shares_its_memory() {
        let payload = Payload::copy_of(b"0123456789");
        let part = payload.slice(2, 4).slice(1, 2);
        assert_eq!(&part[..], b"34");
        assert_eq!(part.as_ptr(), payload[3..].as_ptr());
    }
}
