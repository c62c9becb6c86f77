//! Changes bundles and makes all checksums right again, as somebody who means harm would.
//!
//! Guarantees: what is resealed passes every check that needs no judgement, so that the parsers
//! behind the checksums are reached.

use dualrestore::device::RamFolder;
use serde_json::Value;

use crate::seals::{reseal_segment, sealed_text};
use crate::workshop::{Made, copy_of};

/// A manifest as it would be written.
pub fn sealed_json(value: &Value) -> Vec<u8> {
    let text = serde_json::to_string_pretty(value).expect("a value is JSON");
    sealed_text(text.strip_suffix("\n}").expect("an object").as_bytes())
}

/// The manifest of a bundle, without its check.
pub fn manifest_of(folder: &RamFolder, name: &str) -> Value {
    let bytes = folder.contents(name).expect("there");
    let mut value: Value = serde_json::from_slice(&bytes).expect("JSON");
    value.as_object_mut().expect("an object").remove("check");
    value
}

/// A copy with changes, all of its checks right.
pub fn forged(
    made: &Made,
    change_segment: impl FnOnce(&mut Vec<u8>),
    change_manifest: impl FnOnce(&mut Value),
) -> Made {
    let folder = copy_of(&made.folder);
    let mut manifest = manifest_of(&folder, "manifest.json");
    let name = "seg-00000000.drs";
    let mut bytes = folder.contents(name).expect("there");
    change_segment(&mut bytes);
    let (header_hash, root) = reseal_segment(&mut bytes);
    let entry = &mut manifest["segments"][0];
    entry["header_hash"] = blake3::Hash::from_bytes(header_hash).to_hex().to_string().into();
    entry["root"] = blake3::Hash::from_bytes(root).to_hex().to_string().into();
    entry["bytes"] = bytes.len().into();
    folder.replace(name, bytes);
    change_manifest(&mut manifest);
    reseal_root(&mut manifest);
    folder.replace("manifest.json", sealed_json(&manifest));
    Made { folder, ..made.clone() }
}

/// Makes the root of the roots right.
fn reseal_root(manifest: &mut Value) {
    let mut hasher = blake3::Hasher::new();
    for segment in manifest["segments"].as_array().into_iter().flatten() {
        let root = segment["root"].as_str().and_then(|text| blake3::Hash::from_hex(text).ok());
        hasher.update(root.map_or([0; 32], |root| *root.as_bytes()).as_slice());
    }
    manifest["root"] = hasher.finalize().to_hex().to_string().into();
}
