//! The primary's state machine against adversaries: power loss, a cut link, any order of events.

mod backup;
mod comparing;
mod differences;
mod disk;
mod figures;
mod lag;
mod media;
mod medium;
mod random;
mod schedule;
mod sessions;
mod stage;
mod traps;
mod world;
