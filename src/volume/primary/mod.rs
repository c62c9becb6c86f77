//! The primary: a pure state machine, and the driver that runs it.
//!
//! | file | what it holds |
//! |---|---|
//! | `event.rs` | what may happen, what is to be done about it |
//! | `state.rs` | the machine: dispatch, link, commits, poison, ticks |
//! | `requests.rs` | how requests begin; `reads.rs`, `writes.rs`, `flushes.rs`: the life of each |
//! | `fetch.rs` | missing blocks on their way here: demand, hydration, merge claims |
//! | `media.rs` | attached media, from which missing blocks are read ahead of the link |
//! | `media_readers.rs`, `attaching.rs` | the threads that read media; which are attached |
//! | `resync.rs` | unsent blocks on their way there; what the backup has acknowledged |
//! | `differences.rs` | which unsent blocks the backup really lacks |
//! | `claims.rs` | who may make which block current |
//! | `hot.rs` | hot extents of the write-intent log |
//! | `asking.rs` | questions to the backup: digests, what changed since a cut |
//! | `acquaintance.rs` | which backup it is mirrored to |
//! | `sampling.rs` | whether the device is the one that the map speaks of |
//! | `merging.rs` | the volume as the target of a merge |
//! | `driver.rs`, `volume.rs` | threads and completions; the files and the operator's word |
//! | `serving.rs`, `guests.rs` | what it offers to applications; how their requests reach it |
//! | `mirror.rs` | sequences and durable acknowledgements of one backup |

mod acquaintance;
mod asking;
mod attaching;
mod claims;
mod differences;
mod driver;
mod event;
mod fetch;
mod flushes;
mod guests;
mod hot;
mod media;
mod media_readers;
mod merging;
mod mirror;
mod reads;
mod requests;
mod resync;
mod sampling;
mod serving;
mod state;
mod volume;
mod writes;

pub use acquaintance::Introduction;
pub use attaching::AttachmentStatus;
pub use claims::ClaimId;
pub use driver::{Caller, Driver, Outbox};
pub use event::{Action, Event, FetchClass, LagBound, MirrorPolicy, Options, OutgoingMessage};
pub use media::{MediumCondition, MediumId, MediumStatus, Supply};
pub use merging::LiveTarget;
pub use mirror::Lag;
pub use state::{Counters, Primary, WatchId};
pub use volume::{Comparison, Lost, PrimaryStatus, PrimaryVolume};
