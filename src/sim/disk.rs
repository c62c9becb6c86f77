//! A disk in front of one that loses power, with troubles of its own: each is armed by whoever
//! drives the simulation and strikes once.
//!
//! | trouble | the operation | afterwards |
//! |---|---|---|
//! | a read fails | nothing is read | as before |
//! | a write fails | some of its sectors are written | as before |
//! | a flush fails | nothing becomes durable | it is refused until opened anew |
//!
//! Guarantees: what struck is known, and what was under way when the power went out.
//! Does not know: when troubles come.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::chance::Chance;
use crate::device::{CrashingDevice, Device, Operation, Power, Wrapper};
use crate::error::{Error, ErrorKind, Result};
use crate::extent::ByteRange;
use crate::units::SECTOR_BYTES;

pub const EIO: i32 = 5;
pub const ENOSPC: i32 = 28;

/// What a file or disk is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Part {
    Volume,
    Map,
    Intent,
    Mirror,
    Changed,
    Journal,
    Store,
    Preserved,
    Other,
}

impl Part {
    /// What a file of a state directory is for, by its name.
    pub fn of_file(name: &str) -> Self {
        match name {
            crate::map::OVERWRITE_MAP_NAME => Self::Map,
            crate::map::INTENT_LOG_NAME => Self::Intent,
            "journal" => Self::Journal,
            "store" => Self::Store,
            "preserved.map" => Self::Preserved,
            name if name.starts_with("changed-") => Self::Changed,
            _ => Self::Other,
        }
    }
}

#[derive(Debug)]
struct State {
    power: Arc<Power>,
    armed: Vec<(Part, Operation, i32)>,
    struck: Vec<(Part, Operation)>,
    last: Option<(Part, Operation)>,
    chance: Chance,
}

/// What troubles the disks of one node. Clones share it.
#[derive(Clone, Debug)]
pub struct Troubles {
    /// Whether reads and writes count as quick, so that their caller does them itself.
    answers_at_once: bool,
    state: Arc<Mutex<State>>,
}

impl Troubles {
    pub fn new(power: Arc<Power>, answers_at_once: bool, seed: u64) -> Self {
        let state = State {
            power,
            armed: Vec::new(),
            struck: Vec::new(),
            last: None,
            chance: Chance::new(seed),
        };
        Self { answers_at_once, state: Arc::new(Mutex::new(state)) }
    }

    /// The node has come up again, on this supply: its troubles are over.
    pub fn renew(&self, power: Arc<Power>) {
        let state = &mut *self.lock();
        state.power = power;
        state.armed.clear();
        state.last = None;
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next operation of this kind on this part fails.
    pub fn arm(&self, part: Part, operation: Operation, errno: i32) {
        self.lock().armed.push((part, operation, errno));
    }

    pub fn disarm(&self) {
        self.lock().armed.clear();
    }

    /// What struck since the last call.
    pub fn take_struck(&self) -> Vec<(Part, Operation)> {
        std::mem::take(&mut self.lock().struck)
    }

    /// What was under way when the power went out.
    pub fn last(&self) -> Option<(Part, Operation)> {
        self.lock().last
    }

    /// Before each file of a directory.
    pub fn wrapper(&self) -> Wrapper {
        let troubles = self.clone();
        Arc::new(move |name: &str, file: Arc<dyn Device>| {
            troubles.before(Part::of_file(name), file)
        })
    }

    pub fn disk(&self, part: Part, device: &Arc<CrashingDevice>) -> Arc<dyn Device> {
        self.before(part, Arc::clone(device) as Arc<dyn Device>)
    }

    fn before(&self, part: Part, inner: Arc<dyn Device>) -> Arc<dyn Device> {
        let failed = AtomicBool::new(false);
        Arc::new(Disk { part, inner, troubles: self.clone(), failed })
    }

    fn strike(&self, part: Part, operation: Operation) -> Option<i32> {
        let mut state = self.lock();
        let at = state.armed.iter().position(|(p, o, _)| (*p, *o) == (part, operation))?;
        let (_, _, errno) = state.armed.swap_remove(at);
        state.struck.push((part, operation));
        Some(errno)
    }
}

#[derive(Debug)]
struct Disk {
    part: Part,
    inner: Arc<dyn Device>,
    troubles: Troubles,
    /// A flush has failed since it was opened, as `FileDevice` has it.
    failed: AtomicBool,
}

fn failed(operation: &'static str, errno: i32) -> Error {
    Error::device(operation, &io::Error::from_raw_os_error(errno))
}

impl Disk {
    fn check(&self) -> Result<()> {
        if self.failed.load(Ordering::Acquire) {
            return Err(Error::new(ErrorKind::Poisoned, "a flush failed earlier"));
        }
        Ok(())
    }

    /// Notes what was under way when the power went out.
    fn told<T>(&self, operation: Operation, result: Result<T>) -> Result<T> {
        if result.is_err() {
            let mut state = self.troubles.lock();
            if state.power.is_off() {
                state.last.get_or_insert((self.part, operation));
            }
        }
        result
    }

    /// Of a write that fails, some sectors are written.
    fn write_some(&self, offset: u64, sectors: u64, write: &dyn Fn(u64) -> Result<()>) {
        for sector in 0..sectors {
            let chosen = self.troubles.lock().chance.one_in(2);
            if chosen && write(offset + sector * SECTOR_BYTES).is_err() {
                return;
            }
        }
    }
}

impl Device for Disk {
    fn size(&self) -> u64 {
        self.inner.size()
    }

    fn sector_size(&self) -> u32 {
        self.inner.sector_size()
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        match self.troubles.strike(self.part, Operation::Read) {
            Some(errno) => Err(failed("read", errno)),
            None => self.told(Operation::Read, self.inner.read_at(offset, buffer)),
        }
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> Result<()> {
        self.check()?;
        if let Some(errno) = self.troubles.strike(self.part, Operation::Write) {
            self.write_some(offset, data.len() as u64 / SECTOR_BYTES, &|at| {
                let start = (at - offset) as usize;
                self.inner.write_at(at, &data[start..start + SECTOR_BYTES as usize])
            });
            return Err(failed("write", errno));
        }
        self.told(Operation::Write, self.inner.write_at(offset, data))
    }

    fn zero_at(&self, offset: u64, length: u64) -> Result<()> {
        self.check()?;
        if let Some(errno) = self.troubles.strike(self.part, Operation::Write) {
            self.write_some(offset, length / SECTOR_BYTES, &|at| {
                self.inner.zero_at(at, SECTOR_BYTES)
            });
            return Err(failed("zero", errno));
        }
        self.told(Operation::Zero, self.inner.zero_at(offset, length))
    }

    fn flush(&self) -> Result<()> {
        self.check()?;
        if let Some(errno) = self.troubles.strike(self.part, Operation::Flush) {
            self.failed.store(true, Ordering::Release);
            return Err(failed("flush", errno));
        }
        self.told(Operation::Flush, self.inner.flush())
    }

    fn next_data(&self, offset: u64) -> Result<Option<ByteRange>> {
        self.inner.next_data(offset)
    }

    fn answers_at_once(&self) -> bool {
        self.troubles.answers_at_once
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn after_a_flush_that_failed_nothing_is_written_until_it_is_opened_anew() {
        let power = Power::steady();
        let device = Arc::new(CrashingDevice::new(1024, Arc::clone(&power)));
        let troubles = Troubles::new(power, true, 1);
        let disk = troubles.disk(Part::Volume, &device);
        disk.write_at(0, &[1; 512]).expect("written");
        troubles.arm(Part::Mirror, Operation::Flush, EIO);
        disk.flush().expect("another part's trouble");
        disk.write_at(0, &[2; 512]).expect("written");
        troubles.arm(Part::Volume, Operation::Flush, EIO);
        disk.flush().expect_err("it strikes");
        for refused in [disk.flush(), disk.write_at(0, &[3; 512]), disk.zero_at(0, 512)] {
            assert_eq!(refused.expect_err("refused").kind(), ErrorKind::Poisoned);
        }
        assert_eq!(device.may(0), [[1; 512], [2; 512]]);
        troubles.disk(Part::Volume, &device).flush().expect("opened anew");
        assert_eq!(troubles.take_struck(), [(Part::Volume, Operation::Flush)]);
    }

    #[test]
    fn of_a_write_that_fails_each_sector_is_old_or_new() {
        let power = Power::steady();
        let device = Arc::new(CrashingDevice::from_bytes(&[1; 8192], Arc::clone(&power)));
        let troubles = Troubles::new(power, true, 1);
        let disk = troubles.disk(Part::Volume, &device);
        troubles.arm(Part::Volume, Operation::Write, ENOSPC);
        let error = disk.write_at(0, &[2; 8192]).expect_err("it strikes");
        assert_eq!(error.errno(), Some(ENOSPC));
        let bytes = device.contents();
        let sectors: BTreeSet<&[u8]> = bytes.chunks(512).collect();
        assert_eq!(sectors, BTreeSet::from([&[1; 512][..], &[2; 512][..]]));
    }
}
