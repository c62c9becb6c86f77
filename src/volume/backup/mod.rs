//! The backup of a volume: mirrored operations applied in order, old bytes preserved before.

#[cfg(test)]
mod bundle_tests;
#[cfg(test)]
mod crash_tests;
mod driver;
#[cfg(test)]
mod fault_tests;
#[cfg(test)]
mod figure_tests;
mod operation;
mod state;

pub use driver::{BackupIdentity, BackupVolume};
pub use operation::{Answer, MirrorOperation};
pub use state::{Action, BackupState};
