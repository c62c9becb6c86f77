//! The target `bundle_manifest` under libFuzzer.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| dualrestore_fuzz::bundle_manifest(bytes));
