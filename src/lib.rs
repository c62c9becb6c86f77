//! dualrestore: the core of dual-channel restoration.
//!
//! The rooms below stand in a total order; each imports only those named before it
//! (`tests/tidy.rs` checks this). The core builds and tests with no Python present: the feature
//! `python` adds the one room that knows it.

pub mod limits;

pub mod extent;
pub mod units;

pub mod error;

pub mod clock;

pub mod bitmap;

pub mod format;

pub mod device;

pub mod map;

pub mod snapshot;

pub mod bundle;

pub mod merge;

pub mod volume;

pub mod link;

pub mod nbd;

pub mod sim;

#[cfg(feature = "python")]
mod python;
