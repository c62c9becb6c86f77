//! The primary's state machine against adversaries: power loss, a cut link, any order of events.

mod backup;
mod comparing;
mod disk;
mod figures;
mod media;
mod medium;
mod random;
mod schedule;
mod sessions;
mod stage;
mod traps;
mod world;
