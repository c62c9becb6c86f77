//! Copy-before-write on the backup: the cuts of a volume, what is preserved for each, and views of
//! those instants (seed, paragraphs 50 to 59).
//!
//! | word | file |
//! |---|---|
//! | what is recorded of every cut, in one record replaced whole | `catalogue.rs` |
//! | one snapshot: preservation store and snapshot map | `member.rs` |
//! | all snapshots of a volume, oldest to newest, and the backup map | `chain.rs` |
//! | bytes from one device to another, many pieces at a time | `copying.rs` |
//! | which blocks changed between cuts | `changes.rs` |
//! | old bytes and marks made durable by one write and one flush | `journal.rs` |
//! | what the journal says after a crash | `replaying.rs` |
//! | old bytes kept before they are overwritten | `preserving.rs` |
//! | snapshots removed, in any order | `removing.rs` |
//! | preserved ranges given back once a bundle holds them | `releasing.rs` |
//! | what changed between two cuts | `since.rs` |
//! | a cut as it was, read while writes go on | `view.rs` |

mod catalogue;
mod chain;
mod changes;
mod copying;
mod journal;
mod member;
mod preserving;
mod releasing;
mod removing;
mod replaying;
mod selection;
mod since;
mod view;

pub use catalogue::{Catalogue, CutRecord};
pub use chain::{CutOrder, SnapshotChain, SnapshotStatus};
pub use member::Condition;
pub use selection::Selection;
pub use view::{ImageExtent, SnapshotView};
