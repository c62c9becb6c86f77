//! A disk that loses power: each sector written since the last flush survives a crash as it was
//! durable or as any write since left it, whichever chance says.
//!
//! Guarantees: a flush covers only writes that had returned when it began; a failed flush stays
//! failed until the disk is opened anew; a failed write leaves each sector old or new.
//! Does not know: what is stored.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, MutexGuard, PoisonError};

use dualrestore::device::Device;
use dualrestore::error::{Error, ErrorKind, Result};

use dualrestore::sim::Chance;

const SECTOR: usize = 512;
type Sector = [u8; SECTOR];

/// See the module.
#[derive(Debug)]
pub struct Disk {
    size: u64,
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    visible: Vec<u8>,
    durable: Vec<u8>,
    /// Per sector what writes since the last flush left, oldest first, each with its operation.
    waiting: BTreeMap<u64, Vec<(u64, Sector)>>,
    /// The operation that writes now; 0 for one that returns at once.
    operation: u64,
    not_returned: BTreeSet<u64>,
    /// Operations until the power goes out.
    fuse: Option<u64>,
    blown: bool,
    flush_failed: bool,
    fail_reads: u32,
    fail_writes: u32,
    fail_flushes: u32,
    chance: Chance,
}

fn fault(operation: &'static str) -> Error {
    Error::device(operation, &std::io::Error::from_raw_os_error(5))
}

impl Inner {
    fn spend(&mut self) -> Result<()> {
        match &mut self.fuse {
            Some(0) => {
                self.blown = true;
                Err(Error::new(ErrorKind::Device, "the power is out"))
            }
            Some(left) => {
                *left -= 1;
                Ok(())
            }
            None => Ok(()),
        }
    }

    fn put(&mut self, at: u64, sector: &Sector) {
        let start = at as usize * SECTOR;
        self.visible[start..start + SECTOR].copy_from_slice(sector);
        self.waiting.entry(at).or_default().push((self.operation, *sector));
    }

    fn write(
        &mut self,
        offset: u64,
        length: usize,
        sector_at: impl Fn(usize) -> Sector,
    ) -> Result<()> {
        self.spend()?;
        let first = offset / SECTOR as u64;
        let fails = self.fail_writes > 0;
        for index in 0..length / SECTOR {
            if !fails || self.chance.one_in(2) {
                self.put(first + index as u64, &sector_at(index));
            }
        }
        if fails {
            self.fail_writes -= 1;
            return Err(fault("write"));
        }
        Ok(())
    }
}

impl Disk {
    pub fn new(contents: Vec<u8>, seed: u64) -> Self {
        Self {
            size: contents.len() as u64,
            inner: Mutex::new(Inner {
                durable: contents.clone(),
                visible: contents,
                waiting: BTreeMap::new(),
                operation: 0,
                not_returned: BTreeSet::new(),
                fuse: None,
                blown: false,
                flush_failed: false,
                fail_reads: 0,
                fail_writes: 0,
                fail_flushes: 0,
                chance: Chance::new(seed),
            }),
        }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes from now on belong to this operation, which no flush covers before `returned`.
    pub fn begin(&self, operation: u64) {
        let mut inner = self.inner();
        inner.operation = operation;
        inner.not_returned.insert(operation);
    }

    pub fn end(&self) {
        self.inner().operation = 0;
    }

    pub fn returned(&self, operation: u64) {
        self.inner().not_returned.remove(&operation);
    }

    pub fn fail_next_read(&self) {
        self.inner().fail_reads = 1;
    }

    pub fn fail_next_write(&self) {
        self.inner().fail_writes = 1;
    }

    pub fn fail_next_flush(&self) {
        self.inner().fail_flushes = 1;
    }

    pub fn heal(&self) {
        let mut inner = self.inner();
        (inner.fail_reads, inner.fail_writes, inner.fail_flushes) = (0, 0, 0);
    }

    /// The power goes out after so many more writes and flushes.
    pub fn set_fuse(&self, operations: u64) {
        self.inner().fuse = Some(operations);
    }

    pub fn blown(&self) -> bool {
        self.inner().blown
    }

    pub fn remove_fuse(&self) {
        self.inner().fuse = None;
    }

    /// The power goes out and comes back.
    pub fn crash(&self) {
        let inner = &mut *self.inner();
        for (at, versions) in std::mem::take(&mut inner.waiting) {
            let start = at as usize * SECTOR;
            let chosen = inner.chance.index(versions.len() + 1);
            if chosen > 0 {
                inner.durable[start..start + SECTOR].copy_from_slice(&versions[chosen - 1].1);
            }
            let kept = &inner.durable[start..start + SECTOR];
            inner.visible[start..start + SECTOR].copy_from_slice(kept);
        }
        inner.not_returned.clear();
        (inner.operation, inner.fuse) = (0, None);
        (inner.blown, inner.flush_failed) = (false, false);
    }

    pub fn visible(&self) -> Vec<u8> {
        self.inner().visible.clone()
    }

    pub fn durable(&self) -> Vec<u8> {
        self.inner().durable.clone()
    }

    /// Every content that a sector may have after a crash, the visible one last.
    pub fn may(&self, sector: u64) -> Vec<Sector> {
        let inner = self.inner();
        let start = sector as usize * SECTOR;
        let durable: Sector = inner.durable[start..start + SECTOR].try_into().expect("a sector");
        let waiting = inner.waiting.get(&sector).into_iter().flatten().map(|(_, held)| *held);
        std::iter::once(durable).chain(waiting).collect()
    }
}

impl Device for Disk {
    fn size(&self) -> u64 {
        self.size
    }

    fn sector_size(&self) -> u32 {
        SECTOR as u32
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let mut inner = self.inner();
        if inner.fail_reads > 0 {
            inner.fail_reads -= 1;
            return Err(fault("read"));
        }
        let start = offset as usize;
        buffer.copy_from_slice(&inner.visible[start..start + buffer.len()]);
        Ok(())
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> Result<()> {
        self.inner().write(offset, data.len(), |index| {
            data[index * SECTOR..(index + 1) * SECTOR].try_into().expect("whole sectors")
        })
    }

    fn zero_at(&self, offset: u64, length: u64) -> Result<()> {
        self.inner().write(offset, length as usize, |_| [0; SECTOR])
    }

    fn flush(&self) -> Result<()> {
        let inner = &mut *self.inner();
        inner.spend()?;
        if inner.fail_flushes > 0 {
            inner.fail_flushes -= 1;
            inner.flush_failed = true;
        }
        if inner.flush_failed {
            return Err(fault("flush"));
        }
        let (durable, not_returned) = (&mut inner.durable, &inner.not_returned);
        inner.waiting.retain(|at, versions| {
            let covered = versions.iter().rposition(|(held, _)| !not_returned.contains(held));
            if let Some(last) = covered {
                let start = *at as usize * SECTOR;
                durable[start..start + SECTOR].copy_from_slice(&versions[last].1);
                versions.drain(..=last);
            }
            !versions.is_empty()
        });
        Ok(())
    }
}
