//! Changes bundles and makes all checksums right again, as somebody who means harm would.
//!
//! Guarantees: what is resealed passes every check that needs no judgement, so that the parsers
//! behind the checksums are reached.

use dualrestore::device::RamFolder;
use dualrestore::format::bundle::PAGE_BYTES;
use serde_json::Value;

use crate::workshop::{Made, copy_of};

const CHECK_AT_END: usize = PAGE_BYTES - 36;
const CHECK_AT: usize = 28;

/// The text of a manifest up to and without its check, with the check that belongs to it.
pub fn sealed_text(text: &[u8]) -> Vec<u8> {
    let check = format!("{:08x}-{}", crc32c::crc32c(text), blake3::hash(text).to_hex());
    [text, b",\n  \"check\": \"", check.as_bytes(), b"\"\n}\n"].concat()
}

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

fn seal(page: &mut [u8], at: usize, context: &[u8]) -> [u8; 32] {
    let body = [&page[..at], &page[at + 36..]].concat();
    let hash = *blake3::hash(&[context, &body].concat()).as_bytes();
    page[at..at + 4].copy_from_slice(&crc32c::crc32c(&body).to_le_bytes());
    page[at + 4..at + 36].copy_from_slice(&hash);
    hash
}

fn number_at(page: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(page[at..at + 8].try_into().expect("eight bytes"))
}

/// Makes the checks of a segment right: header, descriptor pages, index, trailer. Its header's hash
/// and its root.
pub fn reseal_segment(bytes: &mut [u8]) -> ([u8; 32], [u8; 32]) {
    let context = seal(&mut bytes[..PAGE_BYTES], CHECK_AT_END, &[]);
    let last = bytes.len() - PAGE_BYTES;
    let mut root = blake3::Hasher::new();
    for at in (PAGE_BYTES..last).step_by(PAGE_BYTES) {
        if &bytes[at..at + 4] == b"DRBT" {
            root.update(&seal(&mut bytes[at..at + PAGE_BYTES], CHECK_AT, &context));
        }
    }
    let root = *root.finalize().as_bytes();
    let index_at = usize::try_from(number_at(&bytes[last..], 16)).unwrap_or(last).min(last);
    let (index, trailer) = bytes[index_at..].split_at_mut(last - index_at);
    trailer[64..68].copy_from_slice(&crc32c::crc32c(index).to_le_bytes());
    trailer[72..104].copy_from_slice(blake3::hash(index).as_bytes());
    trailer[104..136].copy_from_slice(&root);
    seal(trailer, CHECK_AT_END, &context);
    (context, root)
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
