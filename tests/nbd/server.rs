//! The server's threads on real sockets.

#![expect(clippy::disallowed_methods, reason = "clients open sockets and wait")]

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use dualrestore::error::ErrorKind;
use dualrestore::extent::ByteRange;
use dualrestore::format::nbd as protocol;
use dualrestore::nbd::{ExportTable, Server};

use crate::ram_service::{Pace, RamService};
use crate::wire::{self, Reader};

struct Fixture {
    service: Arc<RamService>,
    server: Server,
}

impl Fixture {
    fn new(pace: Pace) -> Self {
        let service = Arc::new(RamService::new(8 << 20, pace));
        let exports = Arc::new(ExportTable::new());
        exports.insert("db", "", service.clone()).expect("a new name");
        Self { service, server: Server::new(exports) }
    }

    /// A client that has said nothing yet.
    fn connect(&self) -> Client {
        let (ours, theirs) = UnixStream::pair().expect("a socket pair");
        self.server.serve(OwnedFd::from(theirs), None).expect("admitted");
        Client(ours)
    }

    /// A client past its handshake, with simple replies.
    fn enter(&self) -> Client {
        let mut client = self.connect();
        client.send(&wire::enter(b"db", false));
        let answer = client.receive(18 + 20 + 12 + 20);
        Reader(&answer).entered();
        client
    }
}

struct Client(UnixStream);

impl Client {
    fn send(&mut self, bytes: &[u8]) {
        self.0.write_all(bytes).expect("the server reads");
    }

    fn receive(&mut self, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        self.0.read_exact(&mut bytes).expect("the server answers");
        bytes
    }

    /// Everything until the server closes.
    fn rest(&mut self) -> Vec<u8> {
        let mut bytes = Vec::new();
        // A server that closes with bytes unread resets the connection: also an end.
        let _reset = self.0.read_to_end(&mut bytes);
        bytes
    }
}

/// Waits until the condition holds; the test's own time limit ends it otherwise.
fn until(condition: impl Fn() -> bool) {
    while !condition() {
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn requests_that_take_time_are_in_flight_together_and_answered_as_they_finish() {
    let fixture = Fixture::new(Pace::Held);
    let mut client = fixture.enter();
    for cookie in 0..64 {
        client.send(&wire::write(0, cookie, cookie * 512, &[cookie as u8; 512]));
    }
    until(|| fixture.service.held() == 64);
    assert_eq!(fixture.server.connections()[0].in_flight, 64);
    fixture.service.release();
    let bytes = client.receive(64 * 16);
    let mut reader = Reader(&bytes);
    let cookies: Vec<u64> = (0..64).map(|_| reader.reply(0).cookie()).collect();
    assert_eq!(cookies, (0..64).rev().collect::<Vec<_>>(), "the latest was answered first");
}

#[test]
fn large_requests_of_several_clients_cross_without_mixing() {
    for pace in [Pace::AtOnce, Pace::Elsewhere] {
        let fixture = Fixture::new(pace);
        std::thread::scope(|scope| {
            for index in 0..4u64 {
                let mut client = fixture.enter();
                scope.spawn(move || {
                    let (offset, length) = (index << 21, 1usize << 21);
                    let bytes: Vec<u8> =
                        (0..length).map(|at| (at / 99) as u8 ^ index as u8).collect();
                    for _ in 0..3 {
                        client.send(&wire::write(0, 1, offset, &bytes));
                        assert_eq!(Reader(&client.receive(16)).reply(0).error(), 0);
                        client.send(&wire::request(
                            0,
                            protocol::CMD_READ,
                            2,
                            offset,
                            length as u32,
                        ));
                        let answer = client.receive(16 + length);
                        assert!(answer[16..] == bytes, "client {index}");
                    }
                });
            }
        });
        assert_eq!(fixture.server.totals().connections, 4);
    }
}

#[test]
fn a_read_that_fails_in_place_is_submitted() {
    let mut service = RamService::new(1 << 20, Pace::AtOnce);
    service.bad_byte = Some((0, 5));
    let exports = Arc::new(ExportTable::new());
    exports.insert("db", "", Arc::new(service)).expect("a new name");
    let unused = Arc::new(RamService::new(512, Pace::AtOnce));
    let fixture = Fixture { service: unused, server: Server::new(exports) };
    let mut client = fixture.enter();
    client.send(&wire::request(0, protocol::CMD_READ, 1, 0, 512));
    client.send(&wire::request(0, protocol::CMD_READ, 2, 512, 512));
    let bytes = client.receive(16 + 16 + 512);
    let mut reader = Reader(&bytes);
    let mut answers = [reader.reply(512), reader.reply(512)];
    answers.sort_by_key(wire::Reply::cookie);
    assert_eq!(answers.map(|answer| answer.error()), [protocol::EIO, 0]);
}

#[test]
fn a_completion_that_is_dropped_is_answered_as_shut_down() {
    let fixture = Fixture::new(Pace::Held);
    let mut client = fixture.enter();
    client.send(&wire::request(0, protocol::CMD_FLUSH, 1, 0, 0));
    until(|| fixture.service.held() == 1);
    fixture.service.forget();
    assert_eq!(Reader(&client.receive(16)).reply(0).error(), protocol::ESHUTDOWN);
}

#[test]
fn a_removed_export_ends_its_connections_and_no_others() {
    let fixture = Fixture::new(Pace::AtOnce);
    let other = Arc::new(RamService::new(1 << 20, Pace::AtOnce));
    fixture.server.exports().insert("other", "", other).expect("a new name");
    let mut client = fixture.enter();
    let mut stays = fixture.connect();
    stays.send(&wire::enter(b"other", false));
    stays.receive(70);
    assert!(fixture.server.exports().remove("db"));
    assert!(!fixture.server.exports().remove("db"));
    assert_eq!(client.rest(), b"");
    stays.send(&wire::request(0, protocol::CMD_FLUSH, 1, 0, 0));
    assert_eq!(Reader(&stays.receive(16)).reply(0).error(), 0);
    let again = fixture.server.exports().insert("db", "", fixture.service.clone());
    again.expect("the name is free again");
    fixture.enter();
}

#[test]
fn a_client_that_vanishes_frees_its_place_when_its_requests_are_done() {
    let fixture = Fixture::new(Pace::Held);
    let mut client = fixture.enter();
    client.send(&wire::write(0, 1, 0, &[7; 512]));
    until(|| fixture.service.held() == 1);
    drop(client);
    assert_eq!(fixture.server.connections().len(), 1);
    fixture.service.release();
    until(|| fixture.server.connections().is_empty());
    assert_eq!(fixture.service.contents(ByteRange::new(0, 1)), [7]);
}

#[test]
fn more_connections_than_possible_are_refused_and_closed() {
    let fixture = Fixture::new(Pace::AtOnce);
    let clients: Vec<Client> = (0..100).map(|_| fixture.connect()).collect();
    let (mut ours, theirs) = UnixStream::pair().expect("a socket pair");
    let refused = fixture.server.serve(OwnedFd::from(theirs), None).expect_err("too many");
    assert_eq!(refused.kind(), ErrorKind::Busy);
    assert_eq!(ours.read(&mut [0; 1]).expect("closed"), 0);
    drop(clients);
    until(|| fixture.server.connections().is_empty());
    fixture.enter();
}

#[test]
fn shutdown_ends_idle_half_shaken_and_stalled_clients() {
    let fixture = Fixture::new(Pace::AtOnce);
    let mut silent: Vec<Client> = (0..30).map(|_| fixture.connect()).collect();
    let mut half_shaken: Vec<Client> = (0..30).map(|_| fixture.connect()).collect();
    half_shaken.iter_mut().for_each(|client| client.send(&wire::flags()));
    let mut idle: Vec<Client> = (0..30).map(|_| fixture.enter()).collect();
    let mut stalled = fixture.enter();
    for cookie in 0..100 {
        stalled.send(&wire::request(0, protocol::CMD_READ, cookie, 0, 1 << 20));
    }
    let mut torn = fixture.enter();
    torn.send(&wire::request(0, protocol::CMD_WRITE, 1, 0, 4 << 20));
    fixture.server.shutdown().expect("all threads end in time");
    assert!(fixture.server.connections().is_empty());
    for client in silent.iter_mut().chain(&mut half_shaken).chain(&mut idle) {
        client.rest();
    }
    let (_ours, theirs) = UnixStream::pair().expect("a socket pair");
    assert!(fixture.server.serve(OwnedFd::from(theirs), None).is_err());
}

#[test]
fn shutdown_lets_requests_in_flight_finish() {
    let fixture = Fixture::new(Pace::Held);
    let mut client = fixture.enter();
    client.send(&wire::write(0, 1, 0, &[7; 512]));
    until(|| fixture.service.held() == 1);
    std::thread::scope(|scope| {
        let ended = scope.spawn(|| fixture.server.shutdown());
        until(|| {
            let (_ours, theirs) = UnixStream::pair().expect("a socket pair");
            fixture.server.serve(OwnedFd::from(theirs), None).is_err()
        });
        fixture.service.release();
        ended.join().expect("no panic").expect("all threads end");
    });
    let expected = wire::Reply::Simple { cookie: 1, error: 0, bytes: vec![] };
    assert_eq!(Reader(&client.rest()).reply(0), expected);
}

#[test]
fn a_tcp_connection_is_served_and_counted() {
    let fixture = Fixture::new(Pace::AtOnce);
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let mut client = TcpStream::connect(listener.local_addr().expect("bound")).expect("open");
    let (theirs, _) = listener.accept().expect("connected");
    let connection = fixture.server.serve(OwnedFd::from(theirs), None).expect("admitted");
    let mut sent = wire::enter(b"db", true);
    sent.extend(wire::request(0, protocol::CMD_READ, 1, 0, 4096));
    sent.extend(wire::request(0, 99, 2, 0, 0));
    client.write_all(&sent).expect("the server reads");
    let mut answer = vec![0; 18 + 20 + 20 + 12 + 20 + 20 + 8 + 4096 + 20];
    client.read_exact(&mut answer).expect("the server answers");
    until(|| fixture.server.connections().iter().any(|open| open.requests == 2));
    let report = fixture.server.connections().remove(0);
    assert_eq!(report.connection, connection);
    assert_eq!(report.bytes_received, sent.len() as u64);
    drop(client);
    until(|| fixture.server.connections().is_empty());
    let totals = fixture.server.totals();
    assert_eq!((totals.requests, totals.bytes_received), (2, sent.len() as u64));
}

#[test]
fn an_export_nobody_could_use_is_refused() {
    let table = ExportTable::new();
    let service = || Arc::new(RamService::new(1 << 20, Pace::AtOnce));
    table.insert("db", "", service()).expect("a new name");
    assert_eq!(table.insert("db", "", service()).expect_err("taken").kind(), ErrorKind::Busy);
    for name in ["a".repeat(256), "a\0b".to_owned()] {
        let refused = table.insert(&name, "", service()).expect_err("no such name");
        assert_eq!(refused.kind(), ErrorKind::Usage);
    }
    let mut odd = RamService::new((1 << 20) + 512, Pace::AtOnce);
    odd.sector_size = 4096;
    assert!(table.insert("odd", "", Arc::new(odd)).is_err());
    let mut bare = RamService::new(1 << 20, Pace::AtOnce);
    bare.sector_size = 0;
    assert!(table.insert("bare", "", Arc::new(bare)).is_err());
}

#[test]
fn a_handshake_that_does_not_end_is_ended() {
    let fixture = Fixture::new(Pace::AtOnce);
    let (mut silent, mut dribbling) = (fixture.connect(), fixture.connect());
    let mut served = fixture.enter();
    dribbling.send(&wire::flags());
    while dribbling.0.write_all(&[0x49]).is_ok() {
        std::thread::sleep(Duration::from_millis(1000));
    }
    assert_eq!(silent.rest().len(), 18, "the greeting alone");
    served.send(&wire::request(0, protocol::CMD_FLUSH, 1, 0, 0));
    assert_eq!(Reader(&served.receive(16)).reply(0).error(), 0);
}
