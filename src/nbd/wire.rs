//! The socket of one connection, in the clear or with TLS between it and the session.
//!
//! Guarantees: nothing blocks; what the session sent leaves whole and in order before it is said
//! that nothing is left.
//! Does not know: what the bytes mean.

use std::io::IoSlice;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::io::Errno;
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendFlags};

use super::session::Session;
use super::tls::{TlsAcceptor, TlsStream};

/// Pieces of one vectored send.
const SLICES_MAX: usize = 64;

/// What came of a look at the socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Moved {
    Nothing,
    /// So many bytes on the socket; zero if they were there before.
    Bytes(usize),
    /// The client sends nothing more.
    Ended,
    /// The socket takes and gives nothing more.
    Lost,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Wire {
    socket: OwnedFd,
    acceptor: Option<Arc<TlsAcceptor>>,
    tls: Option<TlsStream>,
    /// TLS was broken: what is left to send is said, nothing is taken any more.
    broken: bool,
}

impl Wire {
    /// In the clear; with an acceptor until TLS begins.
    pub(super) fn new(socket: OwnedFd, acceptor: Option<Arc<TlsAcceptor>>) -> Self {
        Self { socket, acceptor, tls: None, broken: false }
    }

    /// From here on the client speaks TLS. `false` if that cannot be.
    pub(super) fn begin_tls(&mut self) -> bool {
        self.tls = self.acceptor.as_ref().and_then(|acceptor| acceptor.accept().ok());
        self.tls.is_some()
    }

    /// Receives what is there, once, for the session.
    pub(super) fn receive(&mut self, session: &mut Session) -> Moved {
        let Some(tls) = &mut self.tls else {
            let space = session.space();
            if space.is_empty() {
                return Moved::Nothing;
            }
            return match receive(&self.socket, space) {
                Moved::Bytes(count) => {
                    session.received(count);
                    Moved::Bytes(count)
                }
                other => other,
            };
        };
        if tls.give_rest(|bytes| deliver(session, bytes)) {
            return Moved::Bytes(0);
        }
        let space = tls.space();
        if self.broken || space.is_empty() {
            return Moved::Nothing;
        }
        match receive(&self.socket, space) {
            Moved::Bytes(count) => {
                let was_established = tls.is_established();
                let understood = tls.received(count, |bytes| {
                    // Nothing is served before the client has shown who it is.
                    if was_established { deliver(session, bytes) } else { 0 }
                });
                if understood.is_err() {
                    self.broken = true;
                    return Moved::Ended;
                }
                if !was_established && tls.is_established() {
                    session.tls_established(tls.client());
                }
                Moved::Bytes(count)
            }
            other => other,
        }
    }

    /// Sends what is ready, as far as the socket takes it.
    pub(super) fn send(&mut self, session: &mut Session) -> Moved {
        let mut all = 0;
        while self.pending(session) > 0 {
            let count = match &mut self.tls {
                None => {
                    let slices = session.outgoing(SLICES_MAX);
                    send(&self.socket, &slices).inspect(|count| session.sent(*count))
                }
                Some(tls) => {
                    let sealed = tls.encrypt(&session.outgoing(SLICES_MAX));
                    session.sent(sealed);
                    if tls.pending() == 0 {
                        break;
                    }
                    let slices = [IoSlice::new(tls.outgoing())];
                    send(&self.socket, &slices).inspect(|count| tls.sent(*count))
                }
            };
            match count {
                Ok(count) => all += count,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                Err(_gone) => return Moved::Lost,
            }
        }
        if all > 0 { Moved::Bytes(all) } else { Moved::Nothing }
    }

    /// Whether bytes of the client are wanted.
    pub(super) fn wants_input(&mut self, session: &mut Session) -> bool {
        match &mut self.tls {
            None => !session.space().is_empty(),
            Some(tls) => !self.broken && !tls.space().is_empty(),
        }
    }

    /// Bytes that wait to be sent, encrypted or not.
    pub(super) fn pending(&self, session: &Session) -> usize {
        session.pending() + self.tls.as_ref().map_or(0, TlsStream::pending)
    }
}

impl AsFd for Wire {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Gives the session what it takes of the bytes; returns how much that was.
fn deliver(session: &mut Session, bytes: &[u8]) -> usize {
    let mut given = 0;
    while given < bytes.len() {
        let space = session.space();
        let count = space.len().min(bytes.len() - given);
        if count == 0 {
            break;
        }
        space[..count].copy_from_slice(&bytes[given..given + count]);
        session.received(count);
        given += count;
    }
    given
}

fn receive(socket: &OwnedFd, space: &mut [u8]) -> Moved {
    match rustix::net::recv(socket, space, RecvFlags::DONTWAIT) {
        Ok((0, _)) => Moved::Ended,
        Ok((count, _)) => Moved::Bytes(count),
        Err(Errno::AGAIN | Errno::INTR) => Moved::Nothing,
        Err(_gone) => Moved::Lost,
    }
}

fn send(socket: &OwnedFd, slices: &[IoSlice<'_>]) -> Result<usize, Errno> {
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    rustix::net::sendmsg(socket, slices, &mut SendAncillaryBuffer::default(), flags)
}
