//! A directory of crashing devices and records, all on one power supply.
//!
//! Guarantees: as `Directory` says; a directory operation during which the power goes out happened
//! whole or not at all, as the supply says; a crash of the root crashes every file beneath it.
//! Does not know: file systems.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::crashing::{Capacity, Chooser, CrashingDevice, Power, Supply, power_lost};
use super::directory::is_plain;
use super::{Device, Directory, Space};
use crate::error::{Error, Result};

/// Puts something before each file that is created or opened, e.g. a `FaultyDevice`.
pub type Wrapper = Arc<dyn Fn(&str, Arc<dyn Device>) -> Arc<dyn Device> + Send + Sync>;

#[derive(Debug)]
enum Entry {
    File(Arc<CrashingDevice>),
    Record(Vec<u8>),
    Directory(Arc<CrashingDirectory>),
}

/// See the module.
pub struct CrashingDirectory {
    power: Arc<Power>,
    capacity: Option<Arc<Capacity>>,
    wrapper: Option<Wrapper>,
    entries: Mutex<BTreeMap<String, Entry>>,
}

impl std::fmt::Debug for CrashingDirectory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CrashingDirectory").field("entries", &self.entries).finish_non_exhaustive()
    }
}

impl CrashingDirectory {
    /// An empty directory.
    #[must_use]
    pub fn new(power: Arc<Power>) -> Self {
        Self { power, capacity: None, wrapper: None, entries: Mutex::default() }
    }

    /// All files beneath it take their space from `capacity`.
    #[must_use]
    pub fn with_capacity(self, capacity: Arc<Capacity>) -> Self {
        Self { capacity: Some(capacity), ..self }
    }

    /// Where its files take their space from, if that is limited.
    #[must_use]
    pub fn capacity(&self) -> Option<&Arc<Capacity>> {
        self.capacity.as_ref()
    }

    #[must_use]
    pub fn with_wrapper(self, wrapper: Wrapper) -> Self {
        Self { wrapper: Some(wrapper), ..self }
    }

    /// The directory as it comes up after the power was lost now, on another supply.
    #[must_use]
    pub fn crash(&self, chooser: Chooser<'_>, power: &Arc<Power>) -> Self {
        let capacity = self.capacity.as_ref().map(|old| Capacity::new(old.total()));
        self.crash_into(chooser, power, capacity.as_ref())
    }

    fn crash_into(
        &self,
        chooser: Chooser<'_>,
        power: &Arc<Power>,
        capacity: Option<&Arc<Capacity>>,
    ) -> Self {
        let mut entries = BTreeMap::new();
        for (name, entry) in self.lock().iter() {
            let survivor = match entry {
                Entry::File(file) => Entry::File(Arc::new(file.crash_into(
                    &mut *chooser,
                    Arc::clone(power),
                    capacity.cloned(),
                ))),
                Entry::Record(bytes) => Entry::Record(bytes.clone()),
                Entry::Directory(inner) => {
                    Entry::Directory(Arc::new(inner.crash_into(&mut *chooser, power, capacity)))
                }
            };
            entries.insert(name.clone(), survivor);
        }
        Self {
            power: Arc::clone(power),
            capacity: capacity.cloned(),
            wrapper: self.wrapper.clone(),
            entries: Mutex::new(entries),
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Entry>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does one durable operation under the power's rule.
    fn change<T>(
        &self,
        name: &str,
        change: impl FnOnce(&mut BTreeMap<String, Entry>) -> Result<T>,
    ) -> Result<T> {
        assert!(is_plain(name), "{name:?} is no plain name");
        match self.power.spend() {
            Supply::On => change(&mut self.lock()),
            Supply::Last if self.power.last_takes_effect() => {
                let _done = change(&mut self.lock())?;
                Err(power_lost())
            }
            Supply::Last | Supply::Off => Err(power_lost()),
        }
    }

    fn wrapped(&self, name: &str, file: Arc<CrashingDevice>) -> Arc<dyn Device> {
        match &self.wrapper {
            Some(wrapper) => wrapper(name, file),
            None => file,
        }
    }

    fn give_back_space(&self) {
        for entry in self.lock().values() {
            match entry {
                Entry::File(file) => file.give_back_space(),
                Entry::Directory(inner) => inner.give_back_space(),
                Entry::Record(_) => {}
            }
        }
    }
}

fn absent(name: &str) -> Error {
    Error::usage(format!("{name}: no such file")).with_errno(2)
}

impl Directory for CrashingDirectory {
    fn create(&self, name: &str, size: u64) -> Result<Arc<dyn Device>> {
        let file = Arc::new(CrashingDevice::with_capacity(
            size,
            Arc::clone(&self.power),
            self.capacity.clone(),
        ));
        self.change(name, |entries| {
            if entries.contains_key(name) {
                return Err(Error::usage(format!("{name}: exists already")).with_errno(17));
            }
            entries.insert(name.to_owned(), Entry::File(Arc::clone(&file)));
            Ok(())
        })?;
        Ok(self.wrapped(name, file))
    }

    fn open(&self, name: &str) -> Result<Arc<dyn Device>> {
        match self.lock().get(name) {
            Some(Entry::File(file)) => Ok(self.wrapped(name, Arc::clone(file))),
            _ => Err(absent(name)),
        }
    }

    fn names(&self) -> Result<Vec<String>> {
        Ok(self.lock().keys().cloned().collect())
    }

    fn replace(&self, name: &str, bytes: &[u8]) -> Result<()> {
        self.change(name, |entries| {
            entries.insert(name.to_owned(), Entry::Record(bytes.to_vec()));
            Ok(())
        })
    }

    fn read(&self, name: &str, bytes_max: u64) -> Result<Option<Vec<u8>>> {
        if self.power.is_off() {
            return Err(power_lost());
        }
        match self.lock().get(name) {
            None => Ok(None),
            Some(Entry::Record(bytes)) if bytes.len() as u64 <= bytes_max => {
                Ok(Some(bytes.clone()))
            }
            Some(Entry::Record(_)) => Err(Error::format(format!("{name}: record too long"))),
            Some(_) => Err(absent(name)),
        }
    }

    fn remove(&self, name: &str) -> Result<()> {
        self.change(name, |entries| {
            match entries.remove(name) {
                Some(Entry::File(file)) => file.give_back_space(),
                Some(Entry::Directory(inner)) => inner.give_back_space(),
                Some(Entry::Record(_)) | None => {}
            }
            Ok(())
        })
    }

    fn directory(&self, name: &str) -> Result<Arc<dyn Directory>> {
        if let Some(Entry::Directory(inner)) = self.lock().get(name) {
            return Ok(Arc::clone(inner) as Arc<dyn Directory>);
        }
        let made = Arc::new(Self {
            power: Arc::clone(&self.power),
            capacity: self.capacity.clone(),
            wrapper: self.wrapper.clone(),
            entries: Mutex::default(),
        });
        self.change(name, |entries| {
            entries.insert(name.to_owned(), Entry::Directory(Arc::clone(&made)));
            Ok(())
        })?;
        Ok(made)
    }

    fn space(&self) -> Result<Option<Space>> {
        Ok(self.capacity.as_ref().map(|held| Space { free: held.free(), total: held.total() }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interrupted_replacement_happened_whole_or_not_at_all() {
        for (takes_effect, expected) in [(false, &b"old"[..]), (true, &b"new"[..])] {
            let directory = CrashingDirectory::new(Power::failing_at(1, takes_effect));
            directory.replace("record", b"old").expect("event 0");
            directory.replace("record", b"new").expect_err("event 1");
            let after = directory.crash(&mut |_| 0, &Power::steady());
            assert_eq!(after.read("record", 9).expect("read").as_deref(), Some(expected));
        }
    }

    #[test]
    fn a_crash_of_the_root_crashes_the_files_beneath() {
        let directory = CrashingDirectory::new(Power::steady());
        let inner = directory.directory("inner").expect("made");
        inner.create("file", 1024).expect("created").write_at(0, &[1; 1024]).expect("written");
        let after = directory.crash(&mut |_| 0, &Power::steady());
        let file = after.directory("inner").expect("survived").open("file").expect("survived");
        let mut bytes = [9; 1024];
        file.read_at(0, &mut bytes).expect("read");
        assert_eq!(bytes, [0; 1024]);
    }

    #[test]
    fn removing_a_file_gives_its_space_back() {
        let directory = CrashingDirectory::new(Power::steady()).with_capacity(Capacity::new(4096));
        let file = directory.create("file", 4096).expect("created");
        file.write_at(0, &[1; 512]).expect("written");
        assert_eq!(directory.space().expect("told"), Some(Space { free: 0, total: 4096 }));
        directory.remove("file").expect("removed");
        assert_eq!(directory.space().expect("told"), Some(Space { free: 4096, total: 4096 }));
    }
}
