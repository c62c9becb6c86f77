//! Bits in memory: paged atomic bitmaps and the word kernels that scan them. Knows no device.

mod kernels;
mod paged;
mod runs;

pub use paged::{Bitmap, PAGE_BITS, PAGE_WORDS};
pub use runs::Runs;
