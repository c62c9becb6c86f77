//! Extended headers: 64-bit lengths, payloads of any command, and fast zeroing.

use dualrestore::extent::ByteRange;
use dualrestore::format::nbd as protocol;
use dualrestore::nbd::Tls;
use dualrestore::volume::service::{Command, StatusContext};

use crate::ram_service::{Pace, RamService};
use crate::session_driver::Driver;
use crate::wire::{self, Reader, Reply};

const PIB: u64 = 1 << 50;
const CONTEXTS: [&str; 2] = ["base:allocation", "qemu:dirty-bitmap:missing"];

/// A session in extended style with contexts of a volume of a pebibyte.
fn entered(contexts: &[&str]) -> Driver {
    let mut service = RamService::new(PIB, Pace::AtOnce);
    service.contexts.push(StatusContext::Unsent);
    service.zeroes_fast = true;
    entered_with(service, contexts)
}

fn entered_with(service: RamService, contexts: &[&str]) -> Driver {
    let mut driver = Driver::with(service, Tls::Off);
    driver.feed(&wire::enter_extended(b"db", contexts));
    driver.sent.clear();
    driver
}

/// The one reply to the bytes.
fn reply(driver: &mut Driver, bytes: &[u8]) -> Reply {
    driver.sent.clear();
    driver.feed(bytes);
    let mut reader = Reader(&driver.sent);
    let reply = reader.reply(0);
    assert!(reader.0.is_empty(), "more than one reply");
    reply
}

fn ask(driver: &mut Driver, flags: u16, command: u16, offset: u64, length: u64) -> Reply {
    reply(driver, &wire::extended(flags, command, 9, offset, length))
}

/// The kinds of the replies to these options.
fn kinds(options: &[Vec<u8>]) -> (Vec<u32>, bool) {
    let mut driver = Driver::new(Tls::Off);
    driver.feed(&wire::flags());
    options.iter().for_each(|option| {
        driver.feed(option);
    });
    let mut reader = Reader(&driver.sent);
    reader.greeting();
    let kinds = reader.option_replies().into_iter().map(|reply| reply.1).collect();
    (kinds, !driver.session.finished())
}

/// The transmission flags that `GO` tells.
fn flags_told(service: RamService, options: &[Vec<u8>]) -> u16 {
    let mut driver = Driver::with(service, Tls::Off);
    driver.feed(&wire::flags());
    options.iter().for_each(|option| {
        driver.feed(option);
    });
    driver.feed(&wire::option(protocol::OPT_GO, &wire::query(b"db", &[])));
    let mut reader = Reader(&driver.sent);
    reader.greeting();
    let replies = reader.option_replies();
    let export = replies.iter().find(|reply| reply.1 == protocol::REP_INFO).expect("told");
    u16::from_be_bytes(export.2[10..].try_into().expect("two bytes"))
}

#[test]
fn extended_headers_include_structured_replies_and_are_not_given_up_for_them() {
    let extended = wire::option(protocol::OPT_EXTENDED_HEADERS, &[]);
    let structured = wire::option(protocol::OPT_STRUCTURED_REPLY, &[]);
    let select = wire::option(protocol::OPT_SET_META_CONTEXT, &wire::meta(b"db", &CONTEXTS));
    let (ack, context) = (protocol::REP_ACK, protocol::REP_META_CONTEXT);
    let (told, open) = kinds(&[structured.clone(), extended.clone(), structured, select]);
    assert_eq!(told, [ack, ack, protocol::REP_ERR_EXT_HEADER_REQD, context, context, ack]);
    assert!(open);
    let by_name = wire::option(protocol::OPT_EXPORT_NAME, b"db");
    assert_eq!(kinds(&[extended, by_name]), (vec![ack], false));
}

#[test]
fn every_answer_in_extended_style_is_a_wide_chunk_with_the_offset_of_its_request() {
    let mut driver = entered(&CONTEXTS);
    let wide = |kind, body: &[u8]| Reply::Wide {
        cookie: 9,
        offset: 8192,
        done: true,
        kind,
        body: body.to_vec(),
    };
    let payload = [5; 512];
    let written = reply(&mut driver, &wire::loaded(0, protocol::CMD_WRITE, 9, 8192, &payload));
    assert_eq!(written, wide(protocol::REPLY_NONE, &[]));
    let body = [&8192u64.to_be_bytes()[..], &payload].concat();
    let df = protocol::CMD_FLAG_DF;
    let read = ask(&mut driver, df, protocol::CMD_READ, 8192, 512);
    assert_eq!(read, wide(protocol::REPLY_OFFSET_DATA, &body));
    assert_eq!(ask(&mut driver, 0, protocol::CMD_READ, 8192, 0), wide(protocol::REPLY_NONE, &[]));
    let trimmed = ask(&mut driver, 0, protocol::CMD_TRIM, 8192, 512);
    assert_eq!(trimmed, wide(protocol::REPLY_NONE, &[]));
    let refused = ask(&mut driver, 0, 77, 8192, 512);
    assert_eq!(refused.error(), protocol::EINVAL);
    assert!(matches!(refused, Reply::Wide { offset: 8192, done: true, .. }));
    let flushed = ask(&mut driver, 0, protocol::CMD_FLUSH, 0, 0);
    assert!(matches!(flushed, Reply::Wide { kind: protocol::REPLY_NONE, offset: 0, .. }));
}

#[test]
fn lengths_beyond_32_bits_reach_the_volume_whole() {
    let mut driver = entered(&CONTEXTS);
    driver.keep = true;
    let length = PIB - 4096;
    for command in [protocol::CMD_TRIM, protocol::CMD_WRITE_ZEROES, protocol::CMD_CACHE] {
        driver.feed(&wire::extended(0, command, 1, 4096, length));
    }
    let expected = ByteRange::new(4096, length);
    for (_, command) in &driver.kept {
        match command {
            Command::Trim { range, .. }
            | Command::WriteZeroes { range, .. }
            | Command::Cache { range } => assert_eq!(*range, expected),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(driver.kept.len(), 3);
    let mut driver = entered(&CONTEXTS);
    for (command, error) in [
        (protocol::CMD_TRIM, protocol::EINVAL),
        (protocol::CMD_WRITE_ZEROES, protocol::ENOSPC),
        (protocol::CMD_READ, protocol::EOVERFLOW),
    ] {
        for length in [PIB, u64::MAX - 4095, u64::MAX] {
            let refused = ask(&mut driver, 0, command, 4096, length);
            assert_eq!(refused.error(), error, "{command} {length}");
        }
    }
}

/// The runs of a wide chunk of block status, and the context they are of.
fn runs(reply: &Reply) -> (u32, Vec<(u64, u64)>) {
    let Reply::Wide { kind: protocol::REPLY_BLOCK_STATUS_EXT, body, .. } = reply else {
        panic!("{reply:?} is no block status")
    };
    let mut reader = Reader(body);
    let (context, count) = (reader.number(4) as u32, reader.number(4));
    let runs: Vec<_> = (0..count).map(|_| (reader.number(8), reader.number(8))).collect();
    assert!(reader.0.is_empty());
    (context, runs)
}

#[test]
fn block_status_in_extended_style_has_wide_runs() {
    let mut driver = entered(&["qemu:dirty-bitmap:unsent"]);
    let status = ask(&mut driver, 0, protocol::CMD_BLOCK_STATUS, 4096, PIB - 4096);
    assert_eq!(runs(&status), (3, vec![(PIB - 4096, 0)]));
    let mut driver = entered(&CONTEXTS);
    driver.feed(&wire::extended(0, protocol::CMD_BLOCK_STATUS, 2, 0, 1 << 40));
    let mut reader = Reader(&driver.sent);
    assert_eq!(runs(&reader.reply(0)), (1, vec![(4096 * 65_536, 3)]));
    let (context, missing) = runs(&reader.reply(0));
    assert_eq!((context, missing.len(), missing[1]), (2, 4096, (65_536, 1)));
}

#[test]
fn a_block_status_with_a_payload_is_of_the_contexts_that_it_names() {
    let mut driver = entered(&CONTEXTS);
    let status = |payload: &[u8]| wire::loaded(0, protocol::CMD_BLOCK_STATUS, 9, 0, payload);
    let one = reply(&mut driver, &status(&wire::filter(65_536, &[2])));
    assert_eq!(runs(&one), (2, vec![(65_536, 0)]));
    driver.sent.clear();
    driver.feed(&status(&wire::filter(65_536, &[2, 1])));
    let mut reader = Reader(&driver.sent);
    let named = [reader.reply(0), reader.reply(0)].map(|reply| runs(&reply).0);
    assert_eq!(named, [1, 2]);
    for wrong in [
        wire::filter(65_536, &[]),
        wire::filter(65_536, &[1, 1]),
        wire::filter(65_536, &[3]),
        wire::filter(65_536, &[1, 2, 3]),
        wire::filter(65_536, &[7; 200]),
        wire::filter(PIB + 4096, &[1]),
        vec![0; 7],
        vec![0; 10],
    ] {
        assert_eq!(reply(&mut driver, &status(&wrong)).error(), protocol::EINVAL, "{wrong:?}");
    }
    let empty = ask(&mut driver, 0, protocol::CMD_BLOCK_STATUS, 0, 0);
    assert_eq!(empty.error(), protocol::EINVAL);
}

#[test]
fn filters_are_offered_only_with_extended_headers_and_a_selected_context() {
    let told = |options: &[Vec<u8>]| {
        flags_told(RamService::new(4096, Pace::AtOnce), options) & protocol::BLOCK_STATUS_PAYLOAD
    };
    let extended = wire::option(protocol::OPT_EXTENDED_HEADERS, &[]);
    let structured = wire::option(protocol::OPT_STRUCTURED_REPLY, &[]);
    let select = wire::option(protocol::OPT_SET_META_CONTEXT, &wire::meta(b"db", &CONTEXTS));
    assert_eq!(told(&[extended.clone(), select.clone()]), protocol::BLOCK_STATUS_PAYLOAD);
    assert_eq!(told(&[extended]), 0);
    assert_eq!(told(&[structured, select]), 0);
}

#[test]
fn a_payload_where_none_belongs_is_read_past_and_refused() {
    let mut driver = entered(&[]);
    for command in [
        protocol::CMD_READ,
        protocol::CMD_TRIM,
        protocol::CMD_WRITE_ZEROES,
        protocol::CMD_CACHE,
        protocol::CMD_FLUSH,
        protocol::CMD_BLOCK_STATUS,
        99,
    ] {
        let refused = reply(&mut driver, &wire::loaded(0, command, 9, 0, &[7; 4096]));
        assert_eq!(refused.error(), protocol::EINVAL, "command {command}");
    }
    assert_eq!(ask(&mut driver, 0, protocol::CMD_READ, 0, 512).error(), 0, "still in step");
}

#[test]
fn a_write_without_the_flag_has_its_payload_all_the_same() {
    // QEMU up to version 10 sends it so.
    let mut driver = entered(&[]);
    let bytes = [wire::extended(1, protocol::CMD_WRITE, 9, 512, 512), vec![7; 512]].concat();
    assert_eq!(reply(&mut driver, &bytes).error(), 0);
    assert_eq!(driver.service.contents(ByteRange::new(512, 512)), [7; 512]);
}

#[test]
fn a_payload_longer_than_the_maximum_ends_the_connection() {
    for length in [(64 << 20) + 1, 1 << 32, u64::MAX] {
        for command in [protocol::CMD_WRITE, protocol::CMD_BLOCK_STATUS, protocol::CMD_TRIM] {
            let mut driver = entered(&CONTEXTS);
            let flag = protocol::CMD_FLAG_PAYLOAD_LEN;
            driver.feed(&wire::extended(flag, command, 1, 0, length));
            assert!(driver.session.finished() && driver.sent.is_empty());
        }
    }
}

#[test]
fn requests_of_the_other_style_end_the_connection() {
    let mut driver = entered(&[]);
    driver.feed(&wire::request(0, protocol::CMD_READ, 1, 0, 512));
    driver.feed(&[0; 4]);
    assert!(driver.session.finished());
    let mut driver = Driver::new(Tls::Off);
    driver.feed(&wire::enter(b"db", true));
    driver.feed(&wire::extended(0, protocol::CMD_READ, 1, 0, 512));
    assert!(driver.session.finished());
}

#[test]
fn a_fast_zeroing_is_done_where_it_is_fast_and_else_refused_at_once() {
    let fast = protocol::CMD_FLAG_FAST_ZERO;
    let mut driver = entered(&[]);
    driver.keep = true;
    driver.feed(&wire::extended(fast, protocol::CMD_WRITE_ZEROES, 1, 0, PIB));
    driver.feed(&wire::extended(0, protocol::CMD_WRITE_ZEROES, 1, 512, 512));
    assert_eq!(driver.kept.len(), 2);
    let refused = ask(&mut driver, fast, protocol::CMD_WRITE_ZEROES, 512, 512);
    assert_eq!(refused.error(), protocol::ENOTSUP);
    assert_eq!(driver.kept.len(), 2, "nothing more was zeroed");
}

#[test]
fn fast_zeroing_is_offered_only_where_it_can_be_fast() {
    let told = |zeroes_fast, read_only| {
        let mut service = RamService::new(1 << 20, Pace::AtOnce);
        (service.zeroes_fast, service.read_only) = (zeroes_fast, read_only);
        flags_told(service, &[]) & protocol::SEND_FAST_ZERO
    };
    assert_eq!(told(true, false), protocol::SEND_FAST_ZERO);
    assert_eq!([told(false, false), told(true, true)], [0, 0]);
    // Where it is not offered, asking for it is a mistake of the client.
    let mut driver = entered_with(RamService::new(1 << 20, Pace::AtOnce), &[]);
    let fast = protocol::CMD_FLAG_FAST_ZERO;
    let refused = ask(&mut driver, fast, protocol::CMD_WRITE_ZEROES, 0, 4096);
    assert_eq!(refused.error(), protocol::EINVAL);
}

#[test]
fn an_extended_stream_cut_at_any_byte_is_answered_as_if_it_were_whole() {
    let mut bytes = wire::enter_extended(b"db", &CONTEXTS);
    bytes.extend(wire::loaded(0, protocol::CMD_WRITE, 1, 512, &[3; 1024]));
    bytes.extend(wire::extended(0, protocol::CMD_READ, 2, 0, 2048));
    bytes.extend(wire::loaded(0, protocol::CMD_BLOCK_STATUS, 3, 0, &wire::filter(4096, &[1])));
    bytes.extend(wire::loaded(0, protocol::CMD_TRIM, 4, 0, &[1; 20]));
    bytes.extend(wire::extended(0, protocol::CMD_TRIM, 5, 0, 4096));
    bytes.extend(wire::extended(0, protocol::CMD_DISC, 6, 0, 0));
    let answers = |pieces: &[&[u8]]| {
        let mut driver = Driver::with(RamService::new(4096, Pace::AtOnce), Tls::Off);
        pieces.iter().for_each(|piece| {
            driver.feed(piece);
        });
        (driver.sent, driver.session.finished())
    };
    let whole = answers(&[&bytes]);
    assert!(whole.1 && whole.0.len() > 2048);
    for cut in 0..=bytes.len() {
        assert!(answers(&[&bytes[..cut], &bytes[cut..]]) == whole, "cut at {cut}");
    }
}
