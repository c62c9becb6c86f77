//! Bytes to values and back, pure: every format the project writes or speaks. No I/O.

pub mod bundle;
pub mod frames;
pub mod journal;
pub mod map;
pub mod nbd;
pub mod partition;
pub mod qcow2;
pub mod tar;
