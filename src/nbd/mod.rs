//! Volumes spoken to over NBD: exports by name, the session as a state machine, the threads that
//! run sessions on descriptors they are given.
//!
//! | file | what |
//! |---|---|
//! | `exports.rs` | names to volumes, changeable while connections are open |
//! | `session.rs` | one connection as bytes in, requests out, completions in, bytes out |
//! | `handshake.rs` | the options before transmission |
//! | `transmission.rs` | what a request must satisfy, what becomes of it |
//! | `replies.rs` | how an answer is laid out |
//! | `contexts.rs` | names of block status |
//! | `incoming.rs`, `outgoing.rs` | the bytes on their way |
//! | `tls.rs`, `identity.rs` | bytes in TLS; who a client is, and whom an export is for |
//! | `wire.rs` | a socket, in the clear or inside TLS |
//! | `mailbox.rs`, `connection.rs`, `server.rs` | threads and sockets |
//! | `vigil.rs` | when a thread looks around, and when it sleeps |
//! | `client/` | the other side: somebody's export as a device |

mod client;
mod connection;
mod contexts;
mod exports;
mod handshake;
mod identity;
mod incoming;
mod mailbox;
mod outgoing;
mod replies;
mod server;
mod session;
mod tls;
mod transmission;
mod vigil;
mod wire;

pub use client::{Agreed, ClientHandshake, NbdDevice, SocketWire, Wire};
pub use exports::{Export, ExportTable};
pub use identity::{Allowed, ClientIdentity};
pub use server::{ConnectionReport, Server, Totals};
pub use session::{Event, Session, Tls};
pub use tls::TlsAcceptor;
pub use transmission::{Statuses, Ticket};
