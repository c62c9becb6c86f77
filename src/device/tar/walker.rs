//! The members of a tar archive, one after the other, as they come.
//!
//! | found where a header should be | |
//! |---|---|
//! | a header | its member |
//! | two empty records, or one and the end of the stream | the end |
//! | nothing | cut off |
//! | anything else | the next record that is a header is looked for; `damaged` counts |
//!
//! Guarantees: memory is bounded by `TAR_EXTENDED_BYTES_MAX`, whatever the archive states; a
//! payload ends where its header says, or where the stream does.
//! Does not know: bundles, where the bytes come from.

use crate::device::stream::ByteStream;
use crate::error::{Error, Result};
use crate::format::tar::{
    Extended, Header, Kind, RECORD_BYTES, Record, is_empty, is_header, padded, parse_extended,
    parse_header, split_path,
};
use crate::limits::{TAR_EXTENDED_BYTES_MAX, TAR_MEMBERS_MAX, TAR_TRAILING_BYTES_MAX};

const RECORD: u64 = RECORD_BYTES as u64;

/// A file of the archive; its payload comes next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TarMember {
    /// The directory that it lies in as the archive says; empty at the top.
    pub folder: String,
    pub name: String,
    pub bytes: u64,
    /// Where its payload begins in the archive.
    pub position: u64,
}

/// What comes next in an archive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    Member(TarMember),
    End,
    /// The stream ended before the archive did.
    CutOff,
}

/// See the module.
#[derive(Debug)]
pub struct TarWalker {
    stream: Box<dyn ByteStream>,
    position: u64,
    /// Bytes of the payload that have not been read, and of its padding.
    left: u64,
    padding: u64,
    members: u64,
    damaged: u64,
    ended: bool,
}

impl TarWalker {
    #[must_use]
    pub fn new(stream: Box<dyn ByteStream>) -> Self {
        Self { stream, position: 0, left: 0, padding: 0, members: 0, damaged: 0, ended: false }
    }

    /// Places at which something else than a header was found.
    #[must_use]
    pub fn damaged(&self) -> u64 {
        self.damaged
    }

    /// Bytes of the payload that have not been read.
    #[must_use]
    pub fn left(&self) -> u64 {
        self.left
    }

    /// Reads on in the payload; how much it was, less than asked for at its end, or where the
    /// stream is cut off.
    pub fn read(&mut self, buffer: &mut [u8]) -> Result<usize> {
        let most = usize::try_from(self.left).map_or(buffer.len(), |left| left.min(buffer.len()));
        let read = self.stream.fill(&mut buffer[..most])?;
        self.left -= read as u64;
        self.position += read as u64;
        Ok(read)
    }

    /// Leaves the rest of the payload out and reads the next header.
    pub fn next_member(&mut self) -> Result<Step> {
        let rest = self.left + self.padding;
        let skipped = self.stream.skip(rest)?;
        self.position += skipped;
        (self.left, self.padding) = (0, 0);
        if skipped < rest {
            self.ended = true;
            return Ok(Step::CutOff);
        }
        if self.ended {
            return Ok(Step::End);
        }
        let mut extended = Extended::default();
        loop {
            let Some(record) = self.header_record()? else { return Ok(Step::CutOff) };
            if is_empty(&record) {
                return self.end();
            }
            self.members += 1;
            if self.members > TAR_MEMBERS_MAX {
                return Err(Error::format(format!(
                    "expected a tar of at most {TAR_MEMBERS_MAX} members, found more"
                )));
            }
            let header = parse_header(&record)?;
            match header.kind {
                Kind::File => return Ok(Step::Member(self.member(header, extended)?)),
                Kind::Ignored => {
                    let rest = padded(header.bytes);
                    self.leave_out(rest)?;
                    extended = Extended::default();
                }
                Kind::Extended | Kind::ExtendedForAll | Kind::LongName => {
                    let Some(payload) = self.extended_payload(&header)? else {
                        return Ok(Step::CutOff);
                    };
                    self.extend(&mut extended, header.kind, &payload)?;
                }
            }
        }
    }

    fn extend(&mut self, extended: &mut Extended, kind: Kind, payload: &[u8]) -> Result<()> {
        if kind == Kind::LongName {
            let end = payload.iter().position(|byte| *byte == 0).unwrap_or(payload.len());
            extended.path = Some(String::from_utf8_lossy(&payload[..end]).into_owned());
            return Ok(());
        }
        match parse_extended(payload) {
            Ok(found) if kind == Kind::Extended => *extended = found,
            Ok(found) if found == Extended::default() => {}
            Ok(_) => {
                return Err(Error::format(
                    "expected no path or size for all members at once in the tar, found one",
                ));
            }
            // The plain header says the same of our own members.
            Err(error) if error.kind() == crate::error::ErrorKind::Integrity => self.damaged += 1,
            Err(error) => return Err(error),
        }
        Ok(())
    }

    fn member(&mut self, header: Header, extended: Extended) -> Result<TarMember> {
        let bytes = extended.bytes.unwrap_or(header.bytes);
        let (folder, name) = split_path(&extended.path.unwrap_or(header.path))?;
        self.left = bytes;
        self.padding = padded(bytes) - bytes;
        Ok(TarMember { folder, name, bytes, position: self.position })
    }

    fn extended_payload(&mut self, header: &Header) -> Result<Option<Vec<u8>>> {
        if header.bytes > TAR_EXTENDED_BYTES_MAX {
            return Err(Error::format(format!(
                "expected an extended header of at most {TAR_EXTENDED_BYTES_MAX} bytes in the tar, \
                 found {}",
                header.bytes
            )));
        }
        let length = usize::try_from(padded(header.bytes)).expect("checked above");
        let mut payload = vec![0; length];
        let read = self.stream.fill(&mut payload)?;
        self.position += read as u64;
        if read < length {
            self.ended = true;
            return Ok(None);
        }
        payload.truncate(header.bytes as usize);
        Ok(Some(payload))
    }

    fn leave_out(&mut self, bytes: u64) -> Result<()> {
        self.position += self.stream.skip(bytes)?;
        Ok(())
    }

    /// The next record that is a header or empty.
    fn header_record(&mut self) -> Result<Option<Record>> {
        let mut record = [0; RECORD_BYTES];
        let mut lost = false;
        loop {
            let read = self.stream.fill(&mut record)?;
            self.position += read as u64;
            if read < RECORD_BYTES {
                self.ended = true;
                return Ok(None);
            }
            // Empty records within what is damaged say nothing.
            if is_header(&record) || (is_empty(&record) && !lost) {
                return Ok(Some(record));
            }
            if self.members == 0 {
                return Err(not_a_tar(&record));
            }
            self.damaged += u64::from(!lost);
            lost = true;
        }
    }

    fn end(&mut self) -> Result<Step> {
        self.ended = true;
        let mut record = [0; RECORD_BYTES];
        let read = self.stream.fill(&mut record)?;
        if read == RECORD_BYTES && !is_empty(&record) {
            self.damaged += 1;
        }
        // So that who writes the padding of the last block is not told of a broken pipe.
        self.position += RECORD + self.stream.skip(TAR_TRAILING_BYTES_MAX)?;
        Ok(Step::End)
    }
}

fn not_a_tar(record: &Record) -> Error {
    let found = match record {
        [0x1f, 0x8b, ..] => "gzip: unpack it on the way, `gzip -dc FILE |`",
        [0x28, 0xb5, 0x2f, 0xfd, ..] => "zstd: unpack it on the way, `zstd -dc FILE |`",
        [0xfd, b'7', b'z', b'X', b'Z', ..] => "xz: unpack it on the way, `xz -dc FILE |`",
        _ => "other bytes; a raw image is merged by its path",
    };
    Error::format(format!("expected a bundle as a tar, found {found}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;
    use crate::format::tar::{encode_end, encode_member};
    use std::io::Cursor;

    fn archive() -> Vec<u8> {
        let mut bytes = encode_member(0, "a", 5000, 1);
        bytes.extend_from_slice(&[1; 5120]);
        let more = encode_member(bytes.len() as u64, "b", 10, 1);
        bytes.extend_from_slice(&more);
        bytes.extend_from_slice(&[2; 512]);
        let end = encode_end(bytes.len() as u64);
        bytes.extend_from_slice(&end);
        bytes
    }

    fn walk(bytes: Vec<u8>) -> (Vec<String>, Result<Step>, u64) {
        let mut walker = TarWalker::new(Box::new(Cursor::new(bytes)));
        let mut names = Vec::new();
        loop {
            match walker.next_member() {
                Ok(Step::Member(member)) => names.push(member.name),
                end => return (names, end, walker.damaged()),
            }
        }
    }

    #[test]
    fn every_truncation_is_told_from_the_end() {
        let whole = archive();
        let (names, end, _) = walk(whole.clone());
        assert_eq!((names.len(), end.expect("whole")), (2, Step::End));
        let last = whole.iter().rposition(|byte| *byte != 0).expect("a last byte") + 1;
        for length in 1..last {
            let (_, end, _) = walk(whole[..length].to_vec());
            assert_eq!(end.expect("no error"), Step::CutOff, "{length} bytes");
        }
    }

    #[test]
    fn a_damaged_header_costs_its_member_only() {
        let mut bytes = archive();
        bytes[512] = b'!';
        let (names, end, damaged) = walk(bytes.clone());
        assert_eq!((names, end.expect("whole")), (vec!["a".into(), "b".into()], Step::End));
        assert_eq!(damaged, 1, "the filler");
        bytes[4096 - 512] ^= 1;
        let (names, end, _) = walk(bytes);
        assert_eq!((names, end.expect("whole")), (vec!["b".into()], Step::End));
    }

    #[test]
    fn what_is_no_tar_is_named() {
        for (bytes, words) in [
            ([&[0x1f, 0x8b][..], &[1; 600]].concat(), "gzip"),
            ([&[0x28, 0xb5, 0x2f, 0xfd][..], &[1; 600]].concat(), "zstd"),
            (vec![7; 600], "other bytes"),
        ] {
            let refused = walk(bytes).1.expect_err("refused");
            assert_eq!(refused.kind(), ErrorKind::Format);
            assert!(refused.to_string().contains(words), "{refused}");
        }
    }

    #[test]
    fn an_extended_header_cannot_ask_for_much_memory() {
        let mut bytes = encode_member(0, "a", 0, 1);
        let large = format!("{:011o}\0", TAR_EXTENDED_BYTES_MAX + 1);
        bytes[124..136].copy_from_slice(large.as_bytes());
        bytes[148..156].fill(b' ');
        let sum: u32 = bytes[..512].iter().map(|byte| u32::from(*byte)).sum();
        bytes[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        assert_eq!(walk(bytes).1.expect_err("refused").kind(), ErrorKind::Format);
    }
}
