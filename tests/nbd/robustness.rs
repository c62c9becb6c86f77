//! Bytes cut anywhere, and bytes that mean nothing.

use dualrestore::format::nbd as protocol;
use dualrestore::nbd::Tls;
use proptest::prelude::*;

use crate::ram_service::{Pace, RamService};
use crate::session_driver::Driver;
use crate::wire;

/// A conversation with some of everything.
fn conversation() -> Vec<u8> {
    let mut bytes = wire::flags();
    bytes.extend(wire::option(protocol::OPT_STARTTLS, &[]));
    bytes.extend(wire::option(protocol::OPT_LIST, &[]));
    bytes.extend(wire::option(99, b"unknown"));
    bytes.extend(wire::option(protocol::OPT_INFO, &wire::query(b"none", &[3])));
    bytes.extend(wire::option(protocol::OPT_STRUCTURED_REPLY, &[]));
    let select = wire::meta(b"db", &["base:allocation"]);
    bytes.extend(wire::option(protocol::OPT_SET_META_CONTEXT, &select));
    bytes.extend(wire::option(protocol::OPT_GO, &wire::query(b"db", &[3])));
    bytes.extend(wire::write(0, 1, 512, &[3; 1024]));
    bytes.extend(wire::request(0, protocol::CMD_READ, 2, 0, 2048));
    bytes.extend(wire::write(0, 3, 513, &[4; 700]));
    bytes.extend(wire::request(0, 77, 4, 0, 0));
    bytes.extend(wire::request(0, protocol::CMD_BLOCK_STATUS, 5, 0, 4096));
    bytes.extend(wire::request(0, protocol::CMD_TRIM, 6, 1024, 512));
    bytes.extend(wire::request(0, protocol::CMD_FLUSH, 7, 0, 0));
    bytes.extend(wire::request(0, protocol::CMD_READ, 8, 0, 4096));
    bytes.extend(wire::request(0, protocol::CMD_DISC, 0, 0, 0));
    bytes
}

fn answers(pieces: &[&[u8]]) -> (Vec<u8>, bool) {
    let mut driver = Driver::with(RamService::new(4096, Pace::AtOnce), Tls::Off);
    for piece in pieces {
        driver.feed(piece);
    }
    (driver.sent, driver.session.finished())
}

#[test]
fn a_stream_cut_at_any_byte_is_answered_as_if_it_were_whole() {
    let bytes = conversation();
    let whole = answers(&[&bytes]);
    assert!(whole.1 && whole.0.len() > 6000);
    for cut in 0..=bytes.len() {
        assert!(answers(&[&bytes[..cut], &bytes[cut..]]) == whole, "cut at {cut}");
    }
    let single: Vec<&[u8]> = bytes.chunks(1).collect();
    assert!(answers(&single) == whole, "byte by byte");
}

#[test]
fn a_large_write_cut_anywhere_arrives_whole() {
    let payload: Vec<u8> = (0..100_352u32).map(|at| (at / 7) as u8).collect();
    let mut bytes = wire::enter(b"db", false);
    let head = bytes.len();
    bytes.extend(wire::write(0, 1, 512, &payload));
    bytes.extend(wire::request(0, protocol::CMD_READ, 2, 0, 512));
    let cuts = [head + 1, head + 28, head + 29, head + 40_000, bytes.len() - 29, bytes.len() - 28];
    for cut in cuts {
        let mut driver = Driver::new(Tls::Off);
        driver.feed(&bytes[..cut]);
        driver.feed(&bytes[cut..]);
        let range = dualrestore::extent::ByteRange::new(512, 100_352);
        assert!(driver.service.contents(range) == payload, "cut at {cut}");
        assert_eq!(driver.sent[driver.sent.len() - 528..][..4], [0x67, 0x44, 0x66, 0x98]);
    }
}

/// Bytes that look like the protocol more often than chance would have it.
fn plausible() -> impl Strategy<Value = Vec<u8>> {
    let number = prop_oneof![
        Just(0u32),
        Just(u32::MAX),
        Just(1 << 31),
        0u32..9000,
        (0u32..64).prop_map(|sectors| sectors * 512),
        any::<u32>()
    ];
    let noise = prop::collection::vec(any::<u8>(), 0..200);
    prop_oneof![
        noise.clone(),
        (0u32..13, number.clone(), noise.clone())
            .prop_map(|(option, length, payload)| wire::option_claiming(option, length, &payload)),
        (0u32..13, noise.clone()).prop_map(|(option, payload)| wire::option(option, &payload)),
        Just(wire::option(protocol::OPT_GO, &wire::query(b"db", &[0, 1, 2, 3]))),
        Just(wire::option(protocol::OPT_STRUCTURED_REPLY, &[])),
        Just(wire::option(protocol::OPT_EXTENDED_HEADERS, &[])),
        (any::<u16>(), 0u16..10, any::<u64>(), number.clone(), noise.clone()).prop_map(
            |(flags, command, offset, length, payload)| {
                let length =
                    if flags & 0x20 == 0 { u64::from(length) << 9 } else { payload.len() as u64 };
                let offset = if offset % 4 == 0 { offset } else { 0 };
                [wire::extended(flags & 0x3f, command, 7, offset, length), payload].concat()
            }
        ),
        (any::<u16>(), 0u16..10, number.clone(), number).prop_map(
            |(flags, command, offset, length)| wire::request(
                flags & 0x3f,
                command,
                7,
                u64::from(offset),
                length
            )
        ),
        (0u16..4, 0u64..20, noise).prop_map(|(flags, sector, payload)| wire::write(
            flags,
            8,
            sector * 512,
            &payload
        )),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]
    #[test]
    fn no_bytes_make_a_session_panic_or_hold_much(
        pieces in prop::collection::vec(plausible(), 0..40),
        entered in 0..3,
        tls in prop::sample::select(vec![Tls::Off, Tls::Required, Tls::Done]),
        stalled in any::<bool>(),
    ) {
        let mut driver = Driver::with(RamService::new(64 << 10, Pace::AtOnce), tls);
        driver.stalled = stalled;
        driver.feed(&match entered {
            0 => wire::flags(),
            1 => wire::enter(b"db", true),
            _ => wire::enter_extended(b"db", &["base:allocation"]),
        });
        for piece in &pieces {
            let space = driver.session.space().len();
            prop_assert!(space <= 64 << 20);
            driver.feed(piece);
            prop_assert!(driver.session.pending() <= (512 << 10) + (64 << 10) + 64);
            prop_assert!(driver.session.in_flight() <= 1);
        }
        driver.session.input_ended();
        driver.stalled = false;
        driver.turn();
        prop_assert!(driver.session.finished() || driver.tls_began);
    }
}
