//! Partition tables, MBR and GPT: bytes to values. Only what tells where partitions lie.
//!
//! Guarantees: parsing never panics; a GPT header or array whose CRC32 does not match is no table;
//! partitions lie inside the disk, those of a GPT do not overlap.
//! Does not know: disks, what is in a partition.

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

use crate::error::{Error, Result};
use crate::limits::PARTITION_ARRAY_BYTES_MAX;

/// Bytes of a boot record, whatever the sectors of the disk.
pub const BOOT_RECORD_BYTES: usize = 512;
const SIGNATURE: [u8; 2] = [0x55, 0xAA];
const EXTENDED: [u8; 3] = [0x05, 0x0F, 0x85];
const PROTECTIVE: u8 = 0xEE;
const GPT_SIGNATURE: [u8; 8] = *b"EFI PART";
const GPT_REVISION: u32 = 0x0001_0000;
const GPT_HEADER_BYTES: usize = 92;
const GPT_ENTRY_BYTES_MIN: u32 = 128;

/// A run of sectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Sectors {
    pub first: u64,
    pub count: u64,
}

/// One of the four entries of a boot record that is in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BootEntry {
    /// From 1 to 4.
    pub place: u32,
    pub kind: u8,
    pub sectors: Sectors,
}

impl BootEntry {
    /// Whether it holds further partitions.
    #[must_use]
    pub fn is_extended(&self) -> bool {
        EXTENDED.contains(&self.kind)
    }

    /// Whether it says that the disk has a GPT.
    #[must_use]
    pub fn is_protective(&self) -> bool {
        self.kind == PROTECTIVE
    }
}

#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawBootEntry {
    status: u8,
    first_place: [u8; 3],
    kind: u8,
    last_place: [u8; 3],
    first: U32,
    count: U32,
}

/// The used entries of a master or extended boot record; `None` if the sector is none.
#[must_use]
pub fn parse_boot_record(sector: &[u8; BOOT_RECORD_BYTES]) -> Option<Vec<BootEntry>> {
    if sector[510..] != SIGNATURE {
        return None;
    }
    let (entries, _) = <[RawBootEntry; 4]>::ref_from_prefix(&sector[446..]).ok()?;
    // A boot sector of a file system ends with the same signature; its code is no table.
    if entries.iter().any(|entry| entry.status & 0x7F != 0) {
        return None;
    }
    let used = (1..).zip(entries).filter(|(_, entry)| entry.kind != 0 && entry.count != 0);
    let entries = used.map(|(place, entry)| BootEntry {
        place,
        kind: entry.kind,
        sectors: Sectors { first: entry.first.get().into(), count: entry.count.get().into() },
    });
    Some(entries.collect())
}

#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawGptHeader {
    signature: [u8; 8],
    revision: U32,
    header_bytes: U32,
    crc: U32,
    reserved: U32,
    own: U64,
    other: U64,
    first_usable: U64,
    last_usable: U64,
    disk: [u8; 16],
    array: U64,
    entries: U32,
    entry_bytes: U32,
    array_crc: U32,
}

#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawGptEntry {
    kind: [u8; 16],
    own: [u8; 16],
    first: U64,
    last: U64,
}

/// A GPT header whose checksum is right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GptHeader {
    /// Sector of the other header.
    pub other: u64,
    first_usable: u64,
    last_usable: u64,
    disk: [u8; 16],
    /// First sector of the array of entries.
    pub array: u64,
    entries: u32,
    entry_bytes: u32,
    array_crc: u32,
}

impl GptHeader {
    /// The header in sector `own` of a disk with so many.
    pub fn parse(sector: &[u8], own: u64, sectors: u64) -> Result<Self> {
        let (raw, _) = RawGptHeader::ref_from_prefix(sector)
            .map_err(|_| Error::format("a sector too short for a GPT header"))?;
        if raw.signature != GPT_SIGNATURE || raw.revision.get() != GPT_REVISION {
            return Err(Error::format("there is no GPT header of version 1.0"));
        }
        let length = raw.header_bytes.get() as usize;
        if !(GPT_HEADER_BYTES..=sector.len()).contains(&length) {
            return Err(Error::format("the GPT header states an impossible length"));
        }
        let mut bytes = sector[..length].to_vec();
        bytes[16..20].fill(0);
        if crc32(&bytes) != raw.crc.get() {
            return Err(Error::integrity("the CRC32 of the GPT header does not match"));
        }
        let header = Self {
            other: raw.other.get(),
            first_usable: raw.first_usable.get(),
            last_usable: raw.last_usable.get(),
            disk: raw.disk,
            array: raw.array.get(),
            entries: raw.entries.get(),
            entry_bytes: raw.entry_bytes.get(),
            array_crc: raw.array_crc.get(),
        };
        let sane = raw.own.get() == own
            && header.first_usable <= header.last_usable
            && header.last_usable < sectors
            && header.entry_bytes >= GPT_ENTRY_BYTES_MIN
            && header.entry_bytes.is_power_of_two()
            && header.array_bytes() <= PARTITION_ARRAY_BYTES_MAX
            && header.array < sectors;
        if sane { Ok(header) } else { Err(Error::format("the GPT header contradicts the disk")) }
    }

    /// Bytes of the array of entries.
    #[must_use]
    pub fn array_bytes(&self) -> u64 {
        u64::from(self.entries) * u64::from(self.entry_bytes)
    }

    /// Whether two headers describe the same table.
    #[must_use]
    pub fn agrees_with(&self, other: &Self) -> bool {
        let told = |one: &Self| (one.disk, one.entries, one.entry_bytes, one.array_crc);
        told(self) == told(other)
    }

    /// The used entries of its array, by number from 1.
    pub fn parse_array(&self, array: &[u8]) -> Result<Vec<(u32, Sectors)>> {
        if array.len() as u64 != self.array_bytes() || crc32(array) != self.array_crc {
            return Err(Error::integrity("the CRC32 of the GPT's entries does not match"));
        }
        let mut found = Vec::new();
        for (number, bytes) in (1..).zip(array.chunks_exact(self.entry_bytes as usize)) {
            let (raw, _) = RawGptEntry::ref_from_prefix(bytes)
                .map_err(|_| Error::format("an entry of the GPT is too short"))?;
            if raw.kind == [0; 16] {
                continue;
            }
            let (first, last) = (raw.first.get(), raw.last.get());
            if first > last || first < self.first_usable || last > self.last_usable {
                return Err(Error::format(format!(
                    "partition {number} of the GPT lies outside the usable part of the disk"
                )));
            }
            found.push((number, Sectors { first, count: last - first + 1 }));
        }
        let mut sorted: Vec<Sectors> = found.iter().map(|(_, sectors)| *sectors).collect();
        sorted.sort_unstable();
        let overlap = sorted.windows(2).any(|two| two[0].first + two[0].count > two[1].first);
        if overlap {
            return Err(Error::format("partitions of the GPT overlap"));
        }
        Ok(found)
    }
}

/// CRC-32 as in Ethernet and zip files (polynomial 04C11DB7, reflected).
fn crc32(bytes: &[u8]) -> u32 {
    let crc = bytes.iter().fold(u32::MAX, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
            if crc & 1 == 1 { (crc >> 1) ^ 0xEDB8_8320 } else { crc >> 1 }
        })
    });
    !crc
}

#[cfg(test)]
pub mod made_up {
    //! Tables for tests, here and where they are read from disks.

    use super::*;

    /// A boot record with these entries: kind, first sector, number of sectors.
    #[must_use]
    pub fn boot_record(entries: &[(u8, u32, u32)]) -> [u8; BOOT_RECORD_BYTES] {
        let mut sector = [0; BOOT_RECORD_BYTES];
        for (index, (kind, first, count)) in entries.iter().enumerate() {
            let entry = &mut sector[446 + 16 * index..][..16];
            entry[4] = *kind;
            entry[8..12].copy_from_slice(&first.to_le_bytes());
            entry[12..].copy_from_slice(&count.to_le_bytes());
        }
        sector[510..].copy_from_slice(&SIGNATURE);
        sector
    }

    /// An array of 128 entries with these used ones: number, first and last sector.
    #[must_use]
    pub fn gpt_array(used: &[(usize, u64, u64)]) -> Vec<u8> {
        let mut array = vec![0; 128 * 128];
        for (number, first, last) in used {
            let entry = &mut array[(number - 1) * 128..][..128];
            entry[..16].fill(7);
            entry[16..32].fill(*number as u8);
            entry[32..40].copy_from_slice(&first.to_le_bytes());
            entry[40..48].copy_from_slice(&last.to_le_bytes());
        }
        array
    }

    /// A header in `own` for that array, which begins in sector `at`.
    #[must_use]
    pub fn gpt_header(own: u64, other: u64, at: u64, sectors: u64, array: &[u8]) -> [u8; 512] {
        let mut sector = [0; 512];
        sector[..8].copy_from_slice(&GPT_SIGNATURE);
        sector[8..12].copy_from_slice(&GPT_REVISION.to_le_bytes());
        sector[12..16].copy_from_slice(&(GPT_HEADER_BYTES as u32).to_le_bytes());
        for (place, value) in [(24, own), (32, other), (40, 34), (48, sectors - 34), (72, at)] {
            sector[place..place + 8].copy_from_slice(&value.to_le_bytes());
        }
        sector[56..72].fill(9);
        for (place, value) in [(80, 128), (84, 128), (88, crc32(array))] {
            sector[place..place + 4].copy_from_slice(&value.to_le_bytes());
        }
        let crc = crc32(&sector[..GPT_HEADER_BYTES]);
        sector[16..20].copy_from_slice(&crc.to_le_bytes());
        sector
    }
}

#[cfg(test)]
mod tests {
    use super::made_up::{boot_record, gpt_array, gpt_header};
    use super::*;

    #[test]
    fn the_checksum_is_that_of_zip_files() {
        assert_eq!(crc32(b"123456789"), 0xCBF4_3926);
    }

    #[test]
    fn a_boot_record_names_its_used_entries() {
        let sector = boot_record(&[(0x83, 2048, 100), (0, 0, 0), (0x05, 4096, 50)]);
        let entries = parse_boot_record(&sector).expect("a boot record");
        assert_eq!(
            entries.iter().map(|entry| (entry.place, entry.is_extended())).collect::<Vec<_>>(),
            [(1, false), (3, true)]
        );
        assert_eq!(entries[0].sectors, Sectors { first: 2048, count: 100 });
        assert!(parse_boot_record(&[0; BOOT_RECORD_BYTES]).is_none());
        let mut code = sector;
        code[446] = 0x33;
        assert!(parse_boot_record(&code).is_none(), "the boot sector of a file system");
    }

    #[test]
    fn a_gpt_reads_back_and_any_flipped_bit_of_it_is_noticed() {
        let array = gpt_array(&[(1, 34, 99), (5, 100, 100)]);
        let mut sector = gpt_header(1, 999, 2, 1000, &array);
        let header = GptHeader::parse(&sector, 1, 1000).expect("whole");
        let expected =
            [(1, Sectors { first: 34, count: 66 }), (5, Sectors { first: 100, count: 1 })];
        assert_eq!(header.parse_array(&array).expect("whole"), expected);
        for bit in 0..GPT_HEADER_BYTES * 8 {
            sector[bit / 8] ^= 1 << (bit % 8);
            assert!(GptHeader::parse(&sector, 1, 1000).is_err(), "bit {bit}");
            sector[bit / 8] ^= 1 << (bit % 8);
        }
        let mut torn = array;
        torn[40] ^= 1;
        assert!(header.parse_array(&torn).is_err());
        assert!(GptHeader::parse(&sector, 2, 1000).is_err(), "of another sector");
        assert!(GptHeader::parse(&sector, 1, 900).is_err(), "of a larger disk");
    }

    #[test]
    fn overlapping_and_outlying_partitions_are_refused_with_right_checksums() {
        for used in
            [&[(1, 34, 99), (2, 99, 120)][..], &[(1, 10, 99)], &[(1, 34, 999)], &[(1, 50, 49)]]
        {
            let array = gpt_array(used);
            let sector = gpt_header(1, 999, 2, 1000, &array);
            let header = GptHeader::parse(&sector, 1, 1000).expect("whole");
            assert!(header.parse_array(&array).is_err(), "{used:?}");
        }
    }
}
