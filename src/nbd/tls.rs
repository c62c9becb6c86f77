//! TLS of one connection as a state machine on bytes, and what a server needs to speak it.
//!
//! | bytes | come from | go to |
//! |---|---|---|
//! | records of the client | the socket, into `space` | decrypted, to whom `received` gives them |
//! | what the session sends | `encrypt` | records, from `outgoing` to the socket |
//!
//! Guarantees: TLS 1.3 only, and a certificate of the one authority from the client; nothing of
//! one connection is kept for the next. Memory is bounded by `NBD_INCOMING_BYTES` each way.
//! Does not know: sockets, NBD.

use std::io::IoSlice;
use std::sync::Arc;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{NoServerSessionStorage, UnbufferedServerConnection, WebPkiClientVerifier};
use rustls::unbuffered::{ConnectionState, EncodeError, UnbufferedStatus};
use rustls::{RootCertStore, ServerConfig};

use super::identity::ClientIdentity;
use crate::error::{Error, Result};
use crate::limits::NBD_INCOMING_BYTES;

/// Bytes of one record, and what a record is longer than what it holds (its header, its kind and
/// its tag).
const RECORD_BYTES: usize = 16 << 10;
const RECORD_OVERHEAD: usize = 5 + 1 + 16;

/// What every connection of a server begins TLS with.
#[derive(Debug)]
pub struct TlsAcceptor {
    config: Arc<ServerConfig>,
}

impl TlsAcceptor {
    /// From PEM: whom to trust, the own certificate with those that lead to it, and its key.
    pub fn new(authority: &[u8], chain: &[u8], key: &[u8]) -> Result<Self> {
        let mut roots = RootCertStore::empty();
        for certificate in certificates("the authority", authority)? {
            roots.add(certificate).map_err(|error| refused("the authority", &error))?;
        }
        let chain = certificates("the certificate", chain)?;
        let key = PrivateKeyDer::from_pem_slice(key).map_err(|error| refused("the key", &error))?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let verifier =
            WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
                .build()
                .map_err(|error| refused("the authority", &error))?;
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|error| refused("TLS 1.3", &error))?
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain, key)
            .map_err(|error| refused("the certificate and its key", &error))?;
        // Tickets would let a session outlive a change of certificates.
        config.send_tls13_tickets = 0;
        config.session_storage = Arc::new(NoServerSessionStorage {});
        Ok(Self { config: Arc::new(config) })
    }

    /// TLS of a new connection, before its first byte.
    pub(super) fn accept(&self) -> Result<TlsStream> {
        let connection = UnbufferedServerConnection::new(Arc::clone(&self.config))
            .map_err(|error| refused("TLS", &error))?;
        Ok(TlsStream {
            connection,
            incoming: vec![0; NBD_INCOMING_BYTES],
            filled: 0,
            plain: Vec::new(),
            taken: 0,
            outgoing: Vec::new(),
            sent: 0,
            established: false,
        })
    }
}

fn certificates(what: &str, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>> {
    let found: std::result::Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    let found = found.map_err(|error| refused(what, &error))?;
    if found.is_empty() {
        return Err(Error::usage(format!("{what}: expected a PEM certificate, found none")));
    }
    Ok(found)
}

fn refused(what: &str, error: &dyn std::fmt::Display) -> Error {
    Error::usage(format!("{what} cannot be used for TLS: {error}"))
}

/// The client broke TLS, or has no certificate that is good here. What is still `outgoing` tells
/// it why.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Broken;

/// See the module.
pub(super) struct TlsStream {
    connection: UnbufferedServerConnection,
    /// Records, the last perhaps in part.
    incoming: Vec<u8>,
    filled: usize,
    /// Decrypted and not taken.
    plain: Vec<u8>,
    taken: usize,
    /// Records that are not sent.
    outgoing: Vec<u8>,
    sent: usize,
    established: bool,
}

impl std::fmt::Debug for TlsStream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let established = self.established;
        f.debug_struct("TlsStream").field("established", &established).finish_non_exhaustive()
    }
}

impl TlsStream {
    /// Where the next bytes of the client go; empty while what came before is not taken.
    pub(super) fn space(&mut self) -> &mut [u8] {
        if self.taken < self.plain.len() { &mut [] } else { &mut self.incoming[self.filled..] }
    }

    /// `count` bytes were put into `space`. `give` is offered what they hold, and says how much
    /// it takes; `give_rest` offers the rest again.
    pub(super) fn received(
        &mut self,
        count: usize,
        give: impl FnMut(&[u8]) -> usize,
    ) -> std::result::Result<(), Broken> {
        self.filled += count;
        assert!(self.filled <= self.incoming.len(), "more was received than there was space");
        self.process(give)
    }

    fn process(&mut self, mut give: impl FnMut(&[u8]) -> usize) -> std::result::Result<(), Broken> {
        let mut start = 0;
        let mut outcome = Ok(());
        loop {
            let records = &mut self.incoming[start..self.filled];
            let UnbufferedStatus { mut discard, state, .. } =
                self.connection.process_tls_records(records);
            let more = match state {
                // Once more, for the alert that tells the client.
                Err(_) => outcome.replace_ok(),
                Ok(ConnectionState::ReadTraffic(mut traffic)) => {
                    while let Some(record) = traffic.next_record() {
                        let Ok(record) = record else {
                            outcome = Err(Broken);
                            break;
                        };
                        discard += record.discard;
                        let given = if self.plain.is_empty() { give(record.payload) } else { 0 };
                        self.plain.extend_from_slice(&record.payload[given..]);
                    }
                    outcome.is_ok()
                }
                Ok(ConnectionState::EncodeTlsData(mut data)) => {
                    push(&mut self.outgoing, RECORD_BYTES, |room| match data.encode(room) {
                        Ok(count) => Ok(count),
                        Err(EncodeError::InsufficientSize(needed)) => Err(needed.required_size),
                        Err(EncodeError::AlreadyEncoded) => Ok(0),
                    });
                    true
                }
                Ok(ConnectionState::TransmitTlsData(data)) => {
                    // It is on its way in order, before anything that comes later.
                    data.done();
                    true
                }
                Ok(ConnectionState::WriteTraffic(_)) => {
                    self.established = true;
                    false
                }
                Ok(ConnectionState::PeerClosed) => true,
                Ok(_) => false,
            };
            start += discard;
            if !more {
                break;
            }
        }
        self.incoming.copy_within(start..self.filled, 0);
        self.filled -= start;
        if self.filled == self.incoming.len() {
            return Err(Broken);
        }
        outcome
    }

    /// Offers what is decrypted; whether anything was taken.
    pub(super) fn give_rest(&mut self, mut give: impl FnMut(&[u8]) -> usize) -> bool {
        if self.taken == self.plain.len() {
            return false;
        }
        let given = give(&self.plain[self.taken..]);
        self.taken += given;
        if self.taken == self.plain.len() {
            self.plain.clear();
            self.taken = 0;
        }
        given > 0
    }

    /// Whether both sides have finished the handshake.
    pub(super) fn is_established(&self) -> bool {
        self.established
    }

    /// Who the client is, once the handshake is done.
    pub(super) fn client(&self) -> Option<ClientIdentity> {
        let certificates = self.connection.peer_certificates()?;
        certificates.first().map(|certificate| ClientIdentity::of(certificate))
    }

    /// Encrypts as much of the slices as may wait to be sent; returns how much that was.
    pub(super) fn encrypt(&mut self, slices: &[IoSlice<'_>]) -> usize {
        let mut done = 0;
        for slice in slices {
            let room = NBD_INCOMING_BYTES.saturating_sub(self.pending());
            let bytes = &slice[..slice.len().min(room)];
            if bytes.is_empty() {
                break;
            }
            let records = &mut self.incoming[..self.filled];
            let status = self.connection.process_tls_records(records);
            let Ok(ConnectionState::WriteTraffic(mut traffic)) = status.state else { break };
            let sealed = bytes.len() + bytes.len().div_ceil(RECORD_BYTES) * RECORD_OVERHEAD;
            push(&mut self.outgoing, sealed, |room| match traffic.encrypt(bytes, room) {
                Ok(count) => Ok(count),
                Err(rustls::unbuffered::EncryptError::InsufficientSize(needed)) => {
                    Err(needed.required_size)
                }
                Err(error) => unreachable!("{error}: keys last for more than anybody sends"),
            });
            done += bytes.len();
            if bytes.len() < slice.len() {
                break;
            }
        }
        done
    }

    /// Bytes that wait to be sent.
    pub(super) fn pending(&self) -> usize {
        self.outgoing.len() - self.sent
    }

    pub(super) fn outgoing(&self) -> &[u8] {
        &self.outgoing[self.sent..]
    }

    /// The first `count` bytes of `outgoing` are sent.
    pub(super) fn sent(&mut self, count: usize) {
        assert!(count <= self.pending(), "{count} bytes sent of {}", self.pending());
        self.sent += count;
        if self.sent == self.outgoing.len() {
            self.outgoing.clear();
            self.sent = 0;
        }
    }
}

/// Appends what `fill` writes; it is called again with the room that it says it needs.
fn push(
    outgoing: &mut Vec<u8>,
    room: usize,
    mut fill: impl FnMut(&mut [u8]) -> std::result::Result<usize, usize>,
) {
    let end = outgoing.len();
    let mut room = room;
    loop {
        outgoing.resize(end + room, 0);
        match fill(&mut outgoing[end..]) {
            Ok(count) => return outgoing.truncate(end + count),
            Err(needed) => {
                assert!(needed > room, "more room was asked for than there is");
                room = needed;
            }
        }
    }
}

/// Turns into an error, and says whether it was none before.
trait Breaks {
    fn replace_ok(&mut self) -> bool;
}

impl Breaks for std::result::Result<(), Broken> {
    fn replace_ok(&mut self) -> bool {
        std::mem::replace(self, Err(Broken)).is_ok()
    }
}
