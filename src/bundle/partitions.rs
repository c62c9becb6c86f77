//! The partitions of a source, by number, read from the source itself.
//!
//! | sector 0 | the partitions are those of |
//! |---|---|
//! | a boot record with a protective entry | the GPT: its first header, else the one at the end |
//! | another boot record | the record, then the chain of its extended partition, from 5 |
//! | anything else | nobody: there is no table |
//!
//! Guarantees: what is returned lies inside the source, in whole blocks of it; two GPTs that
//! contradict each other, and chains that go in circles, are refused.
//! Does not know: file systems.

use super::source::Source;
use crate::error::{Error, Result};
use crate::extent::ByteRange;
use crate::format::partition::{
    BOOT_RECORD_BYTES, BootEntry, GptHeader, Sectors, parse_boot_record,
};
use crate::limits::PARTITIONS_MAX;

/// A GPT counts in sectors of its disk, a boot record always in these.
const SECTOR: u64 = 512;
const SECTORS: [u64; 2] = [512, 4096];

/// A partition by its number, in bytes.
pub type Partition = (u32, ByteRange);

/// The byte ranges of those partitions, in whole blocks: every block that they touch.
pub fn select_partitions(source: &dyn Source, numbers: &[u32]) -> Result<Vec<ByteRange>> {
    if numbers.is_empty() {
        return Ok(Vec::new());
    }
    let geometry = source.identity().geometry;
    let known = partitions(source)?;
    let select = |number: &u32| {
        let found = known.iter().find(|(known, _)| known == number).map(|(_, range)| *range);
        let range = found.ok_or_else(|| {
            let shown: Vec<String> =
                known.iter().map(|(number, range)| shown(*number, *range)).collect();
            Error::usage(format!(
                "expected the number of a partition of the source ({}), found {number}",
                if shown.is_empty() { "its table is empty".into() } else { shown.join(", ") }
            ))
        })?;
        Ok(geometry.bytes_of(geometry.touched(range)))
    };
    numbers.iter().map(select).collect()
}

fn shown(number: u32, range: ByteRange) -> String {
    format!("{number}: {} bytes at {}", range.length, range.offset)
}

/// All partitions of a source.
pub fn partitions(source: &dyn Source) -> Result<Vec<Partition>> {
    let size = source.identity().geometry.size();
    let record = boot_record(source, 0)?.ok_or_else(|| {
        Error::usage(
            "expected a partition table (MBR or GPT) at the start of the source, found none: name \
             ranges of bytes with --select",
        )
    })?;
    let found = match record.iter().any(BootEntry::is_protective) {
        true => gpt_partitions(source, size)?,
        false => boot_partitions(source, &record)?,
    };
    let outside = found.iter().find(|(_, range)| range.end() > size);
    match outside {
        None => Ok(found),
        Some((number, range)) => Err(Error::format(format!(
            "partition {}: it ends after the source of {size} bytes; is the source cut off?",
            shown(*number, *range)
        ))),
    }
}

fn read(source: &dyn Source, at: u64, length: u64) -> Result<Vec<u8>> {
    let size = source.identity().geometry.size();
    if at.checked_add(length).is_none_or(|end| end > size) {
        return Err(Error::format("the partition table points outside the source"));
    }
    // In whole pages where that is possible, since some sources read nothing smaller.
    let start = at / 4096 * 4096;
    let end = (at + length).next_multiple_of(4096).min(size);
    let mut bytes = vec![0; usize::try_from(end - start).expect("tables are small")];
    source.read_at(start, &mut bytes)?;
    let skip = usize::try_from(at - start).expect("less than a page");
    Ok(bytes[skip..][..usize::try_from(length).expect("tables are small")].to_vec())
}

fn boot_record(source: &dyn Source, sector: u64) -> Result<Option<Vec<BootEntry>>> {
    let at = sector.checked_mul(SECTOR).ok_or_else(|| Error::format("a sector beyond any disk"))?;
    let bytes = read(source, at, BOOT_RECORD_BYTES as u64)?;
    let sector = bytes.as_slice().try_into().expect("as many as asked for");
    Ok(parse_boot_record(sector))
}

fn bytes_of(sectors: Sectors, sector: u64) -> Result<ByteRange> {
    let offset = sectors.first.checked_mul(sector);
    let length = sectors.count.checked_mul(sector);
    match (offset, length) {
        (Some(offset), Some(length)) if offset.checked_add(length).is_some() => {
            Ok(ByteRange::new(offset, length))
        }
        _ => Err(Error::format("a partition ends beyond any disk")),
    }
}

fn boot_partitions(source: &dyn Source, record: &[BootEntry]) -> Result<Vec<Partition>> {
    let mut found = Vec::new();
    for entry in record {
        found.push((entry.place, bytes_of(entry.sectors, SECTOR)?));
    }
    let mut extended = record.iter().filter(|entry| entry.is_extended());
    if let Some(outer) = extended.next() {
        logical_partitions(source, outer.sectors, &mut found)?;
    }
    if extended.next().is_some() {
        return Err(Error::format("the boot record has two extended partitions"));
    }
    Ok(found)
}

/// Each link of the chain has at most one partition, placed from the link, and one further link,
/// placed from the start of the extended partition.
fn logical_partitions(
    source: &dyn Source,
    outer: Sectors,
    found: &mut Vec<Partition>,
) -> Result<()> {
    let mut link = outer.first;
    let mut number = 5;
    let mut seen = Vec::new();
    loop {
        if seen.contains(&link) || seen.len() >= PARTITIONS_MAX {
            return Err(Error::format("the chain of logical partitions goes in circles"));
        }
        seen.push(link);
        let record = boot_record(source, link)?.ok_or_else(|| {
            Error::format(format!(
                "expected a boot record in sector {link}, where the chain of logical partitions \
                 goes on, found none"
            ))
        })?;
        let (links, partitions): (Vec<_>, Vec<_>) =
            record.into_iter().partition(BootEntry::is_extended);
        for entry in partitions {
            let sectors = Sectors { first: link + entry.sectors.first, ..entry.sectors };
            let inside = sectors.first >= outer.first
                && sectors.first + sectors.count <= outer.first + outer.count;
            if !inside {
                return Err(Error::format(format!(
                    "logical partition {number} lies outside the extended partition"
                )));
            }
            found.push((number, bytes_of(sectors, SECTOR)?));
            number += 1;
        }
        match links.first() {
            None => return Ok(()),
            Some(next) if next.sectors.first < outer.count => {
                link = outer.first + next.sectors.first;
            }
            Some(_) => {
                return Err(Error::format(
                    "the chain of logical partitions leaves the extended one",
                ));
            }
        }
    }
}

fn gpt_partitions(source: &dyn Source, size: u64) -> Result<Vec<Partition>> {
    let mut problem = None;
    for sector in SECTORS {
        match gpt_of(source, sector, size / sector) {
            Ok(found) => {
                return found
                    .into_iter()
                    .map(|(number, sectors)| Ok((number, bytes_of(sectors, sector)?)))
                    .collect();
            }
            // The more telling one: a table that is damaged, not one that is not there.
            Err(error) if problem.is_none() || is_worse(&error) => problem = Some(error),
            Err(_) => {}
        }
    }
    Err(problem.expect("there are sector sizes"))
}

fn is_worse(error: &Error) -> bool {
    error.kind() == crate::error::ErrorKind::Integrity
}

type Table = Vec<(u32, Sectors)>;

fn gpt_of(source: &dyn Source, sector: u64, sectors: u64) -> Result<Table> {
    let first = gpt_at(source, sector, 1, sectors);
    let place = match &first {
        Ok((header, _)) => header.other,
        Err(_) => sectors.saturating_sub(1),
    };
    let second = gpt_at(source, sector, place, sectors);
    match (first, second) {
        (Ok((one, table)), Ok((other, _))) if one.agrees_with(&other) => Ok(table),
        (Ok(_), Ok(_)) => Err(Error::integrity(
            "the two partition tables of the GPT contradict each other: mend them with a partition \
             editor, or name ranges of bytes with --select",
        )),
        (Ok((_, table)), Err(_)) | (Err(_), Ok((_, table))) => Ok(table),
        (Err(error), Err(_)) => Err(Error::new(
            error.kind(),
            format!("expected a GPT, as the boot record says, found none that is whole: {error}"),
        )),
    }
}

fn gpt_at(source: &dyn Source, sector: u64, own: u64, sectors: u64) -> Result<(GptHeader, Table)> {
    if own >= sectors {
        return Err(Error::format("the GPT points outside the source"));
    }
    let bytes = read(source, own * sector, sector)?;
    let header = GptHeader::parse(&bytes, own, sectors)?;
    let array = read(source, header.array * sector, header.array_bytes())?;
    let table = header.parse_array(&array)?;
    Ok((header, table))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::bundle::source::ImageSource;
    use crate::device::RamDevice;
    use crate::error::ErrorKind;
    use crate::format::partition::made_up::{boot_record, gpt_array, gpt_header};
    use crate::units::BlockSize;

    const SIZE: usize = 1 << 20;
    const LAST: u64 = SIZE as u64 / 512 - 1;

    fn source_of(bytes: Vec<u8>) -> ImageSource {
        ImageSource::new(Arc::new(RamDevice::from_bytes(bytes)), BlockSize::DEFAULT).expect("sized")
    }

    fn disk(sectors: &[(u64, &[u8])]) -> Vec<u8> {
        let mut bytes = vec![0; SIZE];
        for (sector, data) in sectors {
            bytes[*sector as usize * 512..][..data.len()].copy_from_slice(data);
        }
        bytes
    }

    fn gpt_disk() -> Vec<u8> {
        let array = gpt_array(&[(1, 40, 103), (3, 104, 111)]);
        let count = LAST + 1;
        disk(&[
            (0, &boot_record(&[(0xEE, 1, u32::MAX)])),
            (1, &gpt_header(1, LAST, 2, count, &array)),
            (2, &array),
            (LAST - 32, &array),
            (LAST, &gpt_header(LAST, 1, LAST - 32, count, &array)),
        ])
    }

    fn bytes(first: u64, count: u64) -> ByteRange {
        ByteRange::new(first * 512, count * 512)
    }

    #[test]
    fn a_gpt_gives_its_partitions_also_when_one_of_its_copies_is_damaged() {
        let expected = [(1, bytes(40, 64)), (3, bytes(104, 8))];
        assert_eq!(partitions(&source_of(gpt_disk())).expect("read"), expected);
        for damaged in [520, 1024, LAST as usize * 512 + 20] {
            let mut image = gpt_disk();
            image[damaged] ^= 1;
            assert_eq!(partitions(&source_of(image)).expect("the other copy"), expected);
        }
        let mut image = gpt_disk();
        image[520] ^= 1;
        image[LAST as usize * 512 + 20] ^= 1;
        let error = partitions(&source_of(image)).expect_err("both are damaged");
        assert!(error.to_string().contains("GPT"), "{error}");
    }

    #[test]
    fn two_gpts_that_contradict_each_other_are_refused() {
        let mut image = gpt_disk();
        let other = gpt_array(&[(1, 40, 50)]);
        let header = gpt_header(LAST, 1, LAST - 32, LAST + 1, &other);
        image[(LAST as usize - 32) * 512..][..other.len()].copy_from_slice(&other);
        image[LAST as usize * 512..][..512].copy_from_slice(&header);
        let error = partitions(&source_of(image)).expect_err("contradiction");
        assert_eq!(error.kind(), ErrorKind::Integrity);
        assert!(error.to_string().contains("contradict"), "{error}");
    }

    #[test]
    fn a_boot_record_gives_primary_and_logical_partitions() {
        let image = disk(&[
            (0, &boot_record(&[(0x83, 8, 8), (0x0F, 100, 100), (0x82, 16, 8)])),
            (100, &boot_record(&[(0x83, 4, 16), (0x05, 40, 60)])),
            (140, &boot_record(&[(0x83, 4, 8)])),
        ]);
        let expected = [
            (1, bytes(8, 8)),
            (2, bytes(100, 100)),
            (3, bytes(16, 8)),
            (5, bytes(104, 16)),
            (6, bytes(144, 8)),
        ];
        assert_eq!(partitions(&source_of(image)).expect("read"), expected);
    }

    #[test]
    fn chains_that_circle_or_leave_and_tables_that_lie_are_refused() {
        let outer = boot_record(&[(0x05, 100, 100)]);
        for image in [
            disk(&[(0, &outer), (100, &boot_record(&[(0x83, 4, 16), (0x05, 0, 60)]))]),
            disk(&[(0, &outer), (100, &boot_record(&[(0x83, 4, 16), (0x05, 200, 60)]))]),
            disk(&[(0, &outer), (100, &boot_record(&[(0x83, 90, 16)]))]),
            disk(&[(0, &outer)]),
            disk(&[(0, &boot_record(&[(0x83, 8, u32::MAX)]))]),
            disk(&[(0, &boot_record(&[(0xEE, 1, u32::MAX)]))]),
        ] {
            assert_eq!(partitions(&source_of(image)).expect_err("bad").kind(), ErrorKind::Format);
        }
        let none = partitions(&source_of(vec![0; SIZE])).expect_err("no table");
        assert_eq!(none.kind(), ErrorKind::Usage);
    }

    #[test]
    fn partitions_are_selected_in_whole_blocks_and_unknown_numbers_refused() {
        let image = disk(&[(0, &boot_record(&[(0x83, 9, 8)]))]);
        let source = source_of(image);
        let selected = select_partitions(&source, &[1]).expect("there");
        assert_eq!(selected, [ByteRange::new(4096, 8192)]);
        let refused = select_partitions(&source, &[1, 2]).expect_err("there is one");
        assert!(refused.to_string().contains("1: 4096 bytes at 4608"), "{refused}");
    }
}
