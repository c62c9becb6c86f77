//! The golden files: every format is still written and read as its frozen file has it.
//!
//! A file that is missing fails its test. `DUALRESTORE_GOLDEN=write` writes the files anew; that is
//! for a new version of a format, never for one that was released (CONTRIBUTING.md).

#![expect(clippy::disallowed_methods, reason = "golden files are read, and written on request")]

mod bundle;
mod catalogue;
mod exported_cut;
mod intent;
mod journal;
mod map;

use std::path::{Path, PathBuf};

fn path_of(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

/// The contents of a golden file, which must be what is `written` today.
fn golden(name: &str, written: &[u8]) -> Vec<u8> {
    let path = path_of(name);
    if std::env::var_os("DUALRESTORE_GOLDEN").is_some_and(|word| word == "write") {
        std::fs::create_dir_all(path.parent().expect("it is in a directory")).expect("made");
        std::fs::write(&path, written).expect("written");
    }
    let held = std::fs::read(&path).unwrap_or_else(|error| {
        panic!("{}: {error}; a golden file is never made by a test unasked", path.display())
    });
    let first = held.iter().zip(written).position(|(held, written)| held != written);
    assert!(
        held == written,
        "{name} is written differently: first at byte {:?} of {} and {}",
        first,
        held.len(),
        written.len()
    );
    held
}
