//! The link between primary and backup as a state machine on bytes: no sockets, no clock.
//!
//! | file | holds |
//! |---|---|
//! | `connection.rs` | one byte stream: handshake, messages, heartbeat, end |
//! | `reader.rs` | frames out of a stream that arrives in pieces |
//! | `outgoing.rs` | frames queued, bounded, and formatted in batches |
//! | `rules.rs` | what a connection demands of its peer |
//! | `ledger.rs` | which requests await which answers, kept by both sides |
//! | `fence.rs` | which session a backup volume listens to |
//! | `backoff.rs` | how long to wait before connecting again |

mod backoff;
mod connection;
mod fence;
mod ledger;
mod outgoing;
mod reader;
mod rules;

pub use backoff::Backoff;
pub use connection::{Connection, Event};
pub use fence::{Acceptance, Decision, Fence, Identity};

use crate::device::Payload;
use crate::format::frames;

/// A frame whose blocks live in aligned, shared memory.
pub type Frame = frames::Frame<Payload>;
/// A message whose blocks live in aligned, shared memory.
pub type Message = frames::Message<Payload>;
