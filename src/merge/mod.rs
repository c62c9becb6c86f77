//! A bundle or an image laid under what is current: filter, pipeline, targets.

mod image;
mod pipeline;
mod seams;
mod target;

pub use crate::bundle::PieceSource as MergeSource;
pub use image::ImagePieces;
pub use pipeline::{MergeOptions, MergeProgress, MergeReport, OnMergeProgress, check_all, run};
pub use target::{Claim, MergeTarget, OfflineTarget, TargetIdentity};

#[cfg(test)]
mod tests;
