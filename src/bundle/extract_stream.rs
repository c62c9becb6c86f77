//! Lets the threads of a pump write one after the other, in the order of the volume: a raw or a
//! qcow2 image as a stream.
//!
//! A thread that has a piece waits until all before it are written. Pieces are taken up in order
//! and each thread has one job at a time, so that the one whose turn it is never waits.
//!
//! Guarantees: what is missing is zeros, and nothing unverified is written (law 9); of a qcow2
//! image each cluster comes where its tables say, whatever turned out to be damaged.
//! Does not know: what is reported.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::extract::Laid;
use super::extract_clusters::ClusterMap;
use super::pump::{Begun, Consumer, Opened};
use crate::device::{ByteSink, Stop};
use crate::error::Result;
use crate::extent::ByteRange;
use crate::format::qcow2::CLUSTER_BYTES;
use crate::limits::{IMAGE_STREAM_BYTES, PROGRESS_INTERVAL_MS};

/// See the module.
#[derive(Debug)]
pub(super) struct InTurn {
    /// Of a qcow2 image; a raw one has everything.
    clusters: Option<ClusterMap>,
    writing: Mutex<Writing>,
    /// Signalled when a piece was written.
    written: Condvar,
    stop: Stop,
}

#[derive(Debug)]
struct Writing {
    /// The first byte of the volume that is to come.
    at: u64,
    outlet: Outlet,
}

impl InTurn {
    /// Writes what stands before the first piece.
    pub(super) fn begin(
        clusters: Option<ClusterMap>,
        sink: Box<dyn ByteSink>,
        stop: Stop,
    ) -> Result<Self> {
        let mut outlet = Outlet { sink, held: Vec::new(), bytes: 0 };
        if let Some(clusters) = &clusters {
            clusters.write_head(&mut outlet)?;
        }
        let writing = Mutex::new(Writing { at: 0, outlet });
        Ok(Self { clusters, writing, written: Condvar::new(), stop })
    }

    /// Writes what stands after the last piece; the bytes of the whole image.
    pub(super) fn end(self, size: u64) -> Result<u64> {
        let Writing { at, mut outlet } =
            self.writing.into_inner().unwrap_or_else(PoisonError::into_inner);
        assert_eq!(at, size, "all pieces were written");
        if let Some(clusters) = &self.clusters {
            let tail = size.next_multiple_of(CLUSTER_BYTES) - size;
            let last = ByteRange::new(size - 1, 1);
            if clusters.parts(last).iter().any(|(_, there)| *there) {
                outlet.zeros(tail)?;
            }
            assert_eq!(outlet.bytes, clusters.file_bytes(), "as the tables say");
        }
        outlet.flush()?;
        Ok(outlet.bytes)
    }

    /// Waits for the turn of a piece.
    fn turn(&self, range: ByteRange) -> Result<MutexGuard<'_, Writing>> {
        let wait = Duration::from_millis(PROGRESS_INTERVAL_MS);
        let mut writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        while writing.at != range.offset {
            self.stop.check()?;
            let woken = self.written.wait_timeout(writing, wait);
            writing = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(writing)
    }

    /// Writes a piece in its turn (`None`: zeros); how many of its bytes have no place.
    fn put(&self, range: ByteRange, bytes: Option<&[u8]>) -> Result<u64> {
        let mut writing = self.turn(range)?;
        let mut misplaced = 0;
        let parts = match &self.clusters {
            None => vec![(range, true)],
            Some(clusters) => clusters.parts(range),
        };
        for (part, there) in parts {
            let start = (part.offset - range.offset) as usize;
            match bytes.map(|bytes| &bytes[start..start + part.length as usize]) {
                Some(_) if !there => misplaced += part.length,
                Some(bytes) => writing.outlet.write(bytes)?,
                None if there => writing.outlet.zeros(part.length)?,
                None => {}
            }
        }
        writing.at = range.end();
        drop(writing);
        self.written.notify_all();
        Ok(misplaced)
    }
}

impl Consumer for InTurn {
    type Claim = ();
    type Note = Laid;

    fn wanted(&self, range: ByteRange) -> Vec<ByteRange> {
        vec![range]
    }

    fn begin(&self, range: ByteRange, opened: Opened<'_>) -> Result<Begun<(), Laid>> {
        let laid = match opened {
            Opened::Zero => {
                self.put(range, None)?;
                Laid { zero: range.length, ..Laid::default() }
            }
            Opened::Bytes(bytes) => {
                let misplaced = self.put(range, Some(bytes))?;
                Laid { data: range.length - misplaced, misplaced, zero: 0 }
            }
        };
        Ok(Begun::Done(laid))
    }

    fn end(&self, (): (), result: Result<()>) -> Result<Laid> {
        result.map(|()| Laid::default())
    }

    fn lost(&self, range: ByteRange) -> Result<()> {
        self.put(range, None).map(|_| ())
    }
}

/// A sink that gets small pieces together.
#[derive(Debug)]
struct Outlet {
    sink: Box<dyn ByteSink>,
    held: Vec<u8>,
    bytes: u64,
}

impl Outlet {
    fn zeros(&mut self, length: u64) -> Result<()> {
        static ZEROS: [u8; IMAGE_STREAM_BYTES] = [0; IMAGE_STREAM_BYTES];
        let mut left = length;
        while left > 0 {
            let now = left.min(ZEROS.len() as u64);
            self.write(&ZEROS[..now as usize])?;
            left -= now;
        }
        Ok(())
    }

    fn send(&mut self) -> Result<()> {
        self.sink.write(&self.held)?;
        self.held.clear();
        Ok(())
    }
}

impl ByteSink for Outlet {
    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.bytes += bytes.len() as u64;
        if bytes.len() < IMAGE_STREAM_BYTES {
            self.held.extend_from_slice(bytes);
            return if self.held.len() < IMAGE_STREAM_BYTES { Ok(()) } else { self.send() };
        }
        self.send()?;
        self.sink.write(bytes)
    }

    fn flush(&mut self) -> Result<()> {
        self.send()?;
        self.sink.flush()
    }
}
