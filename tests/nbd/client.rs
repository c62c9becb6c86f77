//! The client against our server, and against servers that lie, mix up, fall silent or go away.

#![expect(clippy::disallowed_methods, reason = "servers are threads on sockets")]

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use dualrestore::device::{Device, Stop};
use dualrestore::error::{ErrorKind, Result};
use dualrestore::extent::ByteRange;
use dualrestore::format::nbd as protocol;
use dualrestore::format::nbd::{ExportedCut, Included};
use dualrestore::nbd::{ExportTable, NbdDevice, Server, SocketWire};
use uuid::Uuid;

use crate::ram_service::{Pace, RamService};

const SIZE: u64 = 4 << 20;

/// Data, but for a hole of a quarter in the middle.
fn image(size: u64) -> Vec<u8> {
    let hole = size / 2..size / 4 * 3;
    (0..size).map(|at| if hole.contains(&at) { 0 } else { (at / 512 % 251) as u8 + 1 }).collect()
}

fn filled(size: u64, pace: Pace) -> RamService {
    let mut service = RamService::new(size, Pace::AtOnce);
    let image = image(size);
    for (at, piece) in (0..).step_by(1 << 16).zip(image.chunks(1 << 16)) {
        write(&service, at, piece);
    }
    service.pace = pace;
    service
}

fn write(service: &RamService, offset: u64, bytes: &[u8]) {
    use dualrestore::device::Payload;
    use dualrestore::volume::service::{BlockService, Command};
    let data = Payload::copy_of(bytes);
    let command = Command::Write { offset, data, force_unit_access: false };
    service.submit(command, Box::new(|outcome| drop(outcome.expect("memory takes it"))));
}

fn opened(socket: UnixStream) -> Result<NbdDevice> {
    let wire = SocketWire::new(OwnedFd::from(socket), Stop::default())?;
    NbdDevice::open(Box::new(wire), "db", false)
}

struct Fixture {
    service: Arc<RamService>,
    server: Server,
}

impl Fixture {
    fn new(service: RamService, description: &str) -> Self {
        let service = Arc::new(service);
        let exports = Arc::new(ExportTable::new());
        exports.insert("db", description, service.clone()).expect("a new name");
        Self { service, server: Server::new(exports) }
    }

    fn socket(&self) -> UnixStream {
        let (ours, theirs) = UnixStream::pair().expect("a socket pair");
        self.server.serve(OwnedFd::from(theirs), None).expect("admitted");
        ours
    }

    fn device(&self) -> NbdDevice {
        opened(self.socket()).expect("an export")
    }
}

fn read(device: &NbdDevice, offset: u64, length: usize) -> Result<Vec<u8>> {
    let mut bytes = vec![0xee; length];
    device.read_at(offset, &mut bytes).map(|()| bytes)
}

#[test]
fn many_threads_read_an_export_whole_whatever_the_order_of_answers() {
    for pace in [Pace::AtOnce, Pace::Elsewhere, Pace::Held] {
        let fixture = Fixture::new(filled(SIZE, pace), "");
        let device = fixture.device();
        assert_eq!((device.size(), device.sector_size()), (SIZE, 512));
        let image = image(SIZE);
        let done = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            let readers: Vec<_> = (0..8_u64)
                .map(|reader| {
                    let (device, image) = (&device, &image);
                    scope.spawn(move || {
                        for round in 0..16 {
                            let at = (reader * 7919 + round * 104_729) * 512 % (SIZE - 70_000);
                            let length = 512 * (1 + (reader + round) as usize % 128);
                            let bytes = read(device, at, length).expect("read");
                            assert!(bytes == image[at as usize..][..length], "{at}+{length}");
                        }
                    })
                })
                .collect();
            let releaser = scope.spawn(|| {
                while !done.load(std::sync::atomic::Ordering::Relaxed) {
                    fixture.service.release();
                    std::thread::sleep(Duration::from_micros(200));
                }
            });
            readers.into_iter().for_each(|reader| reader.join().expect("as it is"));
            done.store(true, std::sync::atomic::Ordering::Relaxed);
            releaser.join().expect("released");
        });
    }
}

#[test]
fn holes_are_known_from_block_status_and_nothing_else_counts_as_zero() {
    let fixture = Fixture::new(filled(SIZE, Pace::AtOnce), "");
    let device = fixture.device();
    let data = |at| device.next_data(at).expect("told");
    assert_eq!(data(0), Some(ByteRange::new(0, SIZE / 2)));
    assert_eq!(data(512), Some(ByteRange::new(512, SIZE / 2 - 512)));
    let second = ByteRange::new(SIZE / 4 * 3, SIZE / 4);
    assert_eq!(data(SIZE / 2), Some(second));
    assert_eq!(data(SIZE - 512), Some(ByteRange::new(SIZE - 512, 512)));
    assert_eq!((data(SIZE), data(0)), (None, Some(ByteRange::new(0, SIZE / 2))));
}

#[test]
fn requests_are_cut_to_what_the_server_takes() {
    for (sector, at, length) in [(4096, 512, 1024), (4096, 4000 / 512 * 512, 70_000 / 512 * 512)] {
        let mut service = filled(SIZE, Pace::AtOnce);
        service.sector_size = sector;
        let fixture = Fixture::new(service, "");
        let device = fixture.device();
        let bytes = read(&device, at, length).expect("read");
        assert!(bytes == image(SIZE)[at as usize..][..length]);
    }
    let fixture = Fixture::new(filled(SIZE, Pace::AtOnce), "");
    let device = fixture.device();
    assert_eq!(read(&device, SIZE - 512, 1024).expect_err("outside").kind(), ErrorKind::Usage);
    assert_eq!(device.write_at(0, &[0; 512]).expect_err("read only").errno(), Some(30));
}

#[test]
fn an_error_of_the_server_fails_its_read_and_no_other() {
    let mut service = filled(SIZE, Pace::Elsewhere);
    service.bad_byte = Some((100_000, 5));
    let fixture = Fixture::new(service, "");
    let device = fixture.device();
    let failed = read(&device, 65_536, 65_536).expect_err("a bad byte");
    assert_eq!((failed.kind(), failed.errno()), (ErrorKind::Device, Some(5)));
    let good = read(&device, 0, 65_536).expect("another place");
    assert!(good == image(SIZE)[..65_536]);
}

#[test]
fn an_export_that_is_taken_away_is_a_lost_link() {
    let fixture = Fixture::new(filled(SIZE, Pace::AtOnce), "");
    let device = fixture.device();
    read(&device, 0, 512).expect("there");
    fixture.server.exports().remove("db");
    for _ in 0..3 {
        let failed = read(&device, 0, 512).expect_err("gone");
        assert_eq!(failed.kind(), ErrorKind::Link, "{failed}");
    }
}

#[test]
fn an_export_says_whose_snapshot_it_is_or_nothing() {
    let cut = ExportedCut {
        volume: Uuid::from_u128(1),
        generation: 2,
        sequence: 3,
        snapshot: Uuid::from_u128(4),
        block_bytes: 4096,
        included: Included::Ranges(vec![ByteRange::new(0, 1 << 20)]),
    };
    let told = |description: &str| {
        let fixture = Fixture::new(filled(SIZE, Pace::AtOnce), description);
        opened(fixture.socket())
    };
    assert_eq!(told(&cut.text()).expect("ours").cut(), Some(&cut));
    assert_eq!(told("the ledger").expect("somebody's").cut(), None);
    let newer = cut.text().replace("cut 1", "cut 2");
    assert_eq!(told(&newer).expect_err("law 12").kind(), ErrorKind::Format);
}

#[test]
fn a_wish_to_stop_ends_reads_of_a_silent_server() {
    let fixture = Fixture::new(filled(SIZE, Pace::Held), "");
    let device = fixture.device();
    std::thread::scope(|scope| {
        let readers: Vec<_> = (0..4)
            .map(|at| {
                scope.spawn({
                    let device = &device;
                    move || read(device, at * 512, 512)
                })
            })
            .collect();
        while fixture.service.held() < 4 {
            std::thread::sleep(Duration::from_millis(1));
        }
        device.interrupt();
        for reader in readers {
            let ended = reader.join().expect("no panic").expect_err("stopped");
            assert_eq!(ended.kind(), ErrorKind::Interrupted);
        }
    });
    fixture.service.forget();
}

/// A server that says these bytes, whatever it hears, and goes away.
fn scripted(said: Vec<u8>) -> (UnixStream, JoinHandle<()>) {
    let (ours, mut theirs) = UnixStream::pair().expect("a socket pair");
    let server = std::thread::spawn(move || {
        // The client may have had enough already.
        let _taken = theirs.write_all(&said);
        let _ended = theirs.shutdown(std::net::Shutdown::Write);
        let _rest = theirs.read_to_end(&mut Vec::new());
    });
    (ours, server)
}

/// What our server says to a client that does these things one after the other.
fn conversation(device: &NbdDevice) -> Result<(Vec<u8>, Option<ByteRange>, Vec<u8>)> {
    let first = read(device, 512, 1024)?;
    let data = device.next_data(0)?;
    Ok((first, data, read(device, 0, 512)?))
}

/// All bytes of that conversation from the server to the client.
fn recorded() -> Vec<u8> {
    let fixture = Fixture::new(filled(8192, Pace::AtOnce), "the ledger");
    let (ours, mut between) = UnixStream::pair().expect("a socket pair");
    let mut server = fixture.socket();
    let mut to_server = server.try_clone().expect("a descriptor");
    let mut from_client = between.try_clone().expect("a descriptor");
    let up = std::thread::spawn(move || {
        let _until_the_client_goes = std::io::copy(&mut from_client, &mut to_server);
        let _ended = to_server.shutdown(std::net::Shutdown::Write);
    });
    let down = std::thread::spawn(move || {
        let mut said = Vec::new();
        let mut place = [0; 4096];
        while let Ok(count) = server.read(&mut place) {
            if count == 0 {
                break;
            }
            said.extend_from_slice(&place[..count]);
            let _taken = between.write_all(&place[..count]);
        }
        said
    });
    let device = opened(ours).expect("an export");
    conversation(&device).expect("as it is");
    drop(device);
    up.join().expect("no panic");
    down.join().expect("no panic")
}

fn played(said: &[u8]) -> Result<(Vec<u8>, Option<ByteRange>, Vec<u8>)> {
    let (socket, server) = scripted(said.to_vec());
    let told = opened(socket).and_then(|device| conversation(&device));
    server.join().expect("no panic");
    told
}

#[test]
fn a_connection_cut_at_any_byte_is_lost_and_nothing_is_made_up() {
    let said = recorded();
    let whole = played(&said).expect("all of it");
    assert!(whole.0 == image(8192)[512..1536] && whole.2 == image(8192)[..512]);
    for length in 0..said.len() {
        let error = played(&said[..length]).expect_err("cut off");
        assert_eq!(error.kind(), ErrorKind::Link, "{length} bytes: {error}");
    }
}

#[test]
fn a_changed_byte_is_refused_or_is_one_of_the_data() {
    let said = recorded();
    let whole = played(&said).expect("all of it");
    let mut refused = 0;
    for at in 0..said.len() {
        for flip in [1, 0x80, 0xff] {
            let mut bytes = said.clone();
            bytes[at] ^= flip;
            match played(&bytes) {
                Err(error) => {
                    let usual = [ErrorKind::Link, ErrorKind::Format, ErrorKind::Usage];
                    // The type of a chunk may become that of an error.
                    let known = usual.contains(&error.kind()) || error.kind() == ErrorKind::Device;
                    assert!(known, "byte {at}: {error:?}");
                    refused += 1;
                }
                Ok(told) => {
                    let lengths = |told: &(Vec<u8>, _, Vec<u8>)| (told.0.len(), told.2.len());
                    assert_eq!(lengths(&told), lengths(&whole), "byte {at}");
                }
            }
        }
    }
    assert!(refused > 600, "most of what is not data: {refused}");
}

/// What a server says that knows `size` bytes and, if it is `structured`, chunks.
fn entered(size: u64, structured: bool) -> Vec<u8> {
    let reply = |option, kind, body: &[u8]| {
        [&protocol::option_reply(option, kind, body.len() as u32)[..], body].concat()
    };
    let refused = protocol::REP_ERR_UNSUP;
    let export = [&[0, 0][..], &size.to_be_bytes(), &[0, 1]].concat();
    let kind = if structured { protocol::REP_ACK } else { refused };
    let mut said = protocol::greeting().to_vec();
    said.extend(reply(protocol::OPT_STRUCTURED_REPLY, kind, &[]));
    if structured {
        said.extend(reply(protocol::OPT_SET_META_CONTEXT, refused, &[]));
    }
    said.extend(reply(protocol::OPT_GO, protocol::REP_INFO, &export));
    said.extend(reply(protocol::OPT_GO, protocol::REP_ACK, &[]));
    said
}

fn data_chunk(cookie: u64, flags: u16, offset: u64, bytes: &[u8]) -> Vec<u8> {
    let length = 8 + bytes.len() as u32;
    let head = protocol::chunk_header(flags, protocol::REPLY_OFFSET_DATA, cookie, length);
    [&head[..], &offset.to_be_bytes(), bytes].concat()
}

fn hole_chunk(cookie: u64, flags: u16, offset: u64, length: u32) -> Vec<u8> {
    let head = protocol::chunk_header(flags, protocol::REPLY_OFFSET_HOLE, cookie, 12);
    [&head[..], &offset.to_be_bytes(), &length.to_be_bytes()].concat()
}

/// What a read of the second and third sector gives.
fn second_read(said: &[Vec<u8>], structured: bool) -> Result<Vec<u8>> {
    let (socket, server) = scripted([entered(8192, structured), said.concat()].concat());
    let told = opened(socket).and_then(|device| read(&device, 512, 1024));
    server.join().expect("no panic");
    told
}

#[test]
fn a_server_that_knows_neither_chunks_nor_status_is_read_too_and_has_no_holes() {
    let simple = [&protocol::simple_reply(1, 0)[..], &[7; 1024]].concat();
    assert_eq!(second_read(&[simple], false).expect("read"), [7; 1024]);
    let failed = second_read(&[protocol::simple_reply(1, 5).to_vec()], false);
    assert_eq!(failed.expect_err("said").errno(), Some(5));
    let (socket, server) = scripted(entered(8192, true));
    let device = opened(socket).expect("an export");
    assert_eq!(device.next_data(512).expect("known"), Some(ByteRange::new(512, 7680)));
    drop(device);
    server.join().expect("no panic");
}

#[test]
fn a_reply_in_pieces_and_holes_is_put_together() {
    let done = protocol::REPLY_FLAG_DONE;
    let told = second_read(
        &[
            data_chunk(1, 0, 1400, &[2; 136]),
            hole_chunk(1, 0, 612, 788),
            data_chunk(1, 0, 512, &[1; 100]),
            protocol::chunk_header(done, protocol::REPLY_NONE, 1, 0).to_vec(),
        ],
        true,
    );
    let expected = [&[1; 100][..], &[0; 788], &[2; 136]].concat();
    assert_eq!(told.expect("whole"), expected);
}

#[test]
fn replies_of_several_requests_mixed_with_each_other_reach_their_own() {
    let (ours, mut theirs) = UnixStream::pair().expect("a socket pair");
    let server = std::thread::spawn(move || {
        theirs.write_all(&entered(8192, true)).expect("taken");
        // Flags, three options and two requests: their lengths are known.
        let mut heard = vec![0; 4 + 16 + (16 + 4 + 2 + 4 + 4 + 15) + (16 + 4 + 2 + 2 + 4)];
        theirs.read_exact(&mut heard).expect("said");
        let mut requests = vec![0; 2 * protocol::REQUEST_BYTES];
        theirs.read_exact(&mut requests).expect("said");
        let offset = |cookie: u64| {
            let at = if requests[15] == cookie as u8 { 0 } else { protocol::REQUEST_BYTES };
            u64::from_be_bytes(requests[at + 16..at + 24].try_into().expect("eight bytes"))
        };
        let done = protocol::REPLY_FLAG_DONE;
        let value = |cookie| offset(cookie) as u8 / 2 + 1;
        let said = [
            data_chunk(2, 0, offset(2), &[value(2); 256]),
            data_chunk(1, 0, offset(1) + 256, &[value(1); 256]),
            hole_chunk(2, done, offset(2) + 256, 256),
            data_chunk(1, done, offset(1), &[value(1); 256]),
        ];
        theirs.write_all(&said.concat()).expect("taken");
        let _until_it_goes = theirs.read_to_end(&mut Vec::new());
    });
    let device = opened(ours).expect("an export");
    std::thread::scope(|scope| {
        let readers: Vec<_> = [64_u64, 0]
            .map(|sector| {
                let device = &device;
                scope.spawn(move || read(device, sector, 512).expect("read"))
            })
            .into_iter()
            .map(|reader| reader.join().expect("no panic"))
            .collect();
        for (bytes, value) in readers.iter().zip([33, 1]) {
            assert_eq!(bytes[..256], [value; 256]);
            assert!(bytes[256..] == [value; 256] || bytes[256..] == [0; 256]);
        }
    });
    drop(device);
    server.join().expect("no panic");
}

#[test]
fn replies_that_nobody_asked_for_or_that_cannot_be_are_refused_before_they_are_used() {
    let done = protocol::REPLY_FLAG_DONE;
    let head = |kind, length| protocol::chunk_header(done, kind, 1, length).to_vec();
    let cases: Vec<(&str, Vec<Vec<u8>>)> = vec![
        ("another cookie", vec![data_chunk(2, done, 512, &[1; 1024])]),
        ("before the request", vec![data_chunk(1, done, 511, &[1; 1024])]),
        ("after it", vec![data_chunk(1, done, 513, &[1; 1024])]),
        ("a hole after it", vec![hole_chunk(1, done, 512, 1025)]),
        ("an endless hole", vec![hole_chunk(1, done, u64::MAX, u32::MAX)]),
        ("an empty hole", vec![hole_chunk(1, 0, 512, 0)]),
        ("twice", vec![hole_chunk(1, 0, 512, 1024), data_chunk(1, done, 512, &[1; 512])]),
        ("half of it", vec![data_chunk(1, done, 512, &[1; 512])]),
        ("nothing", vec![head(protocol::REPLY_NONE, 0)]),
        ("nothing, with a body", vec![head(protocol::REPLY_NONE, 4)]),
        ("bytes without bytes", vec![head(protocol::REPLY_OFFSET_DATA, 8)]),
        ("4 GiB", vec![head(protocol::REPLY_OFFSET_DATA, u32::MAX), vec![0; 100]]),
        ("a long hole header", vec![head(protocol::REPLY_OFFSET_HOLE, 16)]),
        ("a status", vec![head(protocol::REPLY_BLOCK_STATUS, 12), vec![0; 12]]),
        ("an endless status", vec![head(protocol::REPLY_BLOCK_STATUS, u32::MAX)]),
        ("an endless error", vec![head(protocol::REPLY_ERROR, u32::MAX)]),
        ("an error cut off", vec![head(protocol::REPLY_ERROR, 6), vec![0, 0, 0, 5, 0, 9]]),
        ("an unknown chunk", vec![head(99, 0)]),
        ("a simple reply", vec![[&protocol::simple_reply(1, 0)[..], &[1; 1024]].concat()]),
        ("other bytes", vec![vec![0x55; 64]]),
    ];
    for (what, said) in cases {
        let error = second_read(&said, true).expect_err(what);
        assert_eq!(error.kind(), ErrorKind::Format, "{what}: {error}");
    }
    let chunk = second_read(&[data_chunk(1, done, 512, &[1; 1024])], false);
    assert_eq!(chunk.expect_err("not agreed on").kind(), ErrorKind::Format);
}
