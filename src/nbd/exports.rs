//! The exports of a server: names, what they lead to, whom they are for, and how one is taken away.
//!
//! Guarantees: an export that is not for a client does not exist for it. A name is a key of the
//! table and nothing else, never a path. A removed export is never found again, answers no further
//! request, and wakes the connections that used it.
//! Does not know: sessions, sockets.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, Weak};

use super::identity::{Allowed, ClientIdentity};
use super::mailbox::Mailbox;
use crate::error::{Error, ErrorKind, Result};
use crate::limits;
use crate::volume::service::BlockService;

/// One name and the volume behind it. Stays usable as an object after removal; `removed` tells.
pub struct Export {
    name: String,
    description: String,
    service: Arc<dyn BlockService>,
    /// `None`: for everybody who comes this far.
    allowed: Option<Vec<Allowed>>,
    removed: AtomicBool,
    watchers: Mutex<Vec<Weak<Mailbox>>>,
}

impl Export {
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Words for a person; may be empty.
    #[must_use]
    pub fn description(&self) -> &str {
        &self.description
    }

    #[must_use]
    pub fn service(&self) -> &Arc<dyn BlockService> {
        &self.service
    }

    #[must_use]
    pub fn removed(&self) -> bool {
        self.removed.load(Ordering::Acquire)
    }

    fn is_for(&self, client: Option<&ClientIdentity>) -> bool {
        match &self.allowed {
            None => true,
            Some(allowed) => client.is_some_and(|client| client.is_among(allowed)),
        }
    }

    /// From now on `mailbox` is woken when the export is removed.
    pub(super) fn watch(&self, mailbox: &Arc<Mailbox>) {
        let mut watchers = self.watchers.lock().unwrap_or_else(PoisonError::into_inner);
        watchers.retain(|watcher| watcher.strong_count() > 0);
        watchers.push(Arc::downgrade(mailbox));
        drop(watchers);
        if self.removed() {
            mailbox.wake();
        }
    }

    fn remove(&self) {
        self.removed.store(true, Ordering::Release);
        let watchers =
            std::mem::take(&mut *self.watchers.lock().unwrap_or_else(PoisonError::into_inner));
        watchers.iter().filter_map(Weak::upgrade).for_each(|mailbox| mailbox.wake());
    }
}

impl fmt::Debug for Export {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let removed = self.removed();
        f.debug_struct("Export").field("name", &self.name).field("removed", &removed).finish()
    }
}

/// See the module.
#[derive(Debug, Default)]
pub struct ExportTable {
    exports: RwLock<BTreeMap<String, Arc<Export>>>,
}

impl ExportTable {
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Offers `service` under `name` to everybody from now on.
    pub fn insert(
        &self,
        name: &str,
        description: &str,
        service: Arc<dyn BlockService>,
    ) -> Result<()> {
        self.insert_for(name, description, service, None)
    }

    /// Offers `service` under `name` from now on, to everybody or to those clients alone.
    ///
    /// Refused: a name that is taken, too long, or holds a NUL; a description that is too long or
    /// holds a NUL; a service whose size or sector size no client could use; a full table.
    pub fn insert_for(
        &self,
        name: &str,
        description: &str,
        service: Arc<dyn BlockService>,
        allowed: Option<Vec<Allowed>>,
    ) -> Result<()> {
        check_words("an export's name", name, limits::NBD_EXPORT_NAME_BYTES_MAX)?;
        check_words("a description", description, limits::NBD_DESCRIPTION_BYTES_MAX)?;
        check_service(name, service.as_ref())?;
        let mut exports = self.exports.write().unwrap_or_else(PoisonError::into_inner);
        if exports.contains_key(name) {
            return Err(Error::busy(format!(
                "an export named {name:?} exists already: remove it first or choose another name"
            )));
        }
        if exports.len() >= limits::NBD_EXPORTS_MAX {
            return Err(Error::busy(format!(
                "{} exports are the most a server offers: remove one first",
                limits::NBD_EXPORTS_MAX
            )));
        }
        let export = Export {
            name: name.to_owned(),
            description: description.to_owned(),
            service,
            allowed,
            removed: AtomicBool::new(false),
            watchers: Mutex::default(),
        };
        exports.insert(name.to_owned(), Arc::new(export));
        Ok(())
    }

    /// Takes the export away: open connections answer further requests with "shutting down" and
    /// end. Whether there was one.
    pub fn remove(&self, name: &str) -> bool {
        let removed = self.exports.write().unwrap_or_else(PoisonError::into_inner).remove(name);
        if let Some(export) = &removed {
            export.remove();
        }
        removed.is_some()
    }

    /// All exports, by name.
    #[must_use]
    pub fn all(&self) -> Vec<Arc<Export>> {
        self.exports.read().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }

    /// What a client may see of it, who may have no name.
    pub(super) fn seen_by<'a>(&'a self, client: Option<&'a ClientIdentity>) -> Seen<'a> {
        Seen { table: self, client }
    }
}

/// A table as a client sees it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Seen<'a> {
    table: &'a ExportTable,
    client: Option<&'a ClientIdentity>,
}

impl Seen<'_> {
    /// The export of that name. The empty name leads to the only export, where there is just one.
    pub(super) fn find(&self, name: &str) -> Option<Arc<Export>> {
        if name.is_empty() {
            let mut all = self.all();
            let named = all.iter().position(|export| export.name().is_empty());
            let only = if all.len() == 1 { Some(0) } else { named };
            return only.map(|at| all.swap_remove(at));
        }
        let exports = self.table.exports.read().unwrap_or_else(PoisonError::into_inner);
        exports.get(name).filter(|export| export.is_for(self.client)).cloned()
    }

    /// All of them, by name.
    pub(super) fn all(&self) -> Vec<Arc<Export>> {
        let mut all = self.table.all();
        all.retain(|export| export.is_for(self.client));
        all
    }
}

fn check_words(what: &str, words: &str, bytes_max: usize) -> Result<()> {
    if words.len() > bytes_max {
        return Err(Error::usage(format!(
            "{what} of {} bytes: at most {bytes_max} are possible",
            words.len()
        )));
    }
    if words.contains('\0') {
        return Err(Error::usage(format!("{what} cannot hold a NUL character: {words:?}")));
    }
    Ok(())
}

fn check_service(name: &str, service: &dyn BlockService) -> Result<()> {
    let (size, sector) = (service.size(), service.sector_size());
    let possible = sector.is_power_of_two() && (512..=65_536).contains(&sector);
    if possible && size.is_multiple_of(u64::from(sector)) && size <= limits::VOLUME_BYTES_MAX {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::Usage,
        format!(
            "export {name:?}: {size} bytes in sectors of {sector}: expected a power of two from \
             512 to 65536 as sector size and a size that is a multiple of it"
        ),
    ))
}
