//! What has come of one request: each piece checked before it is placed.
//!
//! | a chunk | is refused |
//! |---|---|
//! | bytes or zeros | outside the request, empty, or of what has come already |
//! | block status | of another context, or a run without length |
//! | the last one | if a part of the request has not come and no error was said |
//!
//! Guarantees: a reply that is whole has brought every byte once. Does not know: sockets.

use std::ops::Range;

use crate::error::{Error, Result};
use crate::extent::{BlockRange, ByteRange, ExtentMap};
use crate::format::nbd as protocol;
use crate::limits::NBD_CHUNKS_MAX;

/// A run of block status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StatusRun {
    pub range: ByteRange,
    /// Reads as zeros, for certain.
    pub zero: bool,
}

/// What a request is to bring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asked {
    Bytes,
    /// Of the context by this number.
    Status(u32),
}

/// See the module.
#[derive(Debug)]
pub struct Reply {
    pub asked: Asked,
    pub range: ByteRange,
    /// Positions in the request.
    came: ExtentMap<()>,
    count: u64,
    chunks: u32,
    runs: Vec<StatusRun>,
    error: Option<(u32, String)>,
}

impl Reply {
    #[must_use]
    pub fn new(asked: Asked, range: ByteRange) -> Self {
        let came = ExtentMap::new();
        Self { asked, range, came, count: 0, chunks: 0, runs: Vec::new(), error: None }
    }

    /// Of every chunk, whatever it is.
    pub fn count_chunk(&mut self) -> Result<()> {
        self.chunks += 1;
        if self.chunks > NBD_CHUNKS_MAX {
            return Err(Error::format(format!(
                "expected at most {NBD_CHUNKS_MAX} chunks in an NBD reply, found more"
            )));
        }
        Ok(())
    }

    /// Bytes or zeros that come; where they belong in the request.
    pub fn place(&mut self, offset: u64, length: u64) -> Result<Range<usize>> {
        let inside = offset
            .checked_sub(self.range.offset)
            .filter(|start| start.checked_add(length).is_some_and(|end| end <= self.range.length));
        let start = match (self.asked, inside) {
            (Asked::Bytes, Some(start)) if length > 0 => start,
            _ => return Err(self.foreign("bytes", offset, length)),
        };
        let run = BlockRange::new(start, start + length);
        if self.came.overlapping(run).next().is_some() {
            return Err(self.foreign("the same bytes again", offset, length));
        }
        self.came.insert(run, ());
        self.count += length;
        let position = |at: u64| usize::try_from(at).expect("a request is small");
        Ok(position(run.start)..position(run.end))
    }

    /// Runs of a context, from the beginning of the range.
    pub fn status(&mut self, context: u32, runs: &[(u32, u32)]) -> Result<()> {
        if self.asked != Asked::Status(context) || !self.runs.is_empty() {
            return Err(Error::format(
                "expected the block status that was asked for, found another",
            ));
        }
        let mut at = self.range.offset;
        for (length, flags) in runs {
            // Only the last run may go on beyond what was asked for.
            if *length == 0 || at >= self.range.end() {
                return Err(Error::format("expected runs of block status, found impossible ones"));
            }
            let end = at.saturating_add(u64::from(*length)).min(self.range.end());
            let zero = flags & protocol::STATE_ZERO != 0;
            self.runs.push(StatusRun { range: ByteRange::new(at, end - at), zero });
            at = end;
        }
        Ok(())
    }

    pub fn failed(&mut self, number: u32, words: String) {
        self.error.get_or_insert((number, words));
    }

    /// The end of the reply: runs of status, an error of the server, or a breach of the protocol
    /// (the outer one).
    pub fn finish(self) -> Result<Result<Vec<StatusRun>>> {
        if let Some((number, words)) = &self.error {
            return Ok(Err(server_error(*number, words).at_offset(self.range.offset)));
        }
        let whole = match self.asked {
            Asked::Bytes => self.count == self.range.length,
            Asked::Status(_) => !self.runs.is_empty(),
        };
        if !whole {
            return Err(Error::format(format!(
                "expected an NBD reply with all of the {} bytes at {}, found less",
                self.range.length, self.range.offset
            )));
        }
        Ok(Ok(self.runs))
    }

    fn foreign(&self, what: &str, offset: u64, length: u64) -> Error {
        Error::format(format!(
            "expected an NBD reply to a request of {} bytes at {}, found {what}: {length} at \
             {offset}",
            self.range.length, self.range.offset
        ))
    }
}

fn server_error(number: u32, words: &str) -> Error {
    let number = i32::try_from(number).ok().filter(|number| *number > 0).unwrap_or(5);
    let source = std::io::Error::from_raw_os_error(number);
    let words = if words.is_empty() { String::new() } else { format!(" ({words})") };
    if number == protocol::ESHUTDOWN as i32 {
        return Error::link(format!(
            "the NBD server is being shut down, or has taken the export away{words}: run it again \
             when it is back"
        ));
    }
    Error::new(crate::error::ErrorKind::Device, format!("the NBD server says: {source}{words}"))
        .with_errno(number)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    fn bytes() -> Reply {
        Reply::new(Asked::Bytes, ByteRange::new(4096, 1000))
    }

    #[test]
    fn pieces_in_any_order_that_bring_every_byte_once_are_a_whole_reply() {
        let mut reply = bytes();
        assert_eq!(reply.place(4596, 500).expect("inside"), 500..1000);
        assert_eq!(reply.place(4096, 400).expect("inside"), 0..400);
        assert_eq!(reply.place(4496, 100).expect("inside"), 400..500);
        assert_eq!(reply.finish().expect("whole").expect("no error"), []);
    }

    #[test]
    fn what_was_not_asked_for_comes_twice_or_does_not_come_is_refused() {
        let cases =
            [(4095, 10), (4096, 1001), (5096, 1), (u64::MAX, 2), (4096, u64::MAX), (4096, 0)];
        for (offset, length) in cases {
            assert!(bytes().place(offset, length).is_err(), "{length} at {offset}");
        }
        let mut reply = bytes();
        reply.place(4096, 500).expect("inside");
        assert!(reply.place(4595, 100).is_err(), "a byte twice");
        assert_eq!(reply.finish().expect_err("half").kind(), ErrorKind::Format);
        let mut status = Reply::new(Asked::Status(1), ByteRange::new(0, 4096));
        assert!(status.place(0, 512).is_err(), "bytes for a status");
        assert!(bytes().status(1, &[(512, 0)]).is_err(), "a status for bytes");
    }

    #[test]
    fn only_what_is_said_to_read_as_zeros_is_zero() {
        let mut reply = Reply::new(Asked::Status(1), ByteRange::new(512, 4096));
        let (hole, zero) = (protocol::STATE_HOLE, protocol::STATE_ZERO);
        let runs = [(512, 0), (512, hole), (512, hole | zero), (512, zero), (9_000_000, 0)];
        reply.status(1, &runs).expect("well formed");
        let runs = reply.finish().expect("whole").expect("no error");
        let told: Vec<_> = runs.iter().map(|run| (run.range.offset, run.zero)).collect();
        assert_eq!(told, [(512, false), (1024, false), (1536, true), (2048, true), (2560, false)]);
        assert_eq!(runs[4].range.end(), 4608, "not beyond what was asked for");
    }

    #[test]
    fn a_status_of_another_context_twice_empty_or_too_long_is_refused() {
        let reply = || Reply::new(Asked::Status(1), ByteRange::new(0, 4096));
        for runs in [&[(0, 0)][..], &[(4096, 0), (1, 0)], &[(512, 0), (0, 0)]] {
            assert!(reply().status(1, runs).is_err(), "{runs:?}");
        }
        assert!(reply().status(2, &[(512, 0)]).is_err());
        let mut twice = reply();
        twice.status(1, &[(512, 0)]).expect("the first");
        assert!(twice.status(1, &[(512, 0)]).is_err());
        assert!(reply().finish().is_err(), "none");
    }

    #[test]
    fn an_error_of_the_server_is_told_with_its_number_and_a_shutdown_is_one_of_the_link() {
        let mut reply = bytes();
        reply.place(4096, 10).expect("inside");
        reply.failed(protocol::EIO, "a bad sector".into());
        reply.failed(protocol::EINVAL, "another".into());
        let error = reply.finish().expect("well formed").expect_err("said");
        assert_eq!((error.kind(), error.errno()), (ErrorKind::Device, Some(5)));
        assert!(error.to_string().contains("a bad sector"), "{error}");
        let mut reply = bytes();
        reply.failed(protocol::ESHUTDOWN, String::new());
        let error = reply.finish().expect("well formed").expect_err("said");
        assert_eq!(error.kind(), ErrorKind::Link);
    }

    #[test]
    fn endless_chunks_are_refused() {
        let mut reply = bytes();
        for _ in 0..NBD_CHUNKS_MAX {
            reply.count_chunk().expect("not too many");
        }
        assert!(reply.count_chunk().is_err());
    }
}
