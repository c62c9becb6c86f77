//! Bundles and images laid under what is current: filter, pipeline, targets.
//!
//! | word | meaning |
//! |---|---|
//! | strand | a source on its way into a target |
//! | lane | strands that are merged one after the other, lanes side by side |
//! | stage | strands that may go side by side, the next one begins when they have ended |

mod admission;
mod filler;
mod forecast;
mod image;
mod lineage;
mod pipeline;
mod report;
mod seams;
mod target;
mod undo;

pub use crate::bundle::PieceSource as MergeSource;
pub use admission::check_all;
pub use forecast::forecast;
pub use image::ImagePieces;
pub use pipeline::{MergeOptions, OnMergeProgress, Strand, run, run_all};
pub use report::{MergeProgress, MergeReport, SourceReport};
pub use target::{Claim, MergeTarget, OfflineTarget, TargetIdentity};
pub use undo::Undo;

#[cfg(test)]
mod replica_tests;
#[cfg(test)]
mod side_tests;
#[cfg(test)]
mod tests;
