//! The link between primary and backup: a state machine on bytes, and its two sides. No sockets.
//!
//! | file | holds |
//! |---|---|
//! | `connection.rs` | one byte stream: handshake, messages, heartbeat, end |
//! | `reader.rs` | frames out of a stream that arrives in pieces |
//! | `outgoing.rs` | frames queued, bounded, and formatted in batches |
//! | `packing.rs` | when the bytes of blocks travel compressed |
//! | `rules.rs` | what a connection demands of its peer |
//! | `ledger.rs` | which requests await which answers, kept by both sides |
//! | `fence.rs` | which session a backup volume listens to |
//! | `backoff.rs` | how long to wait before connecting again |
//! | `hub.rs`, `endpoint.rs`, `wake.rs` | all connections of a process, for the transport |
//! | `primary_side.rs`, `backup_side.rs` | what a volume of each role does with its connections |

mod backoff;
mod backup_side;
mod connection;
mod endpoint;
mod fence;
mod hub;
mod ledger;
mod outgoing;
mod packing;
mod primary_side;
mod reader;
mod rules;
mod wake;

pub use backoff::Backoff;
pub use backup_side::{BackupCounters, BackupSide};
pub use connection::{Connection, Event};
pub use endpoint::{Endpoint, Side};
pub use fence::{Acceptance, Decision, Fence, Identity};
pub use hub::Hub;
pub use primary_side::PrimarySide;
pub use wake::Wake;

use crate::device::Payload;
use crate::format::frames;

/// A frame whose blocks live in aligned, shared memory.
pub type Frame = frames::Frame<Payload>;
/// A message whose blocks live in aligned, shared memory.
pub type Message = frames::Message<Payload>;
