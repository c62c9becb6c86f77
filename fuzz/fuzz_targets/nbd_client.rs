//! The target `nbd_client` under libFuzzer.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| dualrestore_fuzz::nbd_client(bytes));
