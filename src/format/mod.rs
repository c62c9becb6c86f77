//! Bytes to values and back, pure: every format the project writes or speaks. No I/O.

pub mod map;
