//! Old bytes read from one device and written to another at the same offsets, many pieces at a
//! time.
//!
//! Guarantees: a run without gaps is read and written in pieces of `COPY_BYTES`, however small its
//! blocks; memory is bounded by `PRESERVING_THREADS` buffers on huge pages, taken once and kept;
//! threads of the pool are only borrowed while they are free, so others find some (a demand read
//! does not wait for old bytes).
//! Does not know: snapshots, maps, what is durable.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use crate::device::{AlignedBuffer, Device, WorkerPool, is_zero, share};
use crate::error::Result;
use crate::extent::ByteRange;
use crate::limits::{COPY_BYTES, PRESERVING_THREADS};

/// One huge page.
const BUFFER_BYTES: usize = 2 << 20;
const SMALL_BYTES: usize = 64 << 10;
const ZERO_GRAIN_BYTES: usize = 4096;

/// Threads and buffers for copying, kept from one copy to the next.
#[derive(Debug, Default)]
pub(super) struct Copier {
    pool: OnceLock<Arc<WorkerPool>>,
    buffers: Arc<Mutex<Vec<AlignedBuffer>>>,
}

/// Asked before bytes are written, with their number.
pub(super) type Room = dyn Fn(u64) -> Result<()> + Send + Sync;

/// Where copied bytes go as well, and from which place on.
pub(super) type Memory = (Arc<Mutex<AlignedBuffer>>, usize);

impl Copier {
    /// From now on threads of the pool help. Only the first pool counts.
    pub fn set_pool(&self, pool: &Arc<WorkerPool>) {
        self.pool.get_or_init(|| Arc::clone(pool));
    }

    pub fn pool(&self) -> Option<&Arc<WorkerPool>> {
        self.pool.get()
    }

    /// Copies the ranges, and if `memory` is given also one after the other into it, from the
    /// stated place on; zeros are not written, since `target` reads as zeros where nothing was.
    pub fn copy(
        &self,
        source: &Arc<dyn Device>,
        target: &Arc<dyn Device>,
        ranges: impl Iterator<Item = ByteRange>,
        memory: Option<Memory>,
        room: Arc<Room>,
    ) -> Result<()> {
        let mut place = memory.as_ref().map_or(0, |(_, from)| *from);
        let placed = |piece: ByteRange| {
            place += piece.length as usize;
            (piece, place - piece.length as usize)
        };
        let pieces: VecDeque<_> = ranges.flat_map(pieces).map(placed).collect();
        let (source, target) = (Arc::clone(source), Arc::clone(target));
        let buffers = Arc::clone(&self.buffers);
        let work = move |(piece, place): (ByteRange, usize)| {
            let mut buffer = taken(&buffers, piece.length);
            let copied = copy_piece(&*source, &*target, piece, &mut buffer, &*room);
            if let Some((memory, _)) = &memory {
                let bytes = &buffer[..piece.length as usize];
                lock(memory)[place..][..bytes.len()].copy_from_slice(bytes);
            }
            let mut kept = lock(&buffers);
            if kept.len() < PRESERVING_THREADS {
                kept.push(buffer);
            }
            copied
        };
        share(self.pool.get().map(|pool| &**pool), PRESERVING_THREADS - 1, pieces, work)
    }

    /// Does two things side by side where a thread is free, else one after the other.
    pub fn both(
        &self,
        first: impl FnOnce() -> Result<()> + Send + 'static,
        second: impl FnOnce() -> Result<()> + Send + 'static,
    ) -> (Result<()>, Result<()>) {
        type Work = Box<dyn FnOnce() -> Result<()> + Send>;
        let results: Arc<[OnceLock<Result<()>>; 2]> = Arc::default();
        let kept = Arc::clone(&results);
        let items: VecDeque<(usize, Work)> =
            [(0, Box::new(first) as Work), (1, Box::new(second) as Work)].into();
        let pool = self.pool.get().map(|pool| &**pool);
        let never_fails = share(pool, 1, items, move |(at, work): (usize, Work)| {
            kept[at].get_or_init(work);
            Ok(())
        });
        never_fails.expect("failures are kept apart");
        let result = |at: usize| results[at].get().cloned().expect("both were done");
        (result(0), result(1))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A buffer of so many bytes or more. Clearing a huge page would take longer than what is done with
/// a few blocks in it.
fn taken(buffers: &Mutex<Vec<AlignedBuffer>>, bytes: u64) -> AlignedBuffer {
    let mut held = lock(buffers);
    let fits = held.iter().rposition(|buffer| buffer.len() as u64 >= bytes);
    fits.map(|at| held.swap_remove(at)).unwrap_or_else(|| {
        let small = bytes <= SMALL_BYTES as u64;
        AlignedBuffer::zeroed(if small { SMALL_BYTES } else { BUFFER_BYTES })
    })
}

/// Cuts a range where multiples of `COPY_BYTES` lie, so that requests are aligned.
fn pieces(range: ByteRange) -> impl Iterator<Item = ByteRange> {
    let mut at = range.offset;
    std::iter::from_fn(move || {
        let end = ((at / COPY_BYTES + 1) * COPY_BYTES).min(range.end());
        let piece = ByteRange::new(at, end.checked_sub(at)?);
        at = end.max(at + 1);
        (!piece.is_empty()).then_some(piece)
    })
}

fn copy_piece(
    source: &dyn Device,
    target: &dyn Device,
    piece: ByteRange,
    buffer: &mut AlignedBuffer,
    room: &Room,
) -> Result<()> {
    let bytes = &mut buffer[..piece.length as usize];
    source.read_at(piece.offset, bytes)?;
    // Whole grains of zeros at either end stay holes.
    let holds = |grain: &[u8]| !is_zero(grain);
    let Some(first) = bytes.chunks(ZERO_GRAIN_BYTES).position(holds) else { return Ok(()) };
    let last = bytes.chunks(ZERO_GRAIN_BYTES).rposition(holds).expect("there is a first");
    let from = first * ZERO_GRAIN_BYTES;
    let to = ((last + 1) * ZERO_GRAIN_BYTES).min(bytes.len());
    room((to - from) as u64)?;
    target.write_at(piece.offset + from as u64, &bytes[from..to])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::RamDevice;

    #[test]
    fn pieces_cover_their_range_and_are_cut_at_aligned_places() {
        for (offset, length) in
            [(0, 1), (512, COPY_BYTES), (COPY_BYTES - 512, 1024), (7 * COPY_BYTES, 3 * COPY_BYTES)]
        {
            let range = ByteRange::new(offset, length);
            let cut: Vec<_> = pieces(range).collect();
            assert_eq!(cut.first().expect("some").offset, offset);
            assert_eq!(cut.last().expect("some").end(), range.end());
            assert!(cut.windows(2).all(|pair| pair[0].end() == pair[1].offset));
            assert!(cut[1..].iter().all(|piece| piece.offset.is_multiple_of(COPY_BYTES)));
        }
        assert_eq!(pieces(ByteRange::new(5, 0)).count(), 0);
    }

    #[test]
    fn what_is_copied_equals_its_source_with_and_without_helpers() {
        let bytes: Vec<u8> = (0..4 << 20).map(|at: u32| (at / 512 % 251) as u8).collect();
        let source: Arc<dyn Device> = Arc::new(RamDevice::from_bytes(bytes.clone()));
        for threads in [0, 3] {
            let ram = Arc::new(RamDevice::new(4 << 20));
            let target = Arc::clone(&ram) as Arc<dyn Device>;
            let copier = Copier::default();
            if threads > 0 {
                copier.set_pool(&Arc::new(WorkerPool::new("test", threads).expect("threads")));
            }
            let memory = (Arc::new(Mutex::new(AlignedBuffer::zeroed(4 << 20))), 4096);
            let ranges = [ByteRange::new(512, 3 << 20), ByteRange::new((3 << 20) + 4096, 8192)];
            copier
                .copy(
                    &source,
                    &target,
                    ranges.into_iter(),
                    Some(memory.clone()),
                    Arc::new(|_| Ok(())),
                )
                .expect("copied");
            let found = ram.contents();
            for range in ranges {
                let part = range.offset as usize..range.end() as usize;
                assert!(found[part.clone()] == bytes[part]);
            }
            let (memory, _) = memory;
            let expected = [&bytes[512..][..3 << 20], &bytes[(3 << 20) + 4096..][..8192]].concat();
            assert!(lock(&memory)[4096..][..expected.len()] == expected);
            assert!(is_zero(&found[..512]) && is_zero(&found[(3 << 20) + 12288..]));
        }
    }
}
