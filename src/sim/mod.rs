//! The whole system in one thread, from one seed: primary, backup, the bytes of the link between
//! them, bundles, the clock, and whatever can go wrong with any of them.
//!
//! | word | meaning |
//! |---|---|
//! | life | one run: a setting, some hundred steps, an end in which both sides must be the same |
//! | setting | what a life begins with, and its mixture of what may happen (each has its own) |
//! | node | one machine: its power, its disks, and the process on it while it runs |
//! | works | jobs and bytes on their way: whatever may happen next without anybody doing anything |
//! | wire | one connection of the link, as two queues of bytes |
//! | oracle | what a volume may answer, by the laws alone |
//! | rare state | a situation that must come up over many lives, or the lives prove little |
//! | campaign | many lives, counted; of one that fails, the shortest beginning that fails as well |
//!
//! What runs is what ships: volumes with their drivers, maps, snapshots, bundles, both sides of the
//! link. Simulated are the disks, the wires, the scheduling of jobs, and the clock.

mod accidents;
mod backup_node;
mod campaign;
mod chance;
mod disk;
mod life;
mod life_end;
mod merging;
mod oracle;
mod primary_node;
mod rare;
mod requests;
mod setting;
mod shelf;
mod snapshots;
pub mod stamp;
mod steps;
mod trace;
mod wire;
mod works;
mod world;

pub use campaign::{Campaign, Failure, OnProgress, Report, replay, run, tell};
pub use chance::Chance;
pub use oracle::{Oracle, Value};
pub use rare::{Counts, RareState};
