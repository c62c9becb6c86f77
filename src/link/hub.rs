//! All link connections of a process, by number, and the descriptor that says which need a look.
//!
//! Does not know: sockets, TLS, when to connect.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use uuid::Uuid;

use super::Connection;
use super::backup_side::{BackupSide, Reception};
use super::endpoint::{Endpoint, Side};
use super::primary_side::PrimarySide;
use super::wake::Wake;
use crate::clock::MonotonicClock;
use crate::error::Result;
use crate::format::frames::{BootId, Class};
use crate::volume::primary::PrimaryVolume;

/// See the module.
pub struct Hub {
    wake: Arc<Wake>,
    clock: MonotonicClock,
    boot_id: BootId,
    next: AtomicU64,
    reception: Arc<Reception>,
    primaries: Mutex<Vec<Arc<PrimarySide>>>,
}

impl Hub {
    pub fn new() -> Result<Self> {
        Self::with_clock(MonotonicClock::default())
    }

    /// Time-outs and heartbeats by this clock.
    pub fn with_clock(clock: MonotonicClock) -> Result<Self> {
        Ok(Self {
            wake: Arc::new(Wake::new()?),
            clock,
            boot_id: BootId(*Uuid::new_v4().as_bytes()),
            next: AtomicU64::new(1),
            reception: Arc::new(Reception::new()),
            primaries: Mutex::default(),
        })
    }

    #[must_use]
    pub fn wake(&self) -> &Wake {
        &self.wake
    }

    #[must_use]
    pub fn clock(&self) -> MonotonicClock {
        self.clock
    }

    #[must_use]
    pub fn boot_id(&self) -> BootId {
        self.boot_id
    }

    /// Lets accepted connections lead to this volume, by its name.
    pub fn serve(&self, side: Arc<BackupSide>) -> Result<()> {
        self.reception.serve(side)
    }

    pub fn withdraw(&self, name: &str) {
        if let Some(side) = self.reception.withdraw(name) {
            side.end();
        }
    }

    fn number(&self) -> u64 {
        self.next.fetch_add(1, Ordering::Relaxed)
    }

    /// The backup's end of a new connection.
    pub fn accept(&self) -> Arc<Endpoint> {
        let connection = Connection::server(self.clock.now());
        let side = Arc::clone(&self.reception) as Arc<dyn Side>;
        let label = "unknown".to_owned();
        Endpoint::new(
            self.number(),
            self.clock,
            Arc::clone(&self.wake),
            side,
            Some(connection),
            label,
        )
    }

    fn side_of(&self, volume: &Arc<PrimaryVolume>, remote_name: &str) -> Arc<PrimarySide> {
        let mut primaries = self.primaries.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(side) = primaries.iter().find(|side| Arc::ptr_eq(side.volume(), volume)) {
            return Arc::clone(side);
        }
        let side = PrimarySide::new(Arc::clone(volume), remote_name.to_owned(), self.boot_id);
        primaries.push(Arc::clone(&side));
        side
    }

    /// The side of a primary volume, once it has connected.
    #[must_use]
    pub fn primary(&self, volume: &Arc<PrimaryVolume>) -> Option<Arc<PrimarySide>> {
        let primaries = self.primaries.lock().unwrap_or_else(PoisonError::into_inner);
        primaries.iter().find(|side| Arc::ptr_eq(side.volume(), volume)).cloned()
    }

    /// The primary's end of a new connection. Those of class demand and bulk say hello once the
    /// mirror connection has a session.
    pub fn connect(
        &self,
        volume: &Arc<PrimaryVolume>,
        remote_name: &str,
        class: Class,
    ) -> Result<Arc<Endpoint>> {
        let side = self.side_of(volume, remote_name);
        let connection = match side.hello(class) {
            Some(hello) => Some(Connection::client(hello, self.clock.now())?),
            None => None,
        };
        let label = format!("{} {class:?}", volume.name()).to_lowercase();
        let endpoint = Endpoint::new(
            self.number(),
            self.clock,
            Arc::clone(&self.wake),
            Arc::clone(&side) as Arc<dyn Side>,
            connection,
            label,
        );
        side.add(class, &endpoint);
        Ok(endpoint)
    }

    /// Ends the link of a volume that closes.
    pub fn forget(&self, volume: &Arc<PrimaryVolume>) {
        if let Some(side) = self.primary(volume) {
            side.end("the primary is stopping");
        }
        let mut primaries = self.primaries.lock().unwrap_or_else(PoisonError::into_inner);
        primaries.retain(|side| !Arc::ptr_eq(side.volume(), volume));
    }
}
