//! The link's frames to and from bytes, and the requests of an NBD client.

use std::cell::RefCell;
use std::sync::Arc;

use dualrestore::device::AlignedBuffer;
use dualrestore::error::{Error, Result};
use dualrestore::extent::ByteRange;
use dualrestore::format::frames::{Frame, HEADER_BYTES, Header, Message};
use dualrestore::format::nbd::{CMD_READ, OPT_GO, OPTION_MAGIC, REQUEST_MAGIC};
use dualrestore::nbd::{Event, ExportTable, Session, Tls};
use dualrestore::volume::service::{
    BlockService, Command, Completion, StatusContext, StatusExtent,
};

use crate::measured;

const BLOCK: usize = 4096;
const COUNT: u64 = 100;

fn write(sequence: u64, bytes: &[u8]) -> Frame<&[u8]> {
    Frame::Message(Message::Write { sequence, offset: sequence * BLOCK as u64, data: bytes })
}

fn encoded(frame: impl Fn(u64) -> Frame<&'static [u8]>) -> Vec<u8> {
    let mut out = Vec::new();
    for sequence in 1..=COUNT {
        frame(sequence).encode(sequence as u8, &mut out);
    }
    out
}

static BYTES: [u8; BLOCK] = [0x5a; BLOCK];

/// Mirrored writes of 4 KiB, ready to be sent.
pub fn frame_encode() -> u64 {
    let room = RefCell::new(Vec::with_capacity(COUNT as usize * (BLOCK + HEADER_BYTES)));
    measured(&|| {
        let mut out = room.borrow_mut();
        for sequence in 1..=COUNT {
            write(sequence, &BYTES).encode(sequence as u8, &mut out);
        }
        out.len() as u64
    })
}

/// Calls `seen` with each frame; returns the sum of what it says.
fn decode(mut stream: &[u8], seen: impl Fn(Frame<&[u8]>) -> u64) -> u64 {
    let (mut count, mut sum) = (1, 0);
    while let Some((head, rest)) = stream.split_first_chunk::<HEADER_BYTES>() {
        let header = Header::decode(head, count).expect("our own frame");
        let (payload, rest) = rest.split_at(header.payload_length as usize);
        let frame = if header.carries_blocks() {
            Frame::decode_blocks(&header, payload)
        } else {
            Frame::decode(&header, payload)
        };
        sum += seen(frame.expect("our own frame"));
        count = count.wrapping_add(1);
        stream = rest;
    }
    sum
}

/// The same, as they arrive at the backup.
pub fn frame_decode() -> u64 {
    let stream = encoded(|sequence| write(sequence, &BYTES));
    measured(&|| {
        decode(&stream, |frame| match frame {
            Frame::Message(Message::Write { data, .. }) => data.len() as u64,
            _ => 0,
        })
    })
}

/// Acknowledgements, as they arrive at the primary.
pub fn frame_decode_small() -> u64 {
    let stream = encoded(|sequence| Frame::Message(Message::Applied { sequence }));
    measured(&|| {
        decode(&stream, |frame| match frame {
            Frame::Message(Message::Applied { sequence }) => sequence,
            _ => 0,
        })
    })
}

/// A volume of zeros; reads are answered at once.
struct Zeros;

impl BlockService for Zeros {
    fn size(&self) -> u64 {
        1 << 30
    }

    fn sector_size(&self) -> u32 {
        512
    }

    fn preferred_size(&self) -> u32 {
        4096
    }

    fn read_only(&self) -> bool {
        true
    }

    fn contexts(&self) -> Vec<StatusContext> {
        Vec::new()
    }

    fn read_now(&self, _range: ByteRange, buffer: &mut [u8]) -> Option<Result<()>> {
        buffer.fill(0);
        Some(Ok(()))
    }

    fn submit(&self, command: Command, completion: Completion) {
        completion(match command {
            Command::Read { range } => Ok(Some(AlignedBuffer::zeroed(range.length as usize))),
            _ => Err(Error::usage("expected a read")),
        });
    }

    fn status(
        &self,
        _context: StatusContext,
        _range: ByteRange,
        _limit: usize,
    ) -> Result<Vec<StatusExtent>> {
        Err(Error::usage("expected a read"))
    }
}

fn give(session: &mut Session, bytes: &[u8]) {
    let space = session.space();
    space[..bytes.len()].copy_from_slice(bytes);
    session.received(bytes.len());
}

/// A session after its handshake, and 100 reads of 512 bytes that arrive together.
fn reading_session() -> (Session, Vec<u8>) {
    let exports = Arc::new(ExportTable::new());
    exports.insert("v", "", Arc::new(Zeros)).expect("a new name");
    let mut session = Session::new(exports, Tls::Off);
    let mut hello = vec![0, 0, 0, 3];
    hello.extend_from_slice(&OPTION_MAGIC.to_be_bytes());
    hello.extend_from_slice(&OPT_GO.to_be_bytes());
    hello.extend_from_slice(&[0, 0, 0, 6, 0, 0, 0, 0, 0, 0]);
    give(&mut session, &hello);
    assert!(session.next_event().is_none(), "a handshake is answered by the session itself");
    session.sent(session.pending());
    let mut requests = Vec::new();
    for cookie in 0..COUNT {
        requests.extend_from_slice(&REQUEST_MAGIC.to_be_bytes());
        requests.extend_from_slice(&0u16.to_be_bytes());
        requests.extend_from_slice(&CMD_READ.to_be_bytes());
        requests.extend_from_slice(&cookie.to_be_bytes());
        requests.extend_from_slice(&(cookie * 512).to_be_bytes());
        requests.extend_from_slice(&512u32.to_be_bytes());
    }
    (session, requests)
}

/// Requests parsed, checked, answered in place, and the replies sent.
pub fn nbd_requests() -> u64 {
    let (session, requests) = reading_session();
    let session = RefCell::new(session);
    measured(&|| {
        let mut session = session.borrow_mut();
        give(&mut session, &requests);
        let mut answered = 0;
        while let Some(event) = session.next_event() {
            let Event::Request { ticket, .. } = event else { continue };
            let unanswered = session.answer_in_place(ticket, |buffer| {
                buffer.fill(0);
                true
            });
            answered += u64::from(unanswered.is_none());
        }
        let pending = session.pending();
        session.sent(pending);
        answered
    })
}
