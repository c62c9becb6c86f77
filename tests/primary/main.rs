//! The primary's state machine against adversaries: power loss, a cut link, any order of events.

mod backup;
mod chance;
mod disk;
mod figures;
mod oracle;
mod random;
mod schedule;
mod sessions;
mod stage;
mod stamp;
mod traps;
mod world;
