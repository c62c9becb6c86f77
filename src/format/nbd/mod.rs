//! The NBD protocol as bytes: constants, what a client sends, what a server answers.
//!
//! Guarantees: every length inside a message is checked against the message; nothing is allocated
//! for what a client merely announces. All numbers are big-endian, as the protocol has them.
//! Does not know: the order of messages (`crate::nbd` does), sockets, volumes.

pub mod client;
mod constants;
mod exported_cut;
mod handshake;
mod transmission;

pub use constants::*;
pub use exported_cut::{ExportedCut, Included};
pub use handshake::{
    ExportQuery, MetaQuery, OptionHeader, decode_string, export_name_reply, greeting, option_reply,
};
pub use transmission::{
    Request, StatusFilter, Style, chunk_header, extended_chunk_header, simple_reply,
};
