//! A bundle or an image laid under what is current: filter, pipeline, targets.

mod forecast;
mod image;
mod lineage;
mod pipeline;
mod seams;
mod target;
mod undo;

pub use crate::bundle::PieceSource as MergeSource;
pub use forecast::forecast;
pub use image::ImagePieces;
pub use pipeline::{MergeOptions, MergeProgress, MergeReport, OnMergeProgress, check_all, run};
pub use target::{Claim, MergeTarget, OfflineTarget, TargetIdentity};
pub use undo::Undo;

#[cfg(test)]
mod replica_tests;
#[cfg(test)]
mod tests;
