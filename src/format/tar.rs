//! Tar archives: what we write (POSIX pax, every payload at a multiple of 4096) and what we read
//! (ustar, pax and GNU headers, as GNU tar and Python write them).
//!
//! Guarantees: parsing never allocates more than it was given; what could mean bytes elsewhere
//! (links, sparse files, devices, several volumes) is refused by name; a path that parsed has no
//! `..`, is not absolute, and is never used to open anything.
//! Does not know: files, bundles.

use crate::error::{Error, Result};

/// The unit of a tar archive.
pub const RECORD_BYTES: usize = 512;
/// What our payloads begin at a multiple of, so that `O_DIRECT` can read them.
pub const PAYLOAD_ALIGNMENT: u64 = 4096;

pub type Record = [u8; RECORD_BYTES];

const RECORD: u64 = RECORD_BYTES as u64;
const SIZE_AT: std::ops::Range<usize> = 124..136;
const CHECKSUM_AT: std::ops::Range<usize> = 148..156;
const KIND_AT: usize = 156;
const MAGIC_AT: std::ops::Range<usize> = 257..265;
const PREFIX_AT: std::ops::Range<usize> = 345..500;
const POSIX: &[u8; 8] = b"ustar\x0000";
const GNU: &[u8; 8] = b"ustar  \0";
/// Largest size that twelve octal digits with their end can state.
const OCTAL_MAX: u64 = (1 << 33) - 1;

/// `bytes` rounded up to whole records.
#[must_use]
pub const fn padded(bytes: u64) -> u64 {
    bytes.next_multiple_of(RECORD)
}

/// The headers of a file of so many bytes, in an archive that has come to `position` (a multiple
/// of 512). Its payload, which follows, begins at a multiple of `PAYLOAD_ALIGNMENT`.
#[must_use]
pub fn encode_member(position: u64, name: &str, bytes: u64, modified_s: u64) -> Vec<u8> {
    assert!(position.is_multiple_of(RECORD), "an archive consists of records");
    assert!(name.len() <= 100 && bytes <= OCTAL_MAX, "our members fit the plain header");
    // Extended header, its records, and the plain header end where the payload begins.
    let after = (position + 3 * RECORD).next_multiple_of(PAYLOAD_ALIGNMENT);
    let filler = (after - position - 2 * RECORD) as usize;
    let mut headers = header(b"PaxHeaders/align", filler as u64, b'x', modified_s).to_vec();
    // One record of the very length: digits, space, key, equals sign, dots, line end.
    let mut record = format!("{filler} comment=").into_bytes();
    record.resize(filler - 1, b'.');
    record.push(b'\n');
    headers.extend_from_slice(&record);
    headers.extend_from_slice(&header(name.as_bytes(), bytes, b'0', modified_s));
    headers
}

/// The end of an archive that has come to `position`: two empty records or more, so that it is
/// whole pages.
#[must_use]
pub fn encode_end(position: u64) -> Vec<u8> {
    let end = (position + 2 * RECORD).next_multiple_of(PAYLOAD_ALIGNMENT);
    vec![0; (end - position) as usize]
}

fn header(name: &[u8], bytes: u64, kind: u8, modified_s: u64) -> Record {
    let mut record = [0; RECORD_BYTES];
    record[..name.len()].copy_from_slice(name);
    record[100..108].copy_from_slice(b"0000644\0");
    record[108..116].copy_from_slice(b"0000000\0");
    record[116..124].copy_from_slice(b"0000000\0");
    record[SIZE_AT].copy_from_slice(format!("{bytes:011o}\0").as_bytes());
    let modified = format!("{:011o}\0", modified_s.min(OCTAL_MAX));
    record[136..148].copy_from_slice(modified.as_bytes());
    record[KIND_AT] = kind;
    record[MAGIC_AT].copy_from_slice(POSIX);
    let sum = checksum(&record);
    record[CHECKSUM_AT].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    record
}

/// The sum of all bytes, those of the checksum itself as spaces.
fn checksum(record: &Record) -> u32 {
    let plain: u32 = record.iter().map(|byte| u32::from(*byte)).sum();
    let own: u32 = record[CHECKSUM_AT].iter().map(|byte| u32::from(*byte)).sum();
    plain - own + 8 * u32::from(b' ')
}

/// What a header announces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    File,
    /// A directory, or the label of the archive: nothing in it concerns us.
    Ignored,
    /// Extended headers of pax, for the next member, or for all.
    Extended,
    ExtendedForAll,
    /// GNU: the payload is the name of the next member.
    LongName,
}

/// A header that was understood.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    pub path: String,
    /// Of its payload.
    pub bytes: u64,
    pub kind: Kind,
}

/// Whether a record is empty: two of them end an archive.
#[must_use]
pub fn is_empty(record: &Record) -> bool {
    record.iter().all(|byte| *byte == 0)
}

/// Whether a record is a header as far as its magic and checksum say.
#[must_use]
pub fn is_header(record: &Record) -> bool {
    let magic = &record[MAGIC_AT];
    (magic == POSIX || magic == GNU)
        && number(&record[CHECKSUM_AT]) == Some(u64::from(checksum(record)))
}

/// Reads a header. A kind of member that no bundle has is refused.
pub fn parse_header(record: &Record) -> Result<Header> {
    if !is_header(record) {
        return Err(Error::integrity(
            "expected the header of a tar member, found other bytes: the archive is damaged, or \
             it is no tar",
        ));
    }
    let mut path = text(&record[..100]);
    if &record[MAGIC_AT] == POSIX && record[PREFIX_AT.start] != 0 {
        path = format!("{}/{path}", text(&record[PREFIX_AT]));
    }
    let refused = |what: &str| {
        Error::format(format!(
            "expected plain files in the tar, found {what} ({path:?}): make it of the bundle's \
             directory with `tar --format=pax -cf`"
        ))
    };
    let kind = match record[KIND_AT] {
        b'0' | 0 | b'7' => Kind::File,
        b'5' | b'V' => Kind::Ignored,
        b'x' => Kind::Extended,
        b'g' => Kind::ExtendedForAll,
        b'L' => Kind::LongName,
        b'1' => return Err(refused("a hard link")),
        b'2' | b'K' => return Err(refused("a symbolic link")),
        b'3' | b'4' => return Err(refused("a device")),
        b'6' => return Err(refused("a named pipe")),
        b'S' => return Err(refused("a sparse file")),
        b'M' => return Err(refused("a part of a file that began in another archive")),
        other => return Err(refused(&format!("a member of unknown kind {other:#04x}"))),
    };
    let bytes = number(&record[SIZE_AT])
        .filter(|bytes| *bytes <= i64::MAX as u64)
        .ok_or_else(|| refused("an impossible size"))?;
    // A directory may state a size that is the room it took; nothing follows it.
    let bytes = if record[KIND_AT] == b'5' { 0 } else { bytes };
    Ok(Header { path, bytes, kind })
}

/// What of an extended header concerns us.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Extended {
    pub path: Option<String>,
    pub bytes: Option<u64>,
}

/// Reads the records of an extended header.
pub fn parse_extended(mut records: &[u8]) -> Result<Extended> {
    let mut found = Extended::default();
    let malformed = || Error::integrity("an extended header of the tar is damaged");
    while !records.is_empty() {
        if records.iter().all(|byte| *byte == 0) {
            break;
        }
        let space = records.iter().take(20).position(|byte| *byte == b' ');
        let space = space.ok_or_else(malformed)?;
        let length = std::str::from_utf8(&records[..space]).ok();
        let length: usize = length.and_then(|text| text.parse().ok()).ok_or_else(malformed)?;
        let record = records.get(space + 1..length).ok_or_else(malformed)?;
        let record = record.strip_suffix(b"\n").ok_or_else(malformed)?;
        let equals = record.iter().position(|byte| *byte == b'=').ok_or_else(malformed)?;
        let (key, value) = (&record[..equals], &record[equals + 1..]);
        match key {
            b"path" => found.path = Some(String::from_utf8_lossy(value).into_owned()),
            b"size" => {
                let bytes = std::str::from_utf8(value).ok().and_then(|text| text.parse().ok());
                let bytes = bytes.filter(|bytes| *bytes <= i64::MAX as u64);
                found.bytes = Some(bytes.ok_or_else(malformed)?);
            }
            _ if key.starts_with(b"GNU.sparse.") => {
                return Err(Error::format(
                    "expected plain files in the tar, found a sparse file: make the tar without \
                     --sparse",
                ));
            }
            _ => {}
        }
        records = &records[length..];
    }
    Ok(found)
}

/// A path as its directory and its name: `./` and doubled slashes left out. Refuses what leads
/// out of where it begins.
pub fn split_path(path: &str) -> Result<(String, String)> {
    let refused = || {
        Error::format(format!(
            "expected the plain name of a file in the tar, found {path:?}: make the tar of the \
             bundle's directory"
        ))
    };
    if path.starts_with('/') || path.contains('\0') {
        return Err(refused());
    }
    let parts: Vec<&str> =
        path.split('/').filter(|part| !part.is_empty() && *part != ".").collect();
    if parts.contains(&"..") {
        return Err(refused());
    }
    let (name, folder) = parts.split_last().ok_or_else(refused)?;
    Ok((folder.join("/"), (*name).to_owned()))
}

/// Bytes up to the first that is 0.
fn text(field: &[u8]) -> String {
    let end = field.iter().position(|byte| *byte == 0).unwrap_or(field.len());
    String::from_utf8_lossy(&field[..end]).into_owned()
}

/// A number in octal digits, or (the first bit set) in base 256.
fn number(field: &[u8]) -> Option<u64> {
    let (first, rest) = field.split_first()?;
    if first & 0x80 != 0 {
        let mut value = u64::from(first & 0x7f);
        for byte in rest {
            value = value.checked_mul(256)?.checked_add(u64::from(*byte))?;
        }
        return Some(value);
    }
    let digits = field.iter().skip_while(|byte| **byte == b' ');
    let digits: Vec<u8> = digits.take_while(|byte| !matches!(byte, 0 | b' ')).copied().collect();
    let text = std::str::from_utf8(&digits).ok()?;
    if text.is_empty() { Some(0) } else { u64::from_str_radix(text, 8).ok() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;
    use proptest::prelude::*;

    fn record(bytes: &[u8]) -> &Record {
        bytes.try_into().expect("a record")
    }

    #[test]
    fn payloads_begin_at_whole_pages_and_headers_read_back() {
        for position in (0..20u64).map(|n| n * 512) {
            let headers = encode_member(position, "seg-00000007.drs", 64 << 20, 1_700_000_000);
            assert!((position + headers.len() as u64).is_multiple_of(PAYLOAD_ALIGNMENT));
            let first = parse_header(record(&headers[..512])).expect("whole");
            assert_eq!(first.kind, Kind::Extended);
            let length = first.bytes as usize;
            assert_eq!(headers.len(), length + 1024, "the filler is whole records");
            let extended = parse_extended(&headers[512..512 + length]).expect("whole");
            assert_eq!(extended, Extended::default());
            let last = parse_header(record(&headers[512 + length..])).expect("whole");
            assert_eq!(
                (last.path.as_str(), last.bytes, last.kind),
                ("seg-00000007.drs", 64 << 20, Kind::File)
            );
            let end = encode_end(position);
            assert!(end.len() >= 1024 && is_empty(record(&end[..512])));
        }
    }

    #[test]
    fn every_flipped_bit_of_a_header_is_noticed_or_changes_nothing_of_use() {
        let good = header(b"manifest.json", 1234, b'0', 0);
        let expected = parse_header(&good).expect("whole");
        for bit in 0..good.len() * 8 {
            let mut bad = good;
            bad[bit / 8] ^= 1 << (bit % 8);
            if let Ok(found) = parse_header(&bad) {
                assert_eq!(found, expected, "bit {bit}");
            }
        }
    }

    #[test]
    fn members_that_lie_elsewhere_are_refused_by_name() {
        for (kind, words) in [
            (b'1', "hard link"),
            (b'2', "symbolic link"),
            (b'3', "device"),
            (b'6', "named pipe"),
            (b'S', "sparse"),
            (b'M', "another archive"),
            (b'Z', "unknown kind"),
        ] {
            let refused = parse_header(&header(b"seg", 0, kind, 0)).expect_err("refused");
            assert!(refused.to_string().contains(words), "{refused}");
        }
        let refused = parse_extended(b"22 GNU.sparse.major=1\n").expect_err("refused");
        assert_eq!(refused.kind(), ErrorKind::Format);
    }

    #[test]
    fn sizes_are_read_in_octal_and_in_base_256() {
        let mut large = header(b"seg", 0, b'0', 0);
        large[SIZE_AT].copy_from_slice(&[0x80, 0, 0, 0, 0, 0, 0, 4, 0, 0, 0, 0]);
        let sum = checksum(&large);
        large[CHECKSUM_AT].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        assert_eq!(parse_header(&large).expect("whole").bytes, 16 << 30);
        large[SIZE_AT].copy_from_slice(&[0xff; 12]);
        let sum = checksum(&large);
        large[CHECKSUM_AT].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        assert!(parse_header(&large).is_err(), "negative");
    }

    #[test]
    fn paths_that_lead_elsewhere_are_refused() {
        let split = |path: &str| split_path(path).map_err(|error| error.kind());
        let pair = |folder: &str, name: &str| Ok((folder.to_owned(), name.to_owned()));
        assert_eq!(split("a"), pair("", "a"));
        assert_eq!(split("./a"), pair("", "a"));
        assert_eq!(split("x//y/./a"), pair("x/y", "a"));
        for path in ["/a", "../a", "x/../../a", "", "./", "a\0b", "x/.."] {
            assert_eq!(split(path), Err(ErrorKind::Format), "{path:?}");
        }
    }

    #[test]
    fn extended_headers_give_path_and_size() {
        let found = parse_extended(b"12 path=a/b\n16 size=9999999\n19 comment=anything\n");
        assert!(found.is_err(), "a record that is shorter than it says");
        let found = parse_extended(b"12 path=a/b\n16 size=9999999\n20 comment=anything\n");
        let found = found.expect("whole");
        assert_eq!((found.path.as_deref(), found.bytes), (Some("a/b"), Some(9_999_999)));
        for bad in [&b"1"[..], b"5 a=b", b"99 a=b\n", b"3 a\n", b"0 a=b\n", b" a=b\n"] {
            assert!(parse_extended(bad).is_err(), "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_parsers_panic(
            mut bytes in prop::collection::vec(any::<u8>(), 512),
            records in prop::collection::vec(any::<u8>(), 0..200),
        ) {
            let _refused_or_not = parse_extended(&records);
            bytes[MAGIC_AT].copy_from_slice(POSIX);
            let mut header: Record = bytes.as_slice().try_into().expect("a record");
            let sum = checksum(&header);
            header[CHECKSUM_AT].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
            let _refused_or_not = parse_header(&header);
        }
    }
}
