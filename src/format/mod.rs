//! format

pub mod frames;
