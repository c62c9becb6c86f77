//! The NBD server's session, and the client: handshake and transmission.

use std::sync::{Mutex, PoisonError};

use dualrestore::device::Device;
use dualrestore::error::Result;
use dualrestore::format::nbd as protocol;
use dualrestore::nbd::{NbdDevice, Tls, Wire};

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

/// A server that has said all that it will ever say.
#[derive(Debug)]
struct Said(Mutex<Vec<u8>>);

impl Wire for Said {
    fn receive(&self, place: &mut [u8], _: bool, _: u64) -> Result<usize> {
        let mut rest = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let count = rest.len().min(place.len());
        place[..count].copy_from_slice(&rest[..count]);
        rest.drain(..count);
        Ok(count)
    }

    fn send(&self, _: &[u8]) -> Result<()> {
        Ok(())
    }

    fn interrupt(&self) {}
}

/// The first byte says whether TLS has begun.
pub fn nbd_client(bytes: &[u8]) {
    let Some((mode, bytes)) = bytes.split_first() else { return };
    let said = Box::new(Said(Mutex::new(bytes.to_vec())));
    let Ok(device) = NbdDevice::open(said, "db", mode % 2 == 1) else { return };
    let mut place = vec![0; 4096];
    let size = device.size();
    for at in [0, 8192] {
        let read = device.read_at(at, &mut place);
        assert!(read.is_err() || at + 4096 <= size, "only what there is is read");
        let told = device.next_data(at);
        if let Ok(Some(data)) = told {
            assert!(data.offset >= at && data.end() <= size && !data.is_empty(), "{data:?}");
        }
    }
}

/// What our own server says to such a client.
fn said(structured: bool) -> Vec<u8> {
    let service = RamService::new(64 << 10, Pace::AtOnce);
    let mut driver = Driver::with(service, Tls::Off);
    driver.feed(&wire::flags());
    if structured {
        driver.feed(&wire::option(protocol::OPT_STRUCTURED_REPLY, &[]));
        let contexts = wire::meta(b"db", &["base:allocation"]);
        driver.feed(&wire::option(protocol::OPT_SET_META_CONTEXT, &contexts));
    }
    driver.feed(&wire::option(protocol::OPT_GO, &wire::query(b"db", &[2, 3])));
    let entered = driver.sent.len();
    driver.feed(&wire::write(0, 99, 0, &[7; 8192]));
    let written = driver.sent.len();
    driver.feed(&wire::request(0, protocol::CMD_READ, 1, 0, 4096));
    driver.feed(&wire::request(0, protocol::CMD_BLOCK_STATUS, 2, 0, 64 << 10));
    driver.feed(&wire::request(0, protocol::CMD_READ, 3, 8192, 4096));
    // The answer to the write is not the client's.
    [&driver.sent[..entered], &driver.sent[written..]].concat()
}

pub(crate) fn client_seeds() -> Vec<Vec<u8>> {
    let (chunks, simple) = (said(true), said(false));
    let refused = protocol::option_reply(protocol::OPT_STRUCTURED_REPLY, 1 << 31 | 1, 0);
    let greeting = protocol::greeting();
    vec![
        [&[0][..], &chunks].concat(),
        // A client that asks for chunks is refused first.
        [&[0][..], &greeting, &refused, &simple[greeting.len()..]].concat(),
        [&[1][..], &chunks[greeting.len()..]].concat(),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_comes_to_the_data_with_each_of_its_seeds() {
        for (number, seed) in client_seeds().iter().enumerate() {
            let said = Box::new(Said(Mutex::new(seed[1..].to_vec())));
            let device = NbdDevice::open(said, "db", seed[0] == 1).expect("agreed");
            let mut place = [0; 4096];
            device.read_at(0, &mut place).expect("read");
            assert_eq!(place, [7; 4096], "{number}");
        }
    }
}
