//! Requests and their answers, without sockets.

use std::sync::atomic::Ordering;

use dualrestore::extent::ByteRange;
use dualrestore::format::nbd as protocol;
use dualrestore::nbd::Tls;
use dualrestore::volume::service::Command;

use crate::ram_service::{Pace, RamService};
use crate::session_driver::Driver;
use crate::wire::{self, Reader, Reply};

const SIZE: u64 = 1 << 20;

/// A session past its handshake, with what it sent so far forgotten.
fn entered(structured: bool) -> Driver {
    entered_with(RamService::new(SIZE, Pace::AtOnce), structured)
}

fn entered_with(service: RamService, structured: bool) -> Driver {
    let mut driver = Driver::with(service, Tls::Off);
    driver.feed(&wire::enter(b"db", structured));
    driver.sent.clear();
    driver
}

/// The one reply to the bytes.
fn reply(driver: &mut Driver, bytes: &[u8], data: usize) -> Reply {
    driver.sent.clear();
    driver.feed(bytes);
    let mut reader = Reader(&driver.sent);
    let reply = reader.reply(data);
    assert!(reader.0.is_empty(), "more than one reply");
    reply
}

fn ask(driver: &mut Driver, flags: u16, command: u16, offset: u64, length: u32) -> Reply {
    let data = if command == protocol::CMD_READ { length as usize } else { 0 };
    reply(driver, &wire::request(flags, command, 9, offset, length), data)
}

#[test]
fn what_is_written_is_read_back_in_either_style_of_reply() {
    for structured in [false, true] {
        let mut driver = entered(structured);
        let bytes: Vec<u8> = (0..4096).map(|at| at as u8).collect();
        let written = reply(&mut driver, &wire::write(0, 1, 8192, &bytes), 0);
        assert_eq!(written, Reply::Simple { cookie: 1, error: 0, bytes: vec![] });
        let read = ask(&mut driver, 0, protocol::CMD_READ, 8192, 4096);
        let expected = if structured {
            let body = [&8192u64.to_be_bytes()[..], &bytes].concat();
            Reply::Chunk { cookie: 9, done: true, kind: protocol::REPLY_OFFSET_DATA, body }
        } else {
            Reply::Simple { cookie: 9, error: 0, bytes: bytes.clone() }
        };
        assert_eq!(read, expected);
    }
}

#[test]
fn a_read_that_must_not_be_fragmented_is_one_chunk() {
    let mut driver = entered(true);
    let read = ask(&mut driver, protocol::CMD_FLAG_DF, protocol::CMD_READ, 0, 1 << 20);
    let Reply::Chunk { done: true, kind: protocol::REPLY_OFFSET_DATA, body, .. } = read else {
        panic!("{} is not one chunk of data", read.error())
    };
    assert_eq!(body.len(), (1 << 20) + 8);
}

#[test]
fn a_write_larger_than_what_is_gathered_arrives_whole() {
    let mut driver = entered_with(RamService::new(64 << 20, Pace::AtOnce), false);
    let bytes: Vec<u8> = (0..32u32 << 20).map(|at| (at >> 9) as u8).collect();
    assert_eq!(reply(&mut driver, &wire::write(0, 1, 512, &bytes), 0).error(), 0);
    assert!(driver.service.contents(ByteRange::new(512, 32 << 20)) == bytes);
    assert_eq!(driver.service.contents(ByteRange::new(0, 512)), [0; 512]);
}

#[test]
fn ranges_outside_the_volume_are_refused_with_the_error_of_their_command() {
    let mut driver = entered(false);
    let outside = [(SIZE, 512), (SIZE - 512, 1024), (u64::MAX - 511, 512), (u64::MAX, u32::MAX)];
    for (offset, length) in outside {
        for (command, error) in [
            (protocol::CMD_READ, protocol::EINVAL),
            (protocol::CMD_TRIM, protocol::EINVAL),
            (protocol::CMD_CACHE, protocol::EINVAL),
            (protocol::CMD_WRITE_ZEROES, protocol::ENOSPC),
        ] {
            let refused = ask(&mut driver, 0, command, offset, length);
            assert_eq!(refused.error(), error, "command {command}, {offset}+{length}");
        }
    }
    for offset in [SIZE, SIZE - 512, u64::MAX - 511, u64::MAX] {
        let refused = reply(&mut driver, &wire::write(0, 1, offset, &[1; 1024]), 0);
        assert_eq!(refused.error(), protocol::ENOSPC, "{offset}");
    }
    assert_eq!(ask(&mut driver, 0, protocol::CMD_READ, SIZE - 512, 512).error(), 0);
}

#[test]
fn a_range_that_is_not_a_multiple_of_the_sector_is_invalid_but_for_a_read() {
    let mut service = RamService::new(SIZE, Pace::AtOnce);
    service.sector_size = 4096;
    let mut driver = entered_with(service, true);
    for (offset, length) in [(512, 4096), (4096, 512), (1, 1), (0, 4095)] {
        let refused = ask(&mut driver, 0, protocol::CMD_TRIM, offset, length);
        assert_eq!(refused.error(), protocol::EINVAL, "{offset}+{length}");
        let payload = vec![1; length as usize];
        let refused = reply(&mut driver, &wire::write(0, 9, offset, &payload), 0);
        assert_eq!(refused.error(), protocol::EINVAL, "{offset}+{length}");
    }
    assert_eq!(driver.service.contents(ByteRange::new(0, SIZE)), vec![0; SIZE as usize]);
}

#[test]
fn a_read_of_any_bytes_is_answered_with_them() {
    let bytes: Vec<u8> = (0..16384u32).map(|at| (at % 251) as u8).collect();
    for structured in [false, true] {
        let mut service = RamService::new(SIZE, Pace::AtOnce);
        service.sector_size = 4096;
        let mut driver = entered_with(service, structured);
        assert_eq!(reply(&mut driver, &wire::write(0, 1, 4096, &bytes), 0).error(), 0);
        for (offset, length) in [(4097, 1), (4096, 511), (5000, 10_000), (8191, 2), (12_288, 1)] {
            let found = match ask(&mut driver, 0, protocol::CMD_READ, offset, length) {
                Reply::Simple { error: 0, bytes, .. } => bytes,
                Reply::Chunk { kind: protocol::REPLY_OFFSET_DATA, body, .. } => {
                    assert_eq!(body[..8], offset.to_be_bytes());
                    body[8..].to_vec()
                }
                other => panic!("{other:?}"),
            };
            let start = offset as usize - 4096;
            assert!(found == bytes[start..start + length as usize], "{offset}+{length}");
        }
    }
}

#[test]
fn a_request_of_no_bytes_succeeds_and_does_nothing() {
    for structured in [false, true] {
        let mut driver = entered(structured);
        for command in [
            protocol::CMD_READ,
            protocol::CMD_WRITE,
            protocol::CMD_TRIM,
            protocol::CMD_WRITE_ZEROES,
            protocol::CMD_CACHE,
        ] {
            assert_eq!(ask(&mut driver, 0, command, 512, 0).error(), 0, "command {command}");
        }
        let status = ask(&mut driver, 0, protocol::CMD_BLOCK_STATUS, 0, 0);
        assert_eq!(status.error(), protocol::EINVAL);
    }
}

#[test]
fn unknown_commands_and_flags_are_invalid_and_the_stream_stays_in_step() {
    for structured in [false, true] {
        let mut driver = entered(structured);
        for command in [8, 9, 100, 0xffff] {
            let refused = ask(&mut driver, 0, command, 0, 512);
            assert_eq!(refused.error(), protocol::EINVAL, "command {command}");
        }
        let allowed = [
            (protocol::CMD_READ, if structured { 0b101 } else { 0b1 }),
            (protocol::CMD_FLUSH, 0b1),
            (protocol::CMD_TRIM, 0b1),
            (protocol::CMD_CACHE, 0b1),
            (protocol::CMD_WRITE_ZEROES, 0b11),
        ];
        for (command, allowed) in allowed {
            let length = if command == protocol::CMD_FLUSH { 0 } else { 512 };
            for flag in (0..16).map(|bit| 1 << bit) {
                let expected = if flag & allowed == 0 { protocol::EINVAL } else { 0 };
                let error = ask(&mut driver, flag, command, 0, length).error();
                assert_eq!(error, expected, "command {command}, flag {flag:#x}");
            }
        }
        let refused = reply(&mut driver, &wire::write(0x10, 3, 0, &[1; 512]), 0);
        assert_eq!((refused.error(), refused.cookie()), (protocol::EINVAL, 3));
        assert_eq!(ask(&mut driver, 0, protocol::CMD_READ, 0, 512).error(), 0);
    }
}

#[test]
fn fua_and_flush_reach_the_volume() {
    let mut driver = entered(true);
    let flushes = |driver: &Driver| driver.service.flushes.load(Ordering::SeqCst);
    assert_eq!(reply(&mut driver, &wire::write(1, 1, 0, &[1; 512]), 0).error(), 0);
    assert_eq!(flushes(&driver), 1);
    for command in [protocol::CMD_TRIM, protocol::CMD_WRITE_ZEROES] {
        assert_eq!(ask(&mut driver, 1, command, 0, 512).error(), 0);
    }
    assert_eq!(flushes(&driver), 3);
    assert_eq!(ask(&mut driver, 0, protocol::CMD_FLUSH, 0, 0).error(), 0);
    assert_eq!(flushes(&driver), 4);
    assert_eq!(ask(&mut driver, 0, protocol::CMD_FLUSH, 512, 0).error(), protocol::EINVAL);
    assert_eq!(flushes(&driver), 4);
}

#[test]
fn no_hole_forbids_deallocation() {
    let mut driver = entered(false);
    driver.keep = true;
    driver.feed(&wire::request(0, protocol::CMD_WRITE_ZEROES, 1, 0, u32::MAX - 511));
    assert!(driver.kept.is_empty(), "that one lies outside");
    driver.feed(&wire::request(0, protocol::CMD_WRITE_ZEROES, 1, 0, 1 << 20));
    driver.feed(&wire::request(2, protocol::CMD_WRITE_ZEROES, 2, 0, 1 << 20));
    let hints: Vec<_> = driver.kept.iter().map(|(_, command)| command).collect();
    assert!(matches!(hints[0], Command::WriteZeroes { may_deallocate: true, .. }));
    assert!(matches!(hints[1], Command::WriteZeroes { may_deallocate: false, .. }));
}

#[test]
fn a_read_only_export_refuses_everything_that_writes() {
    let mut service = RamService::new(SIZE, Pace::AtOnce);
    service.read_only = true;
    let mut driver = entered_with(service, true);
    for command in [protocol::CMD_TRIM, protocol::CMD_WRITE_ZEROES, protocol::CMD_CACHE] {
        assert_eq!(ask(&mut driver, 0, command, 0, 512).error(), protocol::EPERM);
    }
    let refused = reply(&mut driver, &wire::write(0, 1, 0, &[1; 100_000]), 0);
    assert_eq!(refused.error(), protocol::EPERM);
    assert_eq!(ask(&mut driver, 0, protocol::CMD_FLUSH, 0, 0).error(), 0);
    assert_eq!(ask(&mut driver, 0, protocol::CMD_READ, 0, 512).error(), 0);
}

#[test]
fn a_refused_write_is_drained_and_one_that_is_too_long_ends_the_connection() {
    let mut driver = entered(false);
    let mut bytes = wire::request(0, protocol::CMD_WRITE, 1, 0, (32 << 20) + 512);
    bytes.resize(bytes.len() + (32 << 20) + 512, 7);
    assert_eq!(reply(&mut driver, &bytes, 0).error(), protocol::ENOSPC);
    assert_eq!(ask(&mut driver, 0, protocol::CMD_READ, 0, 512).error(), 0);
    let huge = wire::request(0, protocol::CMD_WRITE, 1, 0, (64 << 20) + 512);
    assert_eq!(reply(&mut driver, &huge, 0).error(), protocol::EINVAL);
    assert!(driver.session.finished());
}

#[test]
fn an_oversized_read_is_refused_before_anything_is_allocated() {
    for (structured, error) in [(true, protocol::EOVERFLOW), (false, protocol::EINVAL)] {
        let mut driver = entered(structured);
        let refused = ask(&mut driver, 0, protocol::CMD_READ, 0, u32::MAX);
        assert_eq!(refused.error(), error);
    }
}

#[test]
fn a_request_with_the_wrong_magic_ends_the_connection() {
    let mut driver = entered(true);
    let mut bytes = wire::request(0, protocol::CMD_READ, 1, 0, 512);
    bytes[0] ^= 1;
    driver.feed(&bytes);
    assert!(driver.session.finished() && driver.sent.is_empty());
}

#[test]
fn a_failure_of_the_device_is_told_in_the_errors_of_the_protocol() {
    for (errno, expected) in [(5, protocol::EIO), (28, protocol::ENOSPC), (30, protocol::EPERM)] {
        for structured in [false, true] {
            let mut service = RamService::new(SIZE, Pace::AtOnce);
            service.bad_byte = Some((4096, errno));
            let mut driver = entered_with(service, structured);
            assert_eq!(ask(&mut driver, 0, protocol::CMD_READ, 4096, 512).error(), expected);
            let refused = reply(&mut driver, &wire::write(0, 1, 4096, &[1; 512]), 0);
            assert_eq!(refused.error(), expected);
            assert_eq!(ask(&mut driver, 0, protocol::CMD_READ, 0, 512).error(), 0);
        }
    }
}

/// A session that has selected both contexts.
fn with_contexts() -> Driver {
    let mut driver = Driver::new(Tls::Off);
    let mut bytes = wire::flags();
    bytes.extend(wire::option(protocol::OPT_STRUCTURED_REPLY, &[]));
    let both = wire::meta(b"", &["qemu:dirty-bitmap:missing", "base:allocation"]);
    bytes.extend(wire::option(protocol::OPT_SET_META_CONTEXT, &both));
    bytes.extend(wire::option(protocol::OPT_GO, &wire::query(b"db", &[])));
    driver.feed(&bytes);
    driver.sent.clear();
    driver
}

/// The runs of one chunk of block status, and the context they are of.
fn runs(reply: &Reply) -> (u32, Vec<(u32, u32)>) {
    let Reply::Chunk { kind: protocol::REPLY_BLOCK_STATUS, body, .. } = reply else {
        panic!("{reply:?} is no block status")
    };
    let mut reader = Reader(body);
    let context = reader.number(4) as u32;
    let mut runs = Vec::new();
    while !reader.0.is_empty() {
        runs.push((reader.number(4) as u32, reader.number(4) as u32));
    }
    (context, runs)
}

#[test]
fn block_status_tells_every_selected_context_in_one_chunk_each() {
    let mut driver = with_contexts();
    assert_eq!(reply(&mut driver, &wire::write(0, 1, 65_536, &[1; 512]), 0).error(), 0);
    driver.sent.clear();
    driver.feed(&wire::request(0, protocol::CMD_BLOCK_STATUS, 2, 512, 300 << 10));
    let mut reader = Reader(&driver.sent);
    let (first, second) = (reader.reply(0), reader.reply(0));
    assert!(matches!(first, Reply::Chunk { cookie: 2, done: false, .. }));
    assert!(matches!(second, Reply::Chunk { cookie: 2, done: true, .. }));
    let rest = (300 << 10) - (65_536 - 512) - 65_536;
    assert_eq!(runs(&first), (1, vec![(65_024, 3), (65_536, 0), (rest, 3)]));
    let last = (300 << 10) - 65_024 - 3 * 65_536;
    let expected = vec![(65_024, 0), (65_536, 1), (65_536, 0), (65_536, 1), (last, 0)];
    assert_eq!(runs(&second), (2, expected));
}

#[test]
fn req_one_is_answered_with_one_run_inside_the_range() {
    let mut driver = with_contexts();
    let one = protocol::CMD_FLAG_REQ_ONE;
    driver.feed(&wire::request(one, protocol::CMD_BLOCK_STATUS, 2, 0, 1024));
    driver.feed(&wire::request(one, protocol::CMD_BLOCK_STATUS, 3, 0, 1 << 20));
    let mut reader = Reader(&driver.sent);
    for expected in [1024, 1024, 65_536, 65_536] {
        assert_eq!(runs(&reader.reply(0)).1[0].0, expected);
    }
}

#[test]
fn block_status_without_a_context_of_this_export_is_invalid() {
    let mut driver = entered(true);
    let refused = ask(&mut driver, 0, protocol::CMD_BLOCK_STATUS, 0, 512);
    assert_eq!(refused.error(), protocol::EINVAL);

    let mut driver = Driver::new(Tls::Off);
    driver.exports.insert("else", "", driver.service.clone()).expect("a new name");
    let mut bytes = wire::flags();
    bytes.extend(wire::option(protocol::OPT_STRUCTURED_REPLY, &[]));
    let select = wire::meta(b"else", &["base:allocation"]);
    bytes.extend(wire::option(protocol::OPT_SET_META_CONTEXT, &select));
    bytes.extend(wire::option(protocol::OPT_GO, &wire::query(b"db", &[])));
    driver.feed(&bytes);
    let refused = ask(&mut driver, 0, protocol::CMD_BLOCK_STATUS, 0, 512);
    assert_eq!(refused.error(), protocol::EINVAL);
}

#[test]
fn a_failed_selection_clears_the_one_before() {
    let mut driver = Driver::new(Tls::Off);
    let mut bytes = wire::flags();
    bytes.extend(wire::option(protocol::OPT_STRUCTURED_REPLY, &[]));
    let select = wire::meta(b"db", &["base:allocation"]);
    bytes.extend(wire::option(protocol::OPT_SET_META_CONTEXT, &select));
    bytes.extend(wire::option(protocol::OPT_SET_META_CONTEXT, b"nonsense"));
    bytes.extend(wire::option(protocol::OPT_GO, &wire::query(b"db", &[])));
    driver.feed(&bytes);
    let refused = ask(&mut driver, 0, protocol::CMD_BLOCK_STATUS, 0, 512);
    assert_eq!(refused.error(), protocol::EINVAL);
}

#[test]
fn a_removed_export_refuses_later_requests_and_ends_when_those_in_flight_are_answered() {
    let mut driver = entered(true);
    driver.keep = true;
    driver.feed(&wire::request(0, protocol::CMD_READ, 1, 0, 512));
    assert!(driver.exports.remove("db"));
    driver.feed(&wire::request(0, protocol::CMD_READ, 2, 0, 512));
    driver.feed(&wire::write(0, 3, 0, &[1; 4096]));
    assert!(!driver.session.finished());
    driver.answer_kept();
    assert!(driver.session.finished());
    let mut reader = Reader(&driver.sent);
    let answers = [reader.reply(0), reader.reply(0), reader.reply(512)];
    let answers = answers.map(|reply| (reply.cookie(), reply.error()));
    assert_eq!(answers, [(2, protocol::ESHUTDOWN), (3, protocol::ESHUTDOWN), (1, 0)]);
}

#[test]
fn disconnect_waits_for_requests_in_flight() {
    let mut driver = entered(false);
    driver.keep = true;
    driver.feed(&wire::write(0, 1, 0, &[1; 512]));
    driver.feed(&wire::request(0, protocol::CMD_DISC, 0, 0, 0));
    assert!(!driver.session.finished() && driver.session.space().is_empty());
    driver.answer_kept();
    assert!(driver.session.finished());
    assert_eq!(Reader(&driver.sent).reply(0).error(), 0);
}

#[test]
fn requests_wait_while_too_many_are_in_flight() {
    let mut driver = entered(false);
    driver.keep = true;
    for cookie in 0..200 {
        driver.feed(&wire::request(0, protocol::CMD_READ, cookie, 0, 512));
    }
    assert_eq!(driver.kept.len(), 128);
    driver.keep = false;
    driver.answer_kept();
    let mut reader = Reader(&driver.sent);
    let cookies: Vec<u64> = (0..200).map(|_| reader.reply(512).cookie()).collect();
    assert_eq!(cookies, (0..200).collect::<Vec<_>>());
}

#[test]
fn requests_wait_while_too_many_bytes_are_in_flight() {
    let mut driver = entered_with(RamService::new(64 << 20, Pace::AtOnce), false);
    driver.keep = true;
    for cookie in 0..5 {
        driver.feed(&wire::request(0, protocol::CMD_READ, cookie, 0, 24 << 20));
    }
    assert_eq!(driver.kept.len(), 2);
    driver.keep = false;
    driver.answer_kept();
    assert_eq!(driver.sent.len(), 5 * (16 + (24 << 20)));
}

#[test]
fn a_client_that_does_not_read_its_replies_is_not_served_further() {
    let mut driver = entered(false);
    driver.stalled = true;
    let mut bytes = Vec::new();
    for cookie in 0..20_000 {
        bytes.extend(wire::request(0, protocol::CMD_READ, cookie, 0, 4096));
    }
    let taken = driver.feed(&bytes);
    assert!(taken < bytes.len(), "the rest stays in the socket");
    assert!(driver.session.pending() < (512 << 10) + 4096 + 16);
    driver.stalled = false;
    driver.turn();
    driver.feed(&bytes[taken..]);
    assert_eq!(driver.sent.len(), 20_000 * (4096 + 16));
}

#[test]
fn what_was_sent_before_the_client_closed_its_half_is_answered() {
    let mut driver = entered(false);
    driver.keep = true;
    for cookie in 0..130 {
        driver.feed(&wire::request(0, protocol::CMD_READ, cookie, 0, 512));
    }
    driver.feed(&wire::request(0, protocol::CMD_READ, 1, 0, 512)[..27]);
    driver.session.input_ended();
    driver.turn();
    assert!(!driver.session.finished());
    driver.keep = false;
    driver.answer_kept();
    assert!(driver.session.finished());
    assert_eq!(driver.sent.len(), 130 * 528);
}

#[test]
fn a_client_that_is_gone_holds_nothing_but_what_is_in_flight() {
    let mut driver = entered(false);
    driver.keep = true;
    driver.feed(&wire::request(0, protocol::CMD_READ, 1, 0, 512));
    driver.feed(&wire::request(0, protocol::CMD_WRITE, 2, 0, 1 << 20));
    driver.session.output_ended();
    assert!(!driver.session.finished());
    driver.answer_kept();
    assert!(driver.session.finished());
}
