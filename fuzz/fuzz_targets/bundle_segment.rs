//! The target `bundle_segment` under libFuzzer.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| dualrestore_fuzz::bundle_segment(bytes));
