//! The target `nbd` under libFuzzer.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| dualrestore_fuzz::nbd(bytes));
