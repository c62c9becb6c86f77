//! Any folder, with faults injected by a plan.
//!
//! Making and renaming files count as writes. A write that fails does `done_before` of its bytes.
//! Does not know: chance; what strikes is said beforehand.

use std::io;
use std::path::Path;
use std::sync::Arc;

use super::faulty::{Fault, FaultPlan, Operation};
use super::{Folder, FolderFile};
use crate::error::{Error, Result};
use crate::extent::ByteRange;

/// See the module.
#[derive(Clone, Debug)]
pub struct FaultyFolder {
    inner: Arc<dyn Folder>,
    plan: FaultPlan,
}

impl FaultyFolder {
    #[must_use]
    pub fn new(inner: Arc<dyn Folder>, plan: FaultPlan) -> Self {
        Self { inner, plan }
    }

    fn strike(&self, operation: Operation, words: &'static str) -> Result<()> {
        match self.plan.strike(operation, ByteRange::default()) {
            Some(fault) => Err(failure(fault, words)),
            None => Ok(()),
        }
    }

    fn wrapped(&self, inner: Arc<dyn FolderFile>) -> Arc<dyn FolderFile> {
        Arc::new(FaultyFile { inner, plan: self.plan.clone() })
    }
}

fn failure(fault: Fault, words: &'static str) -> Error {
    Error::device(words, &io::Error::from_raw_os_error(fault.errno))
}

impl Folder for FaultyFolder {
    fn path(&self) -> &Path {
        self.inner.path()
    }

    fn names(&self) -> Result<Vec<String>> {
        self.inner.names()
    }

    fn create(&self, name: &str) -> Result<Arc<dyn FolderFile>> {
        self.strike(Operation::Write, "create")?;
        self.inner.create(name).map(|file| self.wrapped(file))
    }

    fn open(&self, name: &str) -> Result<Arc<dyn FolderFile>> {
        self.inner.open(name).map(|file| self.wrapped(file))
    }

    fn rename(&self, from: &str, to: &str) -> Result<()> {
        self.strike(Operation::Write, "rename")?;
        self.inner.rename(from, to)
    }

    fn flush(&self) -> Result<()> {
        self.strike(Operation::Flush, "flush directory")?;
        self.inner.flush()
    }
}

#[derive(Debug)]
struct FaultyFile {
    inner: Arc<dyn FolderFile>,
    plan: FaultPlan,
}

impl FolderFile for FaultyFile {
    fn length(&self) -> Result<u64> {
        self.inner.length()
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let range = ByteRange::new(offset, buffer.len() as u64);
        match self.plan.strike(Operation::Read, range) {
            Some(fault) => Err(failure(fault, "read").at_offset(offset)),
            None => self.inner.read_at(offset, buffer),
        }
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> Result<()> {
        let range = ByteRange::new(offset, data.len() as u64);
        let Some(fault) = self.plan.strike(Operation::Write, range) else {
            return self.inner.write_at(offset, data);
        };
        let done = usize::try_from(fault.done_before).unwrap_or(usize::MAX).min(data.len());
        self.inner.write_at(offset, &data[..done])?;
        Err(failure(fault, "write").at_offset(offset + done as u64))
    }

    fn flush(&self) -> Result<()> {
        match self.plan.strike(Operation::Flush, ByteRange::default()) {
            Some(fault) => Err(failure(fault, "flush")),
            None => self.inner.flush(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::RamFolder;
    use crate::device::faulty::Strikes;

    #[test]
    fn the_planned_operation_fails_and_the_others_pass() {
        let plan = FaultPlan::new();
        let folder = FaultyFolder::new(Arc::new(RamFolder::new()), plan.clone());
        plan.add(Fault {
            done_before: 3,
            ..Fault::once(Operation::Write, 28).striking(Strikes::After(1))
        });
        let file = folder.create("a").expect("the first write");
        let failed = file.write_at(0, b"abcdef").expect_err("the second");
        assert_eq!((failed.errno(), failed.offset()), (Some(28), Some(3)));
        assert_eq!(file.length().expect("known"), 3);
        plan.add(Fault::once(Operation::Read, 5));
        let opened = folder.open("a").expect("there");
        opened.read_at(0, &mut [0; 3]).expect_err("planned");
        opened.read_at(0, &mut [0; 3]).expect("once");
        plan.add(Fault::once(Operation::Flush, 5));
        folder.flush().expect_err("planned");
        file.flush().expect("once");
    }
}
