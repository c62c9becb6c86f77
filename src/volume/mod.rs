//! Live requests ordered against the rest: the state machines of both roles and their drivers.

pub mod backup;
pub mod content;
pub mod engine;
pub mod opening;
pub mod primary;
pub mod service;
pub mod snapshot_service;
