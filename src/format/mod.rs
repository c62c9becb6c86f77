//! format

pub mod bundle;
