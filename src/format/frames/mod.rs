//! Frames of the link: what primary and backup say to each other, as values and as bytes.
//!
//! | file | holds |
//! |---|---|
//! | `header.rs` | the 32 bytes that begin every frame, and the table of frames |
//! | `handshake.rs` | Hello, Welcome, Refuse |
//! | `message.rs` | requests and answers of an open session |
//! | `packing.rs` | the bytes of blocks, compressed |
//! | `changes.rs` | which blocks changed since a cut |
//! | `frame.rs` | a whole frame to and from bytes |
//! | `text.rs` | names and words from outside |
//!
//! `docs/link-protocol.md` draws the same byte by byte.

mod changes;
mod frame;
mod handshake;
mod header;
mod message;
mod packing;
mod text;

pub use changes::{ChangedBlocks, ChangedForm, CutName};
pub use frame::{Frame, Goodbye, GoodbyeReason};
pub use handshake::{
    BootId, Class, FEATURE_CHANGES, FEATURE_PACKED, Hello, KNOWN_FEATURES, Refusal, RefusalCode,
    Role, VERSION, Welcome,
};
pub use header::{FrameKind, HEADER_BYTES, Header, Rule, Sender, Traffic};
pub use message::{Content, Failure, Message};
pub use packing::{PACKED_HEAD_BYTES, Unpacker, plain_length};
