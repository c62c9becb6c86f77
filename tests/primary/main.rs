//! The primary's state machine against adversaries: power loss, a cut link, any order of events.

mod backup;
mod chance;
mod disk;
mod oracle;
mod random;
mod schedule;
mod stamp;
mod world;
