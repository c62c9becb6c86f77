//! Hostile bundles in a process that has little memory: what they ask for is refused, not given.

#![expect(clippy::disallowed_methods, reason = "a test runs itself again, in little memory")]

use std::process::Command;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde_json::Value;

use dualrestore::bundle::PieceSource;
use dualrestore::device::RamFolder;
use dualrestore::error::ErrorKind;
use dualrestore::extent::ByteRange;
use dualrestore::format::bundle::{
    Checks, ChunkKind, DESCRIPTORS_PER_PAGE, Descriptor, PAGE_BYTES, encode_batch,
};

use crate::forge::{forged, manifest_of};
use crate::seals::sealed_text;
use crate::workshop::{Recipe, open, thorough};

const VARIABLE: &str = "DUALRESTORE_LITTLE_MEMORY";

/// Runs the work in a process of its own that cannot have more than `bytes` beyond what it began
/// with.
fn in_little_memory(test: &str, bytes: u64, work: impl FnOnce()) {
    if std::env::var_os(VARIABLE).is_some() {
        let Rlimit { maximum, .. } = getrlimit(Resource::As);
        let current = Some(address_space() + bytes);
        setrlimit(Resource::As, Rlimit { current, maximum }).expect("a lower limit is allowed");
        work();
        return;
    }
    let itself = std::env::current_exe().expect("known");
    // One arena: others reserve address space that nobody uses.
    let ended = Command::new(itself)
        .args(["--exact", test, "--nocapture", "--test-threads=1"])
        .env(VARIABLE, "1")
        .env("MALLOC_ARENA_MAX", "1")
        .output()
        .expect("run");
    let said = String::from_utf8_lossy(&ended.stdout);
    let failed = String::from_utf8_lossy(&ended.stderr);
    assert!(ended.status.success() && said.contains("1 passed"), "{said}\n{failed}");
}

/// Bytes of address space of this process.
fn address_space() -> u64 {
    let text = std::fs::read_to_string("/proc/self/statm").expect("Linux");
    let pages: u64 = text.split(' ').next().and_then(|word| word.parse().ok()).expect("a number");
    pages * PAGE_BYTES as u64
}

/// Text of a manifest with `field` (as JSON) instead of a value, repeated to `length` bytes.
fn long_manifest(
    mut manifest: Value,
    path: &[&str],
    (start, repeated, end): (&str, &str, &str),
    length: usize,
) -> Vec<u8> {
    const MARK: &str = "\"the long one\"";
    let mut place = &mut manifest;
    for name in path {
        place = match name.parse::<usize>() {
            Ok(index) => &mut place[index],
            Err(_) => &mut place[*name],
        };
    }
    *place = "the long one".into();
    let text = serde_json::to_string_pretty(&manifest).expect("a value is JSON");
    let text = text.strip_suffix("\n}").expect("an object");
    let (before, after) = text.split_once(MARK).expect("marked");
    let count = length / repeated.len();
    let mut long = String::with_capacity(text.len() + length + 100);
    long.extend([before, start]);
    long.extend(std::iter::repeat_n(repeated, count));
    long.extend([end, after]);
    sealed_text(long.as_bytes())
}

#[test]
fn a_manifest_cannot_ask_for_many_times_its_length() {
    let length = if thorough() { 120 << 20 } else { 3 << 20 };
    // Writing a bundle takes more.
    let manifest = manifest_of(&Recipe::small().make().folder, "manifest.json");
    // The text is there four times before it is parsed.
    let bound = 10 * length as u64 + (16 << 20);
    in_little_memory("memory::a_manifest_cannot_ask_for_many_times_its_length", bound, || {
        let runs = &["segments", "0", "coverage"][..];
        let cases: [(&[&str], &str, &str, &str); 9] = [
            (&["begin", "features"], "[\"\"", ",\"\"", "]"),
            (&["begin", "selection"], "[[0,1]", ",[0,1]", "]"),
            (runs, "[[0,1]", ",[0,1]", "]"),
            (&["unreadable"], "[[0,1]", ",[0,1]", "]"),
            (&["segments", "0", "name"], "\"", "x", "\""),
            (&["begin", "cut"], "\"", "\\u0001", "\""),
            (&["begin", "software"], "\"", "x", "\""),
            (&["begin", "selection"], "[[", "[", "]]"),
            (&["segments"], "[{}", ",{}", "]"),
        ];
        for (path, start, repeated, end) in cases {
            let folder = RamFolder::new();
            let parts = (start, repeated, end);
            let text = long_manifest(manifest.clone(), path, parts, length);
            folder.replace("manifest.json", text);
            let error = open(&folder).expect_err("refused");
            assert_eq!(error.kind(), ErrorKind::Format, "{path:?}: {error}");
            let words = error.to_string();
            assert!(words.len() < 1000, "{path:?}: {} bytes of words", words.len());
        }
    });
}

#[test]
fn a_manifest_beyond_its_limit_is_not_even_read() {
    let folder = RamFolder::new();
    folder.replace("manifest.json", vec![b'['; (128 << 20) + 1]);
    let error = open(&folder).expect_err("refused");
    assert!(error.to_string().contains("at most 134217728 bytes"), "{error}");
}

/// A segment that describes every second sector of a volume as zero, page after page.
#[test]
fn a_segment_of_countless_separate_runs_is_refused() {
    let volume: u64 = 8 << 30;
    let made = Recipe::small().make();
    let all = [[0, volume]];
    let change = |bytes: &mut Vec<u8>| {
        bytes[72..80].copy_from_slice(&volume.to_le_bytes());
        bytes[80..84].copy_from_slice(&512_u32.to_le_bytes());
        bytes.truncate(PAGE_BYTES);
        bytes.resize(33_500 * PAGE_BYTES, 0);
        let places = bytes[PAGE_BYTES..].as_chunks_mut::<PAGE_BYTES>().0;
        let (mut at, checks) = (0, Checks::plain([0; 32]));
        for (batch, place) in (0..).zip(places) {
            let zeros = |number: usize| Descriptor {
                range: ByteRange::new(at + number as u64 * 1024, 512),
                kind: ChunkKind::Zero,
                stored_bytes: 0,
                crc32c: 0,
                hash: [0; 32],
                payload_offset: 0,
            };
            let descriptors: Vec<_> = (0..DESCRIPTORS_PER_PAGE).map(zeros).collect();
            at += 1024 * DESCRIPTORS_PER_PAGE as u64;
            encode_batch((0, batch), &descriptors, &checks, place, &mut blake3::Hasher::new());
        }
    };
    let bad = forged(&made, change, |manifest| {
        manifest["begin"]["size"] = volume.into();
        manifest["begin"]["block_size"] = 512.into();
        manifest["begin"]["selection"] = all.as_slice().into();
        manifest["unreadable"] = serde_json::json!([]);
        let entry = &mut manifest["segments"][0];
        entry["coverage"] = all.as_slice().into();
        for (field, value) in [("zero_bytes", volume), ("data_bytes", 0), ("unreadable_bytes", 0)] {
            entry[field] = value.into();
        }
    });
    let bundle = open(&bad.folder).expect("it opens");
    let error = bundle.pieces().find_map(Result::err).expect("refused at last");
    assert!(error.to_string().contains("too many separate runs"), "{error}");
}
