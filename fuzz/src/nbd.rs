//! The NBD server's session: handshake and transmission.

use dualrestore::format::nbd as protocol;
use dualrestore::nbd::Tls;

use crate::ram_service::{Pace, RamService};
use crate::session_driver::Driver;
use crate::wire;

/// The first byte says how far the client has come, and what is asked of it.
pub fn nbd(bytes: &[u8]) {
    let Some((mode, bytes)) = bytes.split_first() else { return };
    let tls = [Tls::Off, Tls::Required, Tls::Done][usize::from(mode / 2 % 3)];
    let mut driver = Driver::with(RamService::new(64 << 10, Pace::AtOnce), tls);
    driver.stalled = mode / 6 % 2 == 1;
    driver.feed(&match (mode % 2, mode / 12 % 2) {
        (0, _) => wire::flags(),
        (_, 0) => wire::enter(b"db", true),
        _ => wire::enter_extended(b"db", &["base:allocation", "qemu:dirty-bitmap:missing"]),
    });
    for piece in bytes.chunks(1000) {
        driver.feed(piece);
        assert!(driver.session.space().len() <= 64 << 20, "memory is bounded");
        assert!(driver.session.pending() <= 1 << 20, "answers are bounded");
    }
    driver.session.input_ended();
    driver.stalled = false;
    driver.turn();
    assert!(driver.session.finished() || driver.tls_began, "a session ends with its input");
}

pub(crate) fn seeds() -> Vec<Vec<u8>> {
    let select = wire::meta(b"db", &["base:allocation", "qemu:dirty-bitmap:missing"]);
    let handshake = [
        vec![0],
        wire::option(protocol::OPT_LIST, &[]),
        wire::option(protocol::OPT_INFO, &wire::query(b"none", &[3])),
        wire::option(protocol::OPT_STRUCTURED_REPLY, &[]),
        wire::option(protocol::OPT_LIST_META_CONTEXT, &wire::meta(b"db", &["base:"])),
        wire::option(protocol::OPT_SET_META_CONTEXT, &select),
        wire::option(protocol::OPT_GO, &wire::query(b"db", &[0, 1, 3])),
        wire::request(0, protocol::CMD_BLOCK_STATUS, 5, 0, 4096),
    ]
    .concat();
    let transmission = [
        vec![1],
        wire::write(1, 1, 512, &[3; 1024]),
        wire::request(0, protocol::CMD_READ, 2, 0, 2048),
        wire::request(2, protocol::CMD_WRITE_ZEROES, 3, 0, 4096),
        wire::request(0, protocol::CMD_TRIM, 6, 1024, 512),
        wire::request(0, protocol::CMD_FLUSH, 7, 0, 0),
        wire::request(0, protocol::CMD_CACHE, 8, 0, 512),
        wire::request(0, protocol::CMD_DISC, 0, 0, 0),
    ]
    .concat();
    let extended = [
        vec![13],
        wire::loaded(1, protocol::CMD_WRITE, 1, 512, &[3; 1024]),
        wire::extended(4, protocol::CMD_READ, 2, 0, 2048),
        wire::extended(0x12, protocol::CMD_WRITE_ZEROES, 3, 0, 4096),
        wire::extended(0, protocol::CMD_TRIM, 6, 1024, 1 << 33),
        wire::loaded(8, protocol::CMD_BLOCK_STATUS, 7, 0, &wire::filter(4096, &[2, 1])),
        wire::extended(0, protocol::CMD_DISC, 0, 0, 0),
    ]
    .concat();
    let negotiated = [
        vec![0],
        wire::option(protocol::OPT_EXTENDED_HEADERS, &[]),
        wire::option(protocol::OPT_GO, &wire::query(b"db", &[])),
        wire::extended(0, protocol::CMD_READ, 2, 0, 512),
    ]
    .concat();
    let encrypted = [vec![2], wire::option(protocol::OPT_STARTTLS, &[])].concat();
    vec![handshake, transmission, extended, negotiated, encrypted]
}
