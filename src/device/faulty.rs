//! Any device, with faults injected by a plan that another thread may change at any time.
//!
//! Guarantees: an operation that no fault matches passes through unchanged; a fault that is there
//! once strikes once, however many threads ask.
//! Does not know: chance; what strikes is said beforehand.

use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use super::Device;
use crate::error::{Error, Result};
use crate::extent::ByteRange;

/// What a device is asked to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Operation {
    Read,
    Write,
    Zero,
    Flush,
}

/// Which of the operations of a kind a fault strikes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Strikes {
    /// Each one.
    Any,
    /// The one that comes after so many others of its kind, counted from when the fault was added.
    After(u64),
    /// Those that touch these bytes; never a flush.
    Touching(ByteRange),
}

/// One planned fault.
#[derive(Clone, Copy, Debug)]
pub struct Fault {
    pub operation: Operation,
    pub strikes: Strikes,
    pub errno: i32,
    /// Strikes again and again, or once.
    pub always: bool,
    /// Bytes of a read or write that are done before it fails; rounded down to sectors.
    pub done_before: u64,
}

impl Fault {
    /// The next operation of this kind fails, once, with nothing done.
    #[must_use]
    pub fn once(operation: Operation, errno: i32) -> Self {
        Self { operation, strikes: Strikes::Any, errno, always: false, done_before: 0 }
    }

    /// Every operation of this kind fails from now on.
    #[must_use]
    pub fn always(operation: Operation, errno: i32) -> Self {
        Self { always: true, ..Self::once(operation, errno) }
    }

    #[must_use]
    pub fn striking(self, strikes: Strikes) -> Self {
        Self { strikes, ..self }
    }
}

#[derive(Debug, Default)]
struct Plan {
    faults: Vec<Fault>,
    held: Vec<Operation>,
    waiting: usize,
    struck: u64,
}

/// The plan of one or more devices. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct FaultPlan {
    shared: Arc<(Mutex<Plan>, Condvar)>,
}

impl FaultPlan {
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    pub fn add(&self, fault: Fault) {
        self.plan().faults.push(fault);
    }

    pub fn clear(&self) {
        self.plan().faults.clear();
    }

    /// How many operations have failed by this plan.
    #[must_use]
    pub fn struck(&self) -> u64 {
        self.plan().struck
    }

    /// From now on operations of this kind wait, before they do anything, until the same is
    /// released.
    pub fn hold(&self, operation: Operation) {
        self.plan().held.push(operation);
    }

    pub fn release(&self, operation: Operation) {
        self.plan().held.retain(|held| *held != operation);
        self.shared.1.notify_all();
    }

    /// Returns once at least `count` operations wait.
    pub fn wait_until_held(&self, count: usize) {
        let plan = self.plan();
        let reached = self.shared.1.wait_while(plan, |plan| plan.waiting < count);
        drop(reached.unwrap_or_else(PoisonError::into_inner));
    }

    fn plan(&self) -> MutexGuard<'_, Plan> {
        self.shared.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait_if_held(&self, operation: Operation) {
        let mut plan = self.plan();
        if !plan.held.contains(&operation) {
            return;
        }
        plan.waiting += 1;
        self.shared.1.notify_all();
        let waited = self.shared.1.wait_while(plan, |plan| plan.held.contains(&operation));
        waited.unwrap_or_else(PoisonError::into_inner).waiting -= 1;
    }

    /// The fault that strikes this operation, if one does.
    pub(super) fn strike(&self, operation: Operation, range: ByteRange) -> Option<Fault> {
        self.wait_if_held(operation);
        let mut plan = self.plan();
        let mut struck = None;
        plan.faults.retain_mut(|fault| {
            if fault.operation != operation || struck.is_some() {
                return true;
            }
            let hit = match &mut fault.strikes {
                Strikes::Any | Strikes::After(0) => true,
                Strikes::After(others) => {
                    *others -= 1;
                    false
                }
                Strikes::Touching(bytes) => bytes.intersect(range).is_some(),
            };
            if hit {
                struck = Some(*fault);
            }
            !hit || fault.always
        });
        plan.struck += u64::from(struck.is_some());
        struck
    }
}

/// See the module.
#[derive(Debug)]
pub struct FaultyDevice<D> {
    inner: D,
    plan: FaultPlan,
}

impl<D: Device> FaultyDevice<D> {
    pub fn new(inner: D, plan: FaultPlan) -> Self {
        Self { inner, plan }
    }

    pub fn inner(&self) -> &D {
        &self.inner
    }

    pub fn plan(&self) -> &FaultPlan {
        &self.plan
    }

    fn whole_sectors(&self, fault: Fault, length: usize) -> usize {
        let sector = u64::from(self.inner.sector_size());
        (fault.done_before - fault.done_before % sector).min(length as u64) as usize
    }
}

fn failure(fault: Fault, operation: &'static str) -> Error {
    Error::device(operation, &io::Error::from_raw_os_error(fault.errno))
}

impl<D: Device> Device for FaultyDevice<D> {
    fn size(&self) -> u64 {
        self.inner.size()
    }

    fn sector_size(&self) -> u32 {
        self.inner.sector_size()
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let range = ByteRange::new(offset, buffer.len() as u64);
        let Some(fault) = self.plan.strike(Operation::Read, range) else {
            return self.inner.read_at(offset, buffer);
        };
        let done = self.whole_sectors(fault, buffer.len());
        self.inner.read_at(offset, &mut buffer[..done])?;
        Err(failure(fault, "read").at_offset(offset + done as u64))
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> Result<()> {
        let range = ByteRange::new(offset, data.len() as u64);
        let Some(fault) = self.plan.strike(Operation::Write, range) else {
            return self.inner.write_at(offset, data);
        };
        let done = self.whole_sectors(fault, data.len());
        self.inner.write_at(offset, &data[..done])?;
        Err(failure(fault, "write").at_offset(offset + done as u64))
    }

    fn zero_at(&self, offset: u64, length: u64) -> Result<()> {
        match self.plan.strike(Operation::Zero, ByteRange::new(offset, length)) {
            None => self.inner.zero_at(offset, length),
            Some(fault) => Err(failure(fault, "write zeros").at_offset(offset)),
        }
    }

    fn flush(&self) -> Result<()> {
        match self.plan.strike(Operation::Flush, ByteRange::default()) {
            None => self.inner.flush(),
            Some(fault) => Err(failure(fault, "flush")),
        }
    }

    fn next_data(&self, offset: u64) -> Result<Option<ByteRange>> {
        self.inner.next_data(offset)
    }

    fn answers_at_once(&self) -> bool {
        self.inner.answers_at_once()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::RamDevice;

    fn faulty() -> (FaultyDevice<RamDevice>, FaultPlan) {
        let plan = FaultPlan::new();
        (FaultyDevice::new(RamDevice::new(8192), plan.clone()), plan)
    }

    #[test]
    fn a_fault_planned_once_strikes_once() {
        let (device, plan) = faulty();
        plan.add(Fault::once(Operation::Flush, 28));
        assert_eq!(device.flush().expect_err("planned").errno(), Some(28));
        device.flush().expect("only once");
        assert_eq!(plan.struck(), 1);
    }

    #[test]
    fn a_fault_on_a_range_leaves_other_ranges_alone() {
        let (device, plan) = faulty();
        let bad = Strikes::Touching(ByteRange::new(1024, 512));
        plan.add(Fault::always(Operation::Write, 5).striking(bad));
        device.write_at(0, &[1; 1024]).expect("beside it");
        for _ in 0..2 {
            device.write_at(512, &[2; 1024]).expect_err("touches it");
        }
        plan.clear();
        device.write_at(512, &[2; 1024]).expect("healed");
    }

    #[test]
    fn a_short_write_does_its_beginning_and_fails() {
        let (device, plan) = faulty();
        let fault = Fault::once(Operation::Write, 5).striking(Strikes::After(1));
        plan.add(Fault { done_before: 700, ..fault });
        device.write_at(4096, &[9; 512]).expect("the first passes");
        let failed = device.write_at(0, &[7; 2048]).expect_err("the second fails");
        assert_eq!(failed.offset(), Some(512));
        assert_eq!(device.inner().contents()[..1024], [[7; 512], [0; 512]].concat());
    }

    #[test]
    fn a_held_operation_waits_until_it_is_released() {
        let (device, plan) = faulty();
        plan.hold(Operation::Write);
        std::thread::scope(|scope| {
            let writer = scope.spawn(|| device.write_at(0, &[1; 512]));
            plan.wait_until_held(1);
            assert_eq!(device.inner().contents()[0], 0);
            plan.release(Operation::Write);
            writer.join().expect("no panic").expect("written");
        });
        assert_eq!(device.inner().contents()[0], 1);
    }
}
