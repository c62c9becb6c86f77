//! The connections of a server: one thread each, counted, and ended together.
//!
//! Guarantees: never more than `NBD_CONNECTIONS_MAX` threads; `shutdown` returns within
//! `NBD_SHUTDOWN_MS`, whatever the clients do.
//! Does not know: how a descriptor came to be (it is given connected sockets), the protocol.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::net::{AddressFamily, sockopt};

use super::connection::{Connection, Counters};
use super::exports::ExportTable;
use super::mailbox::Mailbox;
use super::session::{Session, Tls};
use super::tls::TlsAcceptor;
use super::wire::Wire;
use crate::error::{Error, ErrorKind, Result};
use crate::limits;

/// What one connection has done so far.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConnectionReport {
    pub connection: u64,
    pub bytes_received: u64,
    pub bytes_sent: u64,
    pub requests: u64,
    /// Requests that the volume is working on.
    pub in_flight: u64,
}

/// What all connections of a server have done, ended ones among them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    pub connections: u64,
    pub bytes_received: u64,
    pub bytes_sent: u64,
    pub requests: u64,
}

/// See the module. Dropping it shuts it down.
#[derive(Debug)]
pub struct Server {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    exports: Arc<ExportTable>,
    stopping: Arc<AtomicBool>,
    next: AtomicU64,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    running: BTreeMap<u64, Running>,
    ended: Totals,
}

#[derive(Debug)]
struct Running {
    mailbox: Arc<Mailbox>,
    counters: Arc<Counters>,
}

impl Server {
    /// A server without connections.
    #[must_use]
    pub fn new(exports: Arc<ExportTable>) -> Self {
        let shared = Shared {
            exports,
            stopping: Arc::default(),
            next: AtomicU64::new(1),
            state: Mutex::default(),
            changed: Condvar::new(),
        };
        Self { shared: Arc::new(shared) }
    }

    #[must_use]
    pub fn exports(&self) -> &Arc<ExportTable> {
        &self.shared.exports
    }

    /// Serves a connected stream socket on a thread of its own; returns the connection's number.
    ///
    /// `Busy` when there are too many connections or the server is shut down: the socket is
    /// closed. With an acceptor nothing but TLS is spoken.
    pub fn serve(&self, socket: OwnedFd, acceptor: Option<Arc<TlsAcceptor>>) -> Result<u64> {
        tune(&socket)?;
        let mailbox = Mailbox::new()?;
        let bell = mailbox.shared_bell()?;
        let counters = Arc::new(Counters::default());
        let connection = self.shared.next.fetch_add(1, Ordering::Relaxed);
        self.shared.admit(connection, &mailbox, &counters)?;
        let shared = Arc::clone(&self.shared);
        let tls = if acceptor.is_some() { Tls::Required } else { Tls::Off };
        let session = Session::new(Arc::clone(&self.shared.exports), tls);
        let stopping = Arc::clone(&self.shared.stopping);
        let started = std::thread::Builder::new()
            .name(format!("nbd-{connection}"))
            .stack_size(512 << 10)
            .spawn(move || {
                let _departure = Departure { shared, connection };
                let wire = Wire::new(socket, acceptor);
                Connection::new(wire, session, mailbox, counters, stopping, bell).run();
            });
        if let Err(error) = started {
            self.shared.depart(connection);
            return Err(Error::device("start a thread", &error));
        }
        Ok(connection)
    }

    /// The connections that are open, by number.
    #[must_use]
    pub fn connections(&self) -> Vec<ConnectionReport> {
        let state = self.shared.lock();
        state.running.iter().map(|(&connection, running)| running.report(connection)).collect()
    }

    #[must_use]
    pub fn totals(&self) -> Totals {
        let state = self.shared.lock();
        let mut totals = state.ended;
        state.running.values().for_each(|running| totals.add(&running.report(0)));
        totals
    }

    /// Refuses new connections and requests, lets requests in flight finish for a while, and ends
    /// all threads.
    ///
    /// `Timeout` when a thread is still inside the volume after `NBD_SHUTDOWN_MS`; it ends when
    /// the volume lets go of it.
    pub fn shutdown(&self) -> Result<()> {
        let state = self.shared.lock();
        self.shared.stopping.store(true, Ordering::Release);
        state.running.values().for_each(|running| running.mailbox.wake());
        let limit = Duration::from_millis(limits::NBD_SHUTDOWN_MS);
        let open = |state: &mut State| !state.running.is_empty();
        let waited = self.shared.changed.wait_timeout_while(state, limit, open);
        let late = waited.unwrap_or_else(PoisonError::into_inner).0.running.len();
        if late > 0 {
            let seconds = limits::NBD_SHUTDOWN_MS / 1000;
            return Err(Error::new(
                ErrorKind::Timeout,
                format!("{late} NBD connections still wait for their volume after {seconds} s"),
            ));
        }
        Ok(())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // A thread that its volume holds on to ends by itself later; it owns all it needs.
        let _late = self.shutdown();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn admit(
        &self,
        connection: u64,
        mailbox: &Arc<Mailbox>,
        counters: &Arc<Counters>,
    ) -> Result<()> {
        let mut state = self.lock();
        if self.stopping.load(Ordering::Acquire) {
            return Err(Error::busy("the NBD server is being shut down: no new connections"));
        }
        if state.running.len() >= limits::NBD_CONNECTIONS_MAX {
            return Err(Error::busy(format!(
                "{} NBD connections are open, the most possible: close one first",
                limits::NBD_CONNECTIONS_MAX
            )));
        }
        let running = Running { mailbox: Arc::clone(mailbox), counters: Arc::clone(counters) };
        state.running.insert(connection, running);
        state.ended.connections += 1;
        Ok(())
    }

    fn depart(&self, connection: u64) {
        let mut state = self.lock();
        if let Some(running) = state.running.remove(&connection) {
            state.ended.add(&running.report(connection));
        }
        drop(state);
        self.changed.notify_all();
    }
}

impl Running {
    fn report(&self, connection: u64) -> ConnectionReport {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        ConnectionReport {
            connection,
            bytes_received: read(&self.counters.bytes_received),
            bytes_sent: read(&self.counters.bytes_sent),
            requests: read(&self.counters.requests),
            in_flight: read(&self.counters.in_flight),
        }
    }
}

impl Totals {
    fn add(&mut self, report: &ConnectionReport) {
        self.bytes_received += report.bytes_received;
        self.bytes_sent += report.bytes_sent;
        self.requests += report.requests;
    }
}

/// Takes the connection off the list however its thread ends.
struct Departure {
    shared: Arc<Shared>,
    connection: u64,
}

impl Drop for Departure {
    fn drop(&mut self) {
        self.shared.depart(self.connection);
    }
}

/// A reply must not wait for the next, and a client that is gone must be noticed.
fn tune(socket: &OwnedFd) -> Result<()> {
    let refused = |errno: rustix::io::Errno| Error::device("set up an NBD socket", &errno.into());
    let domain = sockopt::socket_domain(socket).map_err(refused)?;
    if domain == AddressFamily::INET || domain == AddressFamily::INET6 {
        sockopt::set_tcp_nodelay(socket, true).map_err(refused)?;
        sockopt::set_socket_keepalive(socket, true).map_err(refused)?;
    }
    Ok(())
}
