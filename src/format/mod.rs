//! format

pub mod nbd;
