//! Tar archives as folders: written as one stream, walked as one, or opened where it can be sought.
//!
//! | file | holds |
//! |---|---|
//! | `writer.rs` | a folder for new files, of which an archive goes out |
//! | `walker.rs` | the members of an archive, one after the other |
//! | `index.rs` | an archive on a disk as a folder that can be read |

mod index;
mod walker;
mod writer;

pub use index::TarIndex;
pub use walker::{Step, TarMember, TarWalker};
pub use writer::TarFolder;
