//! The target `link_backup` under libFuzzer.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| dualrestore_fuzz::link_backup(bytes));
