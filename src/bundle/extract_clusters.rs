//! Which clusters of a qcow2 image a bundle gives contents to, found out before a chunk is read.
//!
//! Guarantees: memory is one bit a cluster, and only for stretches of 512 MiB that hold anything.
//! Does not know: whether chunks are whole.

use super::pieces::{Content, PieceSource};
use crate::device::{ByteSink, Stop};
use crate::error::Result;
use crate::extent::ByteRange;
use crate::format::qcow2::{CLUSTER_BYTES, Layout, TABLE_BYTES, TABLE_CLUSTERS, TABLE_WORDS};

/// See the module.
#[derive(Debug)]
pub(super) struct ClusterMap {
    tables: Vec<Table>,
    layout: Layout,
}

#[derive(Debug)]
struct Table {
    number: u64,
    /// Clusters in the tables before.
    before: u64,
    words: Box<[u64; TABLE_WORDS]>,
}

/// A part of a range, and whether its clusters are in the map.
pub(super) type Part = (ByteRange, bool);

impl ClusterMap {
    /// Of a source that ascends.
    pub(super) fn of(source: &dyn PieceSource, stop: &Stop) -> Result<Self> {
        let mut tables: Vec<Table> = Vec::new();
        for piece in source.pieces() {
            stop.check()?;
            let piece = piece?;
            if matches!(piece.content, Content::Stored { .. } | Content::Plain(_)) {
                add(&mut tables, piece.range);
            }
        }
        let mut clusters = 0;
        for table in &mut tables {
            table.before = clusters;
            clusters += table.words.iter().map(|word| u64::from(word.count_ones())).sum::<u64>();
        }
        let size = source.identity().geometry.size();
        let layout = Layout::new(size, tables.len() as u64, clusters)?;
        Ok(Self { tables, layout })
    }

    /// Bytes of the image file.
    pub(super) fn file_bytes(&self) -> u64 {
        self.layout.file_bytes()
    }

    /// Writes all that stands before the clusters.
    pub(super) fn write_head(&self, sink: &mut dyn ByteSink) -> Result<()> {
        sink.write(&self.layout.header())?;
        sink.write(&self.layout.refcount_table())?;
        for block in self.layout.refcount_blocks() {
            sink.write(&block)?;
        }
        sink.write(&self.layout.l1_table(self.tables.iter().map(|table| table.number)))?;
        for table in &self.tables {
            sink.write(&self.layout.l2_table(table.before, &table.words))?;
        }
        Ok(())
    }

    /// A range cut where it enters and leaves clusters that are in the map.
    pub(super) fn parts(&self, range: ByteRange) -> Vec<Part> {
        let mut parts: Vec<Part> = Vec::new();
        let mut at = range.offset;
        while at < range.end() {
            let number = at / TABLE_BYTES;
            let found = self.tables.binary_search_by_key(&number, |table| table.number);
            let (end, there) = match found {
                Err(_) => (number.saturating_add(1).saturating_mul(TABLE_BYTES), false),
                Ok(place) => {
                    let cluster = at / CLUSTER_BYTES;
                    let end = (cluster + 1) * CLUSTER_BYTES;
                    (end, self.tables[place].has(cluster % TABLE_CLUSTERS))
                }
            };
            let end = end.min(range.end());
            match parts.last_mut() {
                Some((last, same)) if *same == there => last.length += end - at,
                _ => parts.push((ByteRange::new(at, end - at), there)),
            }
            at = end;
        }
        parts
    }
}

impl Table {
    fn has(&self, cluster: u64) -> bool {
        self.words[(cluster / 64) as usize] >> (cluster % 64) & 1 == 1
    }
}

fn add(tables: &mut Vec<Table>, range: ByteRange) {
    let clusters = range.offset / CLUSTER_BYTES..range.end().div_ceil(CLUSTER_BYTES);
    for cluster in clusters {
        let number = cluster / TABLE_CLUSTERS;
        if tables.last().is_none_or(|last| last.number != number) {
            assert!(tables.last().is_none_or(|last| last.number < number), "pieces ascend");
            tables.push(Table { number, before: 0, words: Box::new([0; TABLE_WORDS]) });
        }
        let table = tables.last_mut().expect("pushed above");
        let within = cluster % TABLE_CLUSTERS;
        table.words[(within / 64) as usize] |= 1 << (within % 64);
    }
}
