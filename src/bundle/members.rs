//! The names in a bundle's directory, and the two files that every bundle carries alike.

/// What this is and how to restore it without this software.
pub const README: &[u8] = include_bytes!("README.txt");
pub const README_NAME: &str = "README.txt";
/// Restores a raw image with Python alone.
pub const RECOVER: &[u8] = include_bytes!("recover.py");
pub const RECOVER_NAME: &str = "recover.py";
/// The key of an encrypted bundle, wrapped by age.
pub const KEY_NAME: &str = "key.age";
pub const BEGIN_NAME: &str = "manifest.begin.json";
/// Its presence says that the bundle is finished.
pub const MANIFEST_NAME: &str = "manifest.json";
/// The manifest until it is durable.
pub const UNFINISHED_NAME: &str = "manifest.json.new";
/// What the medium holds, for people.
pub const REPORT_NAME: &str = "report.json";

/// The number of a segment, if the file is named as one.
pub fn segment_number(name: &str) -> Option<u32> {
    let digits = name.strip_prefix("seg-")?.strip_suffix(".drs")?;
    let plain = digits.len() == 8 && digits.bytes().all(|digit| digit.is_ascii_digit());
    if plain { digits.parse().ok() } else { None }
}

/// Whether a reader needs the file.
pub fn is_needed(name: &str) -> bool {
    [BEGIN_NAME, KEY_NAME, MANIFEST_NAME].contains(&name) || segment_number(name).is_some()
}
