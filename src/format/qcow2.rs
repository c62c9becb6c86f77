//! QCOW2 images, version 3, written from front to back: all that stands before the first cluster of
//! the disk, computed from which clusters there are.
//!
//! | in the file, one after the other | clusters of 64 KiB |
//! |---|---|
//! | header | 1 |
//! | refcount table: where the refcount blocks lie | as many as it takes |
//! | refcount blocks: each cluster of the file is used once | one for 32768 clusters of the file |
//! | L1 table: where the L2 tables lie | as many as it takes |
//! | L2 tables: where the clusters of the disk lie | one for 512 MiB of disk that hold a cluster |
//! | clusters of the disk | those that are not all zero, in the order of the disk |
//!
//! What has no cluster reads as zeros. Integers are big-endian.
//!
//! Guarantees: no place in the file overlaps another, every cluster is counted.
//! Does not know: which clusters hold anything, files.

use crate::error::{Error, Result};
use crate::limits::{QCOW2_L1_BYTES_MAX, QCOW2_REFCOUNT_TABLE_BYTES_MAX};

const CLUSTER_BITS: u32 = 16;
pub const CLUSTER_BYTES: u64 = 1 << CLUSTER_BITS;
/// Clusters of the disk that one L2 table maps, and their bytes.
pub const TABLE_CLUSTERS: u64 = CLUSTER_BYTES / ENTRY_BYTES;
pub const TABLE_BYTES: u64 = TABLE_CLUSTERS * CLUSTER_BYTES;
/// Words of one bit a cluster, for one table.
pub const TABLE_WORDS: usize = TABLE_CLUSTERS as usize / 64;

const ENTRY_BYTES: u64 = 8;
const MAGIC: [u8; 4] = *b"QFI\xfb";
const VERSION: u32 = 3;
const HEADER_BYTES: u32 = 104;
/// Refcounts of 16 bits.
const REFCOUNT_ORDER: u32 = 4;
const BLOCK_REFCOUNTS: u64 = CLUSTER_BYTES / 2;
/// Of an entry: the refcount of what it points to is one.
const COPIED: u64 = 1 << 63;

/// Where everything lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    size: u64,
    refcount_table_clusters: u64,
    refcount_blocks: u64,
    l1_entries: u64,
    tables: u64,
    clusters: u64,
}

impl Layout {
    /// Of a disk of `size` bytes with so many clusters, mapped by so many L2 tables.
    pub fn new(size: u64, tables: u64, clusters: u64) -> Result<Self> {
        let l1_entries = size.div_ceil(TABLE_BYTES);
        let too_large = |what: &str| {
            Err(Error::usage(format!(
                "expected what a qcow2 image can hold, found {what}: extract a raw one"
            )))
        };
        if l1_entries * ENTRY_BYTES > QCOW2_L1_BYTES_MAX {
            return too_large(&format!("a volume of {size} bytes"));
        }
        let mut layout = Self {
            size,
            refcount_table_clusters: 1,
            refcount_blocks: 1,
            l1_entries,
            tables,
            clusters,
        };
        // Refcounts count their own clusters as well; each round adds what the last one lacked.
        loop {
            let blocks = layout.file_clusters().div_ceil(BLOCK_REFCOUNTS);
            let table = (blocks * ENTRY_BYTES).div_ceil(CLUSTER_BYTES);
            if (blocks, table) == (layout.refcount_blocks, layout.refcount_table_clusters) {
                break;
            }
            (layout.refcount_blocks, layout.refcount_table_clusters) = (blocks, table);
        }
        if layout.refcount_table_clusters * CLUSTER_BYTES > QCOW2_REFCOUNT_TABLE_BYTES_MAX {
            return too_large(&format!("{} bytes with contents", clusters * CLUSTER_BYTES));
        }
        Ok(layout)
    }

    /// Bytes of the whole image file.
    #[must_use]
    pub fn file_bytes(&self) -> u64 {
        self.file_clusters() * CLUSTER_BYTES
    }

    fn file_clusters(&self) -> u64 {
        self.first_cluster() + self.clusters
    }

    fn first_block(&self) -> u64 {
        1 + self.refcount_table_clusters
    }

    fn l1_table_start(&self) -> u64 {
        self.first_block() + self.refcount_blocks
    }

    fn first_table(&self) -> u64 {
        self.l1_table_start() + (self.l1_entries * ENTRY_BYTES).div_ceil(CLUSTER_BYTES)
    }

    fn first_cluster(&self) -> u64 {
        self.first_table() + self.tables
    }

    /// The first cluster of the file.
    #[must_use]
    pub fn header(&self) -> Vec<u8> {
        let l1_entries = u32::try_from(self.l1_entries).expect("checked when it was made");
        let table_clusters =
            u32::try_from(self.refcount_table_clusters).expect("checked when it was made");
        let mut bytes = Vec::with_capacity(CLUSTER_BYTES as usize);
        bytes.extend_from_slice(&MAGIC);
        bytes.extend_from_slice(&VERSION.to_be_bytes());
        // No backing file: its name's position and length.
        bytes.extend_from_slice(&[0; 8 + 4]);
        bytes.extend_from_slice(&CLUSTER_BITS.to_be_bytes());
        bytes.extend_from_slice(&self.size.to_be_bytes());
        // Not encrypted.
        bytes.extend_from_slice(&[0; 4]);
        bytes.extend_from_slice(&l1_entries.to_be_bytes());
        bytes.extend_from_slice(&(self.l1_table_start() * CLUSTER_BYTES).to_be_bytes());
        bytes.extend_from_slice(&CLUSTER_BYTES.to_be_bytes());
        bytes.extend_from_slice(&table_clusters.to_be_bytes());
        // No snapshots: how many, and where. No features: incompatible, compatible, automatic.
        bytes.extend_from_slice(&[0; 4 + 8 + 3 * 8]);
        bytes.extend_from_slice(&REFCOUNT_ORDER.to_be_bytes());
        bytes.extend_from_slice(&HEADER_BYTES.to_be_bytes());
        assert_eq!(bytes.len(), HEADER_BYTES as usize, "the fields make up the header");
        // Zeros after it are the mark that no extension follows.
        bytes.resize(CLUSTER_BYTES as usize, 0);
        bytes
    }

    /// The whole clusters of the refcount table.
    #[must_use]
    pub fn refcount_table(&self) -> Vec<u8> {
        let blocks = (0..self.refcount_blocks).map(|block| self.first_block() + block);
        let mut bytes: Vec<u8> =
            blocks.flat_map(|block| (block * CLUSTER_BYTES).to_be_bytes()).collect();
        bytes.resize((self.refcount_table_clusters * CLUSTER_BYTES) as usize, 0);
        bytes
    }

    /// The refcount blocks, a cluster each.
    pub fn refcount_blocks(&self) -> impl Iterator<Item = Vec<u8>> {
        let clusters = self.file_clusters();
        (0..self.refcount_blocks).map(move |block| {
            let counted = (clusters - block * BLOCK_REFCOUNTS).min(BLOCK_REFCOUNTS);
            let mut bytes = 1u16.to_be_bytes().repeat(counted as usize);
            bytes.resize(CLUSTER_BYTES as usize, 0);
            bytes
        })
    }

    /// The whole clusters of the L1 table. `present`: which L2 tables there are, ascending; as many
    /// as the layout was made for.
    #[must_use]
    pub fn l1_table(&self, present: impl Iterator<Item = u64>) -> Vec<u8> {
        let clusters = self.first_table() - self.l1_table_start();
        let mut bytes = vec![0; (clusters * CLUSTER_BYTES) as usize];
        let mut placed = 0;
        for table in present {
            assert!(table < self.l1_entries, "a table within the disk");
            let at = (table * ENTRY_BYTES) as usize;
            let entry = pointer(self.first_table() + placed);
            bytes[at..at + 8].copy_from_slice(&entry.to_be_bytes());
            placed += 1;
        }
        assert_eq!(placed, self.tables, "as many tables as there is room for");
        bytes
    }

    /// An L2 table: one bit for each of its clusters, set where there is one. So many clusters of
    /// the disk come before its first.
    #[must_use]
    pub fn l2_table(&self, before: u64, present: &[u64; TABLE_WORDS]) -> Vec<u8> {
        let mut bytes = vec![0; CLUSTER_BYTES as usize];
        let mut next = self.first_cluster() + before;
        for (number, entry) in bytes.chunks_exact_mut(ENTRY_BYTES as usize).enumerate() {
            if present[number / 64] >> (number % 64) & 1 == 1 {
                entry.copy_from_slice(&pointer(next).to_be_bytes());
                next += 1;
            }
        }
        assert!(next <= self.file_clusters(), "clusters that the layout was made for");
        bytes
    }
}

/// An entry that points to a cluster of the file whose refcount is one.
fn pointer(cluster: u64) -> u64 {
    (cluster * CLUSTER_BYTES) | COPIED
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;
    use std::collections::BTreeSet;

    const CLUSTER: usize = CLUSTER_BYTES as usize;

    fn u32_at(bytes: &[u8], at: usize) -> u32 {
        u32::from_be_bytes(bytes[at..at + 4].try_into().expect("4 bytes"))
    }

    fn u64_at(bytes: &[u8], at: usize) -> u64 {
        u64::from_be_bytes(bytes[at..at + 8].try_into().expect("8 bytes"))
    }

    /// All that stands before the clusters of the disk, in order.
    fn head(layout: &Layout, tables: &[(u64, [u64; TABLE_WORDS])]) -> Vec<u8> {
        let mut bytes = layout.header();
        bytes.extend(layout.refcount_table());
        bytes.extend(layout.refcount_blocks().flatten());
        bytes.extend(layout.l1_table(tables.iter().map(|table| table.0)));
        let mut before = 0;
        for (_, words) in tables {
            bytes.extend(layout.l2_table(before, words));
            before += words.iter().map(|word| u64::from(word.count_ones())).sum::<u64>();
        }
        bytes
    }

    /// A reader that knows the published format only: every cluster of the file that something
    /// points to, once, and which cluster of the disk lies where.
    fn read(bytes: &[u8], file_bytes: u64) -> Vec<(u64, u64)> {
        assert_eq!((&bytes[..4], u32_at(bytes, 4)), (&b"QFI\xfb"[..], 3));
        assert_eq!((u32_at(bytes, 20), u32_at(bytes, 96), u32_at(bytes, 100)), (16, 4, 104));
        assert!(bytes[104..112].iter().all(|byte| *byte == 0), "no extension");
        for zero in [8, 28 + 4, 60, 64, 72, 80, 88] {
            assert_eq!(u32_at(bytes, zero), 0, "at {zero}");
        }
        let mut used = BTreeSet::from([0]);
        let mut take = |position: u64| {
            assert!(position.is_multiple_of(CLUSTER_BYTES) && position < file_bytes);
            assert!(used.insert(position / CLUSTER_BYTES), "two point to {position}");
            position as usize
        };
        let mut disk = Vec::new();
        let l1 = u64_at(bytes, 40);
        let l1_entries = u64::from(u32_at(bytes, 36));
        assert!(l1_entries * TABLE_BYTES >= u64_at(bytes, 24), "all of the disk is mapped");
        for part in 0..(l1_entries * 8).div_ceil(CLUSTER_BYTES) {
            take(l1 + part * CLUSTER_BYTES);
        }
        for table in 0..l1_entries {
            let entry = u64_at(bytes, (l1 + table * 8) as usize);
            if entry == 0 {
                continue;
            }
            assert_eq!(entry >> 63, 1, "its refcount is one");
            let l2 = take(entry << 1 >> 1);
            for cluster in 0..8192 {
                let entry = u64_at(bytes, l2 + cluster * 8);
                if entry != 0 {
                    assert_eq!(entry >> 63, 1, "its refcount is one");
                    let position = take(entry << 1 >> 1) as u64;
                    disk.push((table * 8192 + cluster as u64, position));
                }
            }
        }
        let table = u64_at(bytes, 48);
        let table_clusters = u64::from(u32_at(bytes, 56));
        let mut counted = 0;
        for part in 0..table_clusters {
            take(table + part * CLUSTER_BYTES);
        }
        for at in 0..table_clusters * 8192 {
            let block = u64_at(bytes, (table + at * 8) as usize);
            if block != 0 {
                let block = take(block);
                for (number, pair) in bytes[block..block + CLUSTER].chunks_exact(2).enumerate() {
                    let cluster = at * 32768 + number as u64;
                    let expected = cluster < file_bytes / CLUSTER_BYTES;
                    assert_eq!(pair == [0, 1], expected, "refcount of {cluster}");
                    assert!(expected || pair == [0, 0]);
                    counted += u64::from(expected);
                }
            }
        }
        assert_eq!(counted * CLUSTER_BYTES, file_bytes, "every cluster is counted");
        assert_eq!(used.len() as u64, counted, "nothing is leaked");
        disk
    }

    fn words(clusters: &[usize]) -> [u64; TABLE_WORDS] {
        let mut words = [0; TABLE_WORDS];
        for cluster in clusters {
            words[cluster / 64] |= 1 << (cluster % 64);
        }
        words
    }

    #[test]
    fn a_reader_of_the_published_format_finds_each_cluster_once_and_in_order() {
        let full = [u64::MAX; TABLE_WORDS];
        for tables in [
            vec![],
            vec![(0, words(&[0]))],
            vec![(0, words(&[3, 64, 8191])), (5, words(&[0, 1])), (2047, words(&[8191]))],
            vec![(0, full), (1, full), (2, full), (3, full), (7, words(&[9]))],
        ] {
            let count = |table: &(u64, [u64; TABLE_WORDS])| -> u64 {
                table.1.iter().map(|word| u64::from(word.count_ones())).sum()
            };
            let clusters = tables.iter().map(count).sum();
            let layout = Layout::new(1 << 40, tables.len() as u64, clusters).expect("it fits");
            let bytes = head(&layout, &tables);
            let disk = read(&bytes, layout.file_bytes());
            assert_eq!(disk.len() as u64, clusters);
            let numbers: Vec<u64> = disk.iter().map(|cluster| cluster.0).collect();
            let expected: Vec<u64> = tables
                .iter()
                .flat_map(|(table, words)| {
                    (0..8192u64)
                        .filter(|bit| words[*bit as usize / 64] >> (bit % 64) & 1 == 1)
                        .map(move |bit| table * 8192 + bit)
                })
                .collect();
            assert_eq!(numbers, expected);
            let places = disk.iter().map(|cluster| cluster.1 / CLUSTER_BYTES);
            let first = bytes.len() as u64 / CLUSTER_BYTES;
            assert!(places.eq(first..first + clusters), "they follow in the order of the disk");
        }
    }

    #[test]
    fn the_refcounts_count_themselves_at_every_number_of_clusters_around_a_full_block() {
        for blocks in 1..4u64 {
            for off in 0..12 {
                let tables = blocks * 4;
                let clusters = blocks * BLOCK_REFCOUNTS - tables - off;
                let layout = Layout::new(1 << 40, tables, clusters).expect("it fits");
                let total = layout.file_clusters();
                assert!(layout.refcount_blocks * BLOCK_REFCOUNTS >= total, "{layout:?}");
                assert!((layout.refcount_blocks - 1) * BLOCK_REFCOUNTS < total, "{layout:?}");
            }
        }
    }

    #[test]
    fn an_odd_size_stands_in_the_header_as_it_is() {
        let layout = Layout::new((1 << 29) + 512, 1, 1).expect("it fits");
        assert_eq!(u64_at(&layout.header(), 24), (1 << 29) + 512);
        assert_eq!(u32_at(&layout.header(), 36), 2);
    }

    #[test]
    fn what_readers_of_qcow2_would_refuse_is_refused() {
        for (size, clusters) in [((2 << 50) + 512, 0), (2 << 50, 1 << 35)] {
            let refused = Layout::new(size, 1, clusters).expect_err("too large");
            assert_eq!(refused.kind(), ErrorKind::Usage);
        }
        Layout::new(2 << 50, 1, 1).expect("the largest");
    }
}
