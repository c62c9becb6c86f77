//! `report.json`: what a medium holds, for people and their inventories. Nothing reads it back.

use serde::Serialize;

use crate::format::bundle::{Manifest, Run};

/// Runs listed; further ones are in the manifest.
const RUNS_MAX: usize = 100;

#[derive(Serialize)]
struct MediumReport<'a> {
    format: &'static str,
    version: u32,
    bundle: String,
    medium: u32,
    last: bool,
    volume: Option<String>,
    generation: u64,
    cut: u64,
    size: u64,
    compression: &'a str,
    created_unix_s: u64,
    software: &'a str,
    segments: usize,
    first_segment: Option<u32>,
    /// From the first byte of the volume that it speaks of to the last.
    covers: Option<Run>,
    bytes_selected: u64,
    bytes_data: u64,
    bytes_zero: u64,
    bytes_unreadable: u64,
    bytes_stored: u64,
    bytes_of_segments: u64,
    chunks: u64,
    unreadable: &'a [Run],
}

/// The file's bytes.
pub fn report_of(manifest: &Manifest) -> Vec<u8> {
    let begin = &manifest.begin;
    let segments = &manifest.segments;
    let first = segments.first();
    let start = first.and_then(|entry| entry.coverage.first());
    let end = segments.last().and_then(|entry| entry.coverage.last());
    let sum = |field: fn(&crate::format::bundle::SegmentEntry) -> u64| {
        segments.iter().map(field).sum::<u64>()
    };
    let report = MediumReport {
        format: "dualrestore medium report",
        version: 1,
        bundle: begin.bundle.into(),
        medium: manifest.medium.map_or(1, |medium| medium.number),
        last: manifest.medium.is_none_or(|medium| medium.last),
        volume: begin.volume.map(String::from),
        generation: begin.generation,
        cut: begin.cut,
        size: begin.size,
        compression: &begin.compression,
        created_unix_s: begin.created_unix_s,
        software: &begin.software,
        segments: segments.len(),
        first_segment: first.map(|entry| entry.number),
        covers: start.zip(end).map(|(start, end)| Run(start.0, end.1)),
        bytes_selected: sum(|entry| entry.coverage.iter().map(|run| run.1 - run.0).sum()),
        bytes_data: sum(|entry| entry.data_bytes),
        bytes_zero: sum(|entry| entry.zero_bytes),
        bytes_unreadable: sum(|entry| entry.unreadable_bytes),
        bytes_stored: sum(|entry| entry.stored_bytes),
        bytes_of_segments: sum(|entry| entry.bytes),
        chunks: sum(|entry| entry.chunks),
        unreadable: &manifest.unreadable[..manifest.unreadable.len().min(RUNS_MAX)],
    };
    let mut text = serde_json::to_vec_pretty(&report).expect("plain structures become JSON");
    text.push(b'\n');
    text
}
