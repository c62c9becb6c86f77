//! Attempts to break the bulk channel: damaged, mixed-up and forged bundles, power lost at any
//! moment, full disks. What must hold each time is said in `workshop.rs`.
//!
//! `DUALRESTORE_THOROUGH=1` tries every possibility, which takes minutes.

mod chance;
mod flips;
mod forge;
mod forgeries;
mod memory;
mod merging;
mod mixing;
mod recovery;
mod recovery_sets;
mod seals;
mod workshop;
mod writing;
