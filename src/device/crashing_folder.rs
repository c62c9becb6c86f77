//! A folder in memory that loses power: what was not flushed survives in part.
//!
//! | what | survives |
//! |---|---|
//! | a name: made, renamed, removed | since the folder's last flush: the first `n` changes |
//! | a write | since the file's last flush: not at all, half or whole, each on its own |
//!
//! as the chooser says, who is asked once for the names (0 to their number) and once for each write
//! (0, 1 or 2). Reads see the last write. Does not know: chance.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::crashing::{Chooser, Power, Supply, power_lost};
use super::folder::{Folder, FolderFile, checked};
use crate::error::{Error, Result};

#[derive(Debug, Default)]
struct Contents {
    now: Vec<u8>,
    durable: Vec<u8>,
    /// Writes since the last flush, oldest first.
    pending: Vec<(usize, Vec<u8>)>,
}

fn lay(bytes: &mut Vec<u8>, at: usize, data: &[u8]) {
    if bytes.len() < at + data.len() {
        bytes.resize(at + data.len(), 0);
    }
    bytes[at..at + data.len()].copy_from_slice(data);
}

impl Contents {
    fn after_crash(&self, chooser: Chooser<'_>) -> Self {
        let mut durable = self.durable.clone();
        for (at, data) in &self.pending {
            match chooser(2) {
                0 => {}
                1 => lay(&mut durable, *at, &data[..data.len() / 2]),
                _ => lay(&mut durable, *at, data),
            }
        }
        Self { now: durable.clone(), durable, pending: Vec::new() }
    }
}

/// See the module.
#[derive(Debug)]
struct CrashingFile {
    power: Arc<Power>,
    contents: Mutex<Contents>,
}

impl CrashingFile {
    fn lock(&self) -> MutexGuard<'_, Contents> {
        self.contents.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

type Names = BTreeMap<String, Arc<CrashingFile>>;

#[derive(Clone, Debug)]
enum Change {
    Named(String, Arc<CrashingFile>),
    Renamed(String, String),
    Removed(String),
}

fn apply(names: &mut Names, change: &Change) {
    match change {
        Change::Named(name, file) => {
            names.insert(name.clone(), Arc::clone(file));
        }
        Change::Renamed(from, to) => {
            if let Some(file) = names.remove(from) {
                names.insert(to.clone(), file);
            }
        }
        Change::Removed(name) => {
            names.remove(name);
        }
    }
}

#[derive(Debug, Default)]
struct State {
    durable: Names,
    changes: Vec<Change>,
}

impl State {
    fn now(&self) -> Names {
        self.after(self.changes.len())
    }

    fn after(&self, changes: usize) -> Names {
        let mut names = self.durable.clone();
        self.changes[..changes].iter().for_each(|change| apply(&mut names, change));
        names
    }
}

/// See the module. Clones share the files.
#[derive(Clone, Debug)]
pub struct CrashingFolder {
    power: Arc<Power>,
    state: Arc<Mutex<State>>,
}

impl CrashingFolder {
    /// An empty folder.
    #[must_use]
    pub fn new(power: Arc<Power>) -> Self {
        Self { power, state: Arc::default() }
    }

    /// The folder as it comes up after the power was lost now, on another supply.
    #[must_use]
    pub fn crash(&self, chooser: Chooser<'_>, power: &Arc<Power>) -> Self {
        let state = self.lock();
        let names = state.after(chooser(state.changes.len()).min(state.changes.len()));
        let durable = names.into_iter().map(|(name, file)| {
            let contents = Mutex::new(file.lock().after_crash(&mut *chooser));
            (name, Arc::new(CrashingFile { power: Arc::clone(power), contents }))
        });
        let durable = durable.collect();
        let state = Arc::new(Mutex::new(State { durable, changes: Vec::new() }));
        Self { power: Arc::clone(power), state }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: Change) -> Result<()> {
        match self.power.spend() {
            Supply::Off => return Err(power_lost()),
            Supply::Last if !self.power.last_takes_effect() => return Err(power_lost()),
            Supply::Last | Supply::On => self.lock().changes.push(change),
        }
        if self.power.is_off() { Err(power_lost()) } else { Ok(()) }
    }

    fn find(&self, name: &str) -> Result<Arc<CrashingFile>> {
        if self.power.is_off() {
            return Err(power_lost());
        }
        let absent = || Error::device("open", &io::Error::from_raw_os_error(2));
        self.lock().now().remove(name).ok_or_else(|| absent().at_path(Path::new(name)))
    }
}

impl Folder for CrashingFolder {
    fn path(&self) -> &Path {
        Path::new("memory")
    }

    fn names(&self) -> Result<Vec<String>> {
        Ok(self.lock().now().into_keys().collect())
    }

    fn create(&self, name: &str) -> Result<Arc<dyn FolderFile>> {
        let name = checked(self.path(), name)?;
        if self.find(name).is_ok() {
            let taken = io::Error::from_raw_os_error(17);
            return Err(Error::device("create", &taken).at_path(Path::new(name)));
        }
        let power = Arc::clone(&self.power);
        let file = Arc::new(CrashingFile { power, contents: Mutex::default() });
        self.change(Change::Named(name.into(), Arc::clone(&file)))?;
        Ok(file)
    }

    fn open(&self, name: &str) -> Result<Arc<dyn FolderFile>> {
        Ok(self.find(name)?)
    }

    fn rename(&self, from: &str, to: &str) -> Result<()> {
        let to = checked(self.path(), to)?;
        self.find(from)?;
        self.change(Change::Renamed(from.into(), to.into()))
    }

    fn flush(&self) -> Result<()> {
        if self.power.spend() != Supply::On {
            return Err(power_lost());
        }
        let mut state = self.lock();
        state.durable = state.now();
        state.changes.clear();
        Ok(())
    }

    fn remove(&self, name: &str) -> Result<()> {
        if self.names()?.iter().any(|held| held == name) {
            return self.change(Change::Removed(name.into()));
        }
        Ok(())
    }
}

impl FolderFile for CrashingFile {
    fn length(&self) -> Result<u64> {
        Ok(self.lock().now.len() as u64)
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        if self.power.is_off() {
            return Err(power_lost());
        }
        let contents = self.lock();
        let at = usize::try_from(offset).ok();
        let held = at.and_then(|at| contents.now.get(at..at.checked_add(buffer.len())?));
        let ended = || io::Error::from(io::ErrorKind::UnexpectedEof);
        let held = held.ok_or_else(|| Error::device("read", &ended()).at_offset(offset))?;
        buffer.copy_from_slice(held);
        Ok(())
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> Result<()> {
        let supply = self.power.spend();
        if supply == Supply::Off {
            return Err(power_lost());
        }
        let at = usize::try_from(offset).expect("a file in memory fits memory");
        let mut contents = self.lock();
        lay(&mut contents.now, at, data);
        contents.pending.push((at, data.to_vec()));
        if supply == Supply::On { Ok(()) } else { Err(power_lost()) }
    }

    fn flush(&self) -> Result<()> {
        if self.power.spend() != Supply::On {
            return Err(power_lost());
        }
        let mut contents = self.lock();
        contents.durable = contents.now.clone();
        contents.pending.clear();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(folder: &CrashingFolder, name: &str) -> Vec<u8> {
        let file = folder.open(name).expect("there");
        let mut bytes = vec![0; file.length().expect("known") as usize];
        file.read_at(0, &mut bytes).expect("read");
        bytes
    }

    #[test]
    fn what_was_flushed_survives_and_the_rest_as_it_was_chosen() {
        let folder = CrashingFolder::new(Power::steady());
        let file = folder.create("a").expect("new");
        file.write_at(0, b"durable").expect("written");
        file.flush().expect("flushed");
        folder.flush().expect("flushed");
        file.write_at(7, b"half").expect("written");
        folder.rename("a", "b").expect("renamed");
        folder.create("c").expect("new");
        for (choice, names, bytes) in [
            (0, &["a"][..], &b"durable"[..]),
            (1, &["b"], b"durableha"),
            (2, &["b", "c"], b"durablehalf"),
        ] {
            let after = folder.crash(&mut |_| choice, &Power::steady());
            assert_eq!(after.names().expect("listed"), names);
            assert_eq!(read(&after, names[0]), bytes);
        }
    }

    #[test]
    fn nothing_happens_without_power() {
        let folder = CrashingFolder::new(Power::failing_at(1, true));
        let file = folder.create("a").expect("event 0");
        file.write_at(0, b"x").expect_err("event 1");
        assert!(folder.create("b").is_err() && file.flush().is_err() && folder.flush().is_err());
        let after = folder.crash(&mut |_| 1, &Power::steady());
        assert_eq!((after.names().expect("listed").len(), read(&after, "a").len()), (1, 0));
    }
}
