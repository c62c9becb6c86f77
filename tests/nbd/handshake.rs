//! Options before and after TLS, well formed and not.

use dualrestore::format::nbd as protocol;
use dualrestore::nbd::Tls;

use crate::session_driver::Driver;
use crate::wire::{self, OptionReply, Reader};

/// What a fresh session answers to these options, and whether it goes on.
fn answers(tls: Tls, options: &[Vec<u8>]) -> (Vec<OptionReply>, bool) {
    let mut driver = Driver::new(tls);
    driver.feed(&wire::flags());
    for option in options {
        driver.feed(option);
    }
    let mut reader = Reader(&driver.sent);
    reader.greeting();
    (reader.option_replies(), !driver.session.finished())
}

/// The kinds of the replies alone.
fn kinds(tls: Tls, options: &[Vec<u8>]) -> Vec<u32> {
    answers(tls, options).0.into_iter().map(|reply| reply.1).collect()
}

fn structured() -> Vec<u8> {
    wire::option(protocol::OPT_STRUCTURED_REPLY, &[])
}

/// Every option that is known, and some that are not, with a payload that fits it.
fn every_option() -> Vec<(u32, Vec<u8>)> {
    let mut options = vec![
        (protocol::OPT_LIST, vec![]),
        (protocol::OPT_INFO, wire::query(b"db", &[])),
        (protocol::OPT_GO, wire::query(b"db", &[])),
        (protocol::OPT_STRUCTURED_REPLY, vec![]),
        (protocol::OPT_LIST_META_CONTEXT, wire::meta(b"db", &[])),
        (protocol::OPT_SET_META_CONTEXT, wire::meta(b"db", &["base:allocation"])),
        (protocol::OPT_EXTENDED_HEADERS, vec![]),
    ];
    options.extend([0, 4, 12, 13, 77, u32::MAX].map(|unknown| (unknown, vec![])));
    options
}

#[test]
fn where_tls_is_required_every_option_but_starttls_and_abort_is_refused() {
    for (option, payload) in every_option() {
        for payload in [payload, vec![], vec![7; 100], vec![7; 9000]] {
            let sent = [wire::option(option, &payload), wire::option(protocol::OPT_LIST, &[])];
            let refused = [protocol::REP_ERR_TLS_REQD; 2];
            assert_eq!(kinds(Tls::Required, &sent), refused, "option {option}");
        }
    }
    let name = [wire::option(protocol::OPT_EXPORT_NAME, b"db")];
    assert_eq!(answers(Tls::Required, &name), (vec![], false));
    let abort = [wire::option(protocol::OPT_ABORT, &[])];
    assert_eq!(kinds(Tls::Required, &abort), [protocol::REP_ACK]);
}

#[test]
fn starttls_is_refused_without_tls_and_inside_it() {
    let start = [wire::option(protocol::OPT_STARTTLS, &[])];
    assert_eq!(kinds(Tls::Off, &start), [protocol::REP_ERR_POLICY]);
    assert_eq!(kinds(Tls::Done, &start), [protocol::REP_ERR_INVALID]);
    let loaded = [wire::option(protocol::OPT_STARTTLS, &[1])];
    assert_eq!(kinds(Tls::Required, &loaded), [protocol::REP_ERR_INVALID]);
}

#[test]
fn starttls_hands_the_connection_over_and_takes_no_further_byte() {
    let mut driver = Driver::new(Tls::Required);
    driver.feed(&wire::flags());
    driver.feed(&wire::option(protocol::OPT_STARTTLS, &[]));
    assert!(driver.tls_began);
    assert!(driver.session.space().is_empty());
    assert_eq!(driver.sent[driver.sent.len() - 8..], [0, 0, 0, 1, 0, 0, 0, 0]);
}

#[test]
fn plaintext_behind_starttls_ends_the_connection() {
    let mut driver = Driver::new(Tls::Required);
    let mut bytes = wire::flags();
    bytes.extend(wire::option(protocol::OPT_STARTTLS, &[]));
    bytes.extend(wire::option(protocol::OPT_STRUCTURED_REPLY, &[]));
    driver.feed(&bytes);
    assert!(!driver.tls_began);
    assert!(driver.session.finished());
}

#[test]
fn every_option_is_answered_inside_tls_and_without_it() {
    for tls in [Tls::Off, Tls::Done] {
        for (option, payload) in every_option() {
            let replies = kinds(tls, &[structured(), wire::option(option, &payload)]);
            let last = *replies.last().expect("answered");
            let known = (1..=11).contains(&option) && option != 4;
            let expected = if known { protocol::REP_ACK } else { protocol::REP_ERR_UNSUP };
            assert_eq!(last, expected, "option {option}");
        }
    }
}

#[test]
fn an_option_with_a_payload_it_cannot_have_is_invalid() {
    for (option, payload) in every_option().into_iter().take(7) {
        for wrong in [vec![7; 1], vec![0xff; 100], [payload.clone(), vec![0]].concat()] {
            let sent = [structured(), wire::option(option, &wrong)];
            let last = *kinds(Tls::Off, &sent).last().expect("answered");
            assert_eq!(last, protocol::REP_ERR_INVALID, "option {option}, {} bytes", wrong.len());
        }
    }
}

#[test]
fn list_names_every_export_with_its_description() {
    let (replies, _) = answers(Tls::Off, &[wire::option(protocol::OPT_LIST, &[])]);
    let body = b"\0\0\0\x02dbthe ledger".to_vec();
    let listed = (protocol::OPT_LIST, protocol::REP_SERVER, body);
    assert_eq!(replies, [listed, (protocol::OPT_LIST, protocol::REP_ACK, vec![])]);
}

#[test]
fn info_tells_what_was_asked_and_stays_in_the_handshake() {
    let items = [protocol::INFO_BLOCK_SIZE, protocol::INFO_NAME, protocol::INFO_DESCRIPTION];
    let ask = wire::option(protocol::OPT_INFO, &wire::query(b"db", &items));
    let list = wire::option(protocol::OPT_LIST, &[]);
    let (replies, open) = answers(Tls::Off, &[ask, list]);
    assert!(open);
    let bodies: Vec<_> = replies.iter().map(|reply| reply.2.as_slice()).collect();
    let flags = 0b1_0110_1101u16 | protocol::SEND_CACHE;
    let export = [&[0, 0][..], &(1u64 << 20).to_be_bytes(), &flags.to_be_bytes()].concat();
    let sizes = [0, 3, 0, 0, 2, 0, 0, 0, 0x10, 0, 2, 0, 0, 0];
    assert_eq!(bodies[..3], [&export, &b"\0\x01db"[..], b"\0\x02the ledger"]);
    assert_eq!((bodies[3], bodies[4]), (&sizes[..], &[][..]));
    assert_eq!(replies[5].1, protocol::REP_SERVER);
}

#[test]
fn the_flag_df_is_offered_only_with_structured_replies_and_writes_only_where_possible() {
    let mut service = crate::ram_service::RamService::new(4096, crate::ram_service::Pace::AtOnce);
    service.read_only = true;
    let mut driver = Driver::with(service, Tls::Off);
    driver.feed(&wire::enter(b"db", true));
    let mut reader = Reader(&driver.sent);
    reader.greeting();
    assert_eq!(reader.option_reply().1, protocol::REP_ACK);
    let body = reader.option_reply().2;
    let expected = protocol::HAS_FLAGS
        | protocol::READ_ONLY
        | protocol::SEND_FLUSH
        | protocol::SEND_FUA
        | protocol::SEND_DF
        | protocol::CAN_MULTI_CONN;
    assert_eq!(body[10..], expected.to_be_bytes());
}

#[test]
fn the_empty_name_leads_to_the_only_export_and_is_told_its_real_name() {
    let ask = wire::option(protocol::OPT_INFO, &wire::query(b"", &[]));
    let (replies, _) = answers(Tls::Off, std::slice::from_ref(&ask));
    assert_eq!(replies[1].2, b"\0\x01db");
    let mut driver = Driver::new(Tls::Off);
    let another = driver.service.clone();
    driver.exports.insert("two", "", another).expect("a new name");
    driver.feed(&[wire::flags(), ask].concat());
    let mut reader = Reader(&driver.sent);
    reader.greeting();
    assert_eq!(reader.option_reply().1, protocol::REP_ERR_UNKNOWN);
}

#[test]
fn names_are_keys_and_never_paths() {
    let long = [b'a'; 4096];
    for name in [&b"../db"[..], b"/etc/passwd", b"a/b", b"./db", b"db/", b"DB", &long] {
        for option in [protocol::OPT_INFO, protocol::OPT_GO] {
            let sent = [wire::option(option, &wire::query(name, &[]))];
            assert_eq!(kinds(Tls::Off, &sent), [protocol::REP_ERR_UNKNOWN]);
        }
        let sent = [wire::option(protocol::OPT_EXPORT_NAME, name)];
        assert_eq!(answers(Tls::Off, &sent), (vec![], false));
    }
    for name in [&b"db\0"[..], b"\xff\xfe", b"\0", &[b'a'; 4097]] {
        let sent = [wire::option(protocol::OPT_GO, &wire::query(name, &[]))];
        assert_eq!(kinds(Tls::Off, &sent), [protocol::REP_ERR_INVALID]);
        let sent = [wire::option(protocol::OPT_EXPORT_NAME, name)];
        assert_eq!(answers(Tls::Off, &sent), (vec![], false));
    }
}

#[test]
fn export_name_enters_transmission_with_zeroes_unless_spared() {
    for (client_flags, zeroes) in [(1u8, 124), (3, 0), (0, 124)] {
        let mut driver = Driver::new(Tls::Off);
        driver.feed(&[0, 0, 0, client_flags]);
        driver.feed(&wire::option(protocol::OPT_EXPORT_NAME, b"db"));
        driver.feed(&wire::request(0, protocol::CMD_READ, 5, 512, 512));
        let mut reader = Reader(&driver.sent);
        reader.greeting();
        assert_eq!(reader.number(8), 1 << 20);
        reader.number(2);
        assert_eq!(reader.take(zeroes), vec![0; zeroes]);
        let expected = wire::Reply::Simple { cookie: 5, error: 0, bytes: vec![0; 512] };
        assert_eq!(reader.reply(512), expected);
    }
}

#[test]
fn a_client_flag_that_is_not_known_ends_the_connection() {
    for bytes in [[0, 0, 0, 4], [0x80, 0, 0, 3], [0xff; 4]] {
        let mut driver = Driver::new(Tls::Off);
        driver.feed(&bytes);
        assert!(driver.session.finished());
    }
}

#[test]
fn a_client_without_fixed_newstyle_may_only_name_an_export() {
    let mut driver = Driver::new(Tls::Off);
    driver.feed(&[0, 0, 0, 0]);
    driver.feed(&wire::option(protocol::OPT_LIST, &[]));
    assert!(driver.session.finished());
}

#[test]
fn abort_is_acknowledged_and_ends_the_connection_whatever_it_carries() {
    for payload in [&b""[..], b"bye"] {
        let sent = [wire::option(protocol::OPT_ABORT, payload)];
        let expected = vec![(protocol::OPT_ABORT, protocol::REP_ACK, vec![])];
        assert_eq!(answers(Tls::Off, &sent), (expected, false));
    }
}

#[test]
fn contexts_are_listed_by_name_and_wildcard() {
    let listed = |queries: &[&str]| -> Vec<String> {
        let list = wire::option(protocol::OPT_LIST_META_CONTEXT, &wire::meta(b"db", queries));
        let (replies, _) = answers(Tls::Off, &[structured(), list]);
        let (last, contexts) = replies[1..].split_last().expect("answered");
        assert_eq!(last.1, protocol::REP_ACK);
        let name = |reply: &OptionReply| String::from_utf8_lossy(&reply.2[4..]).into_owned();
        contexts.iter().map(name).collect()
    };
    let (base, missing) = ("base:allocation", "qemu:dirty-bitmap:missing");
    assert_eq!(listed(&[]), [base, missing]);
    assert_eq!(listed(&["base:"]), [base]);
    assert_eq!(listed(&["qemu:"]), [missing]);
    assert_eq!(listed(&["qemu:dirty-bitmap:", "base:allocation", "base:"]), [base, missing]);
    assert_eq!(listed(&[missing]), [missing]);
    assert_eq!(listed(&["x-else:", "nonsense", "", "qemu:dirty-bitmap:unsent"]), [""; 0]);
}

#[test]
fn a_wildcard_selects_no_context() {
    let select = |queries: &[&str]| {
        wire::option(protocol::OPT_SET_META_CONTEXT, &wire::meta(b"db", queries))
    };
    let sent = [structured(), select(&["base:", "qemu:", "qemu:dirty-bitmap:", "base:nothing"])];
    assert_eq!(kinds(Tls::Off, &sent), [protocol::REP_ACK; 2]);
    let sent = [structured(), select(&["base:allocation", "base:allocation"])];
    let (replies, _) = answers(Tls::Off, &sent);
    assert_eq!(replies[1].2, b"\0\0\0\x01base:allocation");
    assert_eq!(replies.len(), 3);
}

#[test]
fn contexts_need_structured_replies_and_an_export() {
    for option in [protocol::OPT_LIST_META_CONTEXT, protocol::OPT_SET_META_CONTEXT] {
        let sent = wire::option(option, &wire::meta(b"db", &[]));
        assert_eq!(kinds(Tls::Off, &[sent]), [protocol::REP_ERR_INVALID]);
        let sent = [structured(), wire::option(option, &wire::meta(b"else", &[]))];
        assert_eq!(kinds(Tls::Off, &sent)[1], protocol::REP_ERR_UNKNOWN);
    }
}

#[test]
fn an_option_that_is_too_long_is_skipped_and_the_stream_stays_in_step() {
    let long = wire::option(protocol::OPT_INFO, &[0; 8193]);
    let list = wire::option(protocol::OPT_LIST, &[]);
    let expected = [protocol::REP_ERR_TOO_BIG, protocol::REP_SERVER, protocol::REP_ACK];
    assert_eq!(kinds(Tls::Off, &[long, list]), expected);
}

#[test]
fn a_length_beyond_any_handshake_ends_the_connection() {
    for length in [65_537, 0x7fff_ffff, 0x8000_0000, u32::MAX - 1, u32::MAX] {
        for option in 0..12 {
            let sent = [wire::option_claiming(option, length, &[0; 64])];
            assert_eq!(answers(Tls::Off, &sent), (vec![], false), "option {option}, {length}");
        }
    }
}

#[test]
fn the_sixty_fifth_option_ends_the_connection() {
    let options = vec![wire::option(77, &[]); 64];
    let (replies, open) = answers(Tls::Off, &options);
    assert!(open && replies.len() == 64);
    let options = vec![wire::option(77, &[]); 65];
    let (replies, open) = answers(Tls::Off, &options);
    assert!(!open && replies.len() == 64);
}

#[test]
fn an_option_with_the_wrong_magic_ends_the_connection() {
    let mut sent = wire::option(protocol::OPT_LIST, &[]);
    sent[7] ^= 1;
    assert_eq!(answers(Tls::Off, &[sent]), (vec![], false));
}

#[test]
fn while_stopping_options_are_refused_as_shutting_down() {
    let mut driver = Driver::new(Tls::Off);
    driver.feed(&wire::flags());
    driver.session.stop();
    driver.feed(&wire::option(protocol::OPT_GO, &wire::query(b"db", &[])));
    let mut reader = Reader(&driver.sent);
    reader.greeting();
    assert_eq!(reader.option_reply().1, protocol::REP_ERR_SHUTDOWN);
    assert!(driver.session.finished());
}
