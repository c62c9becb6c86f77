//! The other side: an export of somebody's NBD server as a device that is read.
//!
//! | file | what |
//! |---|---|
//! | `handshake.rs` | greeting and options as a state machine: bytes in, bytes out |
//! | `reply.rs` | what has come of one request, checked piece by piece |
//! | `wire.rs` | bytes on a socket, with waits that end |
//! | `connection.rs` | many requests in flight on one wire |
//! | `device.rs` | the export as a device; holes are known from block status |

mod connection;
mod device;
mod handshake;
mod reply;
mod wire;

pub use device::NbdDevice;
pub use handshake::{Agreed, ClientHandshake};
pub use wire::{SocketWire, Wire};
