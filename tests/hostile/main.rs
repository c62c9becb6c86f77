//! Attempts to break the bulk channel: damaged, mixed-up and forged bundles, power lost at any
//! moment, full disks. What must hold each time is said in `workshop.rs`.

mod flips;
mod forge;
mod forgeries;
mod mixing;
mod workshop;
