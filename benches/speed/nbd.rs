//! The NBD export of a primary in memory, seen by a client on a socket pair: 4 KiB at random
//! places, one at a time and 32 at a time, and 1 MiB one after the other.

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use criterion::{Criterion, Throughput};
use dualrestore::device::{FileDirectory, RamDevice};
use dualrestore::format::nbd::{
    CMD_FLUSH, CMD_READ, CMD_WRITE, FIXED_NEWSTYLE, NO_ZEROES, OPT_GO, OPTION_MAGIC, REP_ACK,
    REQUEST_MAGIC, SIMPLE_REPLY_BYTES,
};
use dualrestore::nbd::{ExportTable, Server};
use dualrestore::volume::engine::Engine;
use dualrestore::volume::primary::{MirrorPolicy, Options, PrimaryVolume};

use crate::{BLOCK, VOLUME_BYTES, geometry, scattered, scratch};

const GREETING_BYTES: usize = 18;
const OPTION_REPLY_HEADER_BYTES: usize = 20;

/// One connection, in transmission, with simple replies.
struct Client {
    socket: UnixStream,
    outgoing: Vec<u8>,
    incoming: Vec<u8>,
}

impl Client {
    fn new(mut socket: UnixStream) -> Self {
        socket.read_exact(&mut [0; GREETING_BYTES]).expect("a greeting");
        let mut hello = u32::from(FIXED_NEWSTYLE | NO_ZEROES).to_be_bytes().to_vec();
        hello.extend_from_slice(&OPTION_MAGIC.to_be_bytes());
        hello.extend_from_slice(&OPT_GO.to_be_bytes());
        // An empty name (the only export), no items.
        hello.extend_from_slice(&[0, 0, 0, 6, 0, 0, 0, 0, 0, 0]);
        socket.write_all(&hello).expect("connected");
        loop {
            let mut header = [0; OPTION_REPLY_HEADER_BYTES];
            socket.read_exact(&mut header).expect("a reply");
            let number =
                |at: usize| u32::from_be_bytes(header[at..at + 4].try_into().expect("four bytes"));
            socket.read_exact(&mut vec![0; number(16) as usize]).expect("its payload");
            if number(12) == REP_ACK {
                return Self { socket, outgoing: Vec::new(), incoming: Vec::new() };
            }
        }
    }

    fn add(&mut self, command: u16, offset: u64, length: u32) {
        self.outgoing.extend_from_slice(&REQUEST_MAGIC.to_be_bytes());
        self.outgoing.extend_from_slice(&0u16.to_be_bytes());
        self.outgoing.extend_from_slice(&command.to_be_bytes());
        self.outgoing.extend_from_slice(&0u64.to_be_bytes());
        self.outgoing.extend_from_slice(&offset.to_be_bytes());
        self.outgoing.extend_from_slice(&length.to_be_bytes());
    }

    /// Sends what was added and waits for all replies.
    fn exchange(&mut self, requests: usize, bytes_expected: usize) {
        self.socket.write_all(&self.outgoing).expect("connected");
        self.outgoing.clear();
        self.incoming.resize(requests * SIMPLE_REPLY_BYTES + bytes_expected, 0);
        self.socket.read_exact(&mut self.incoming).expect("all replies");
        assert_eq!(self.incoming[4..8], [0; 4], "no error");
    }

    fn read(&mut self, offsets: &mut impl Iterator<Item = u64>, requests: usize, length: u32) {
        for offset in offsets.take(requests) {
            self.add(CMD_READ, offset, length);
        }
        self.exchange(requests, requests * length as usize);
    }

    fn write(&mut self, offsets: &mut impl Iterator<Item = u64>, requests: usize, bytes: &[u8]) {
        for offset in offsets.take(requests) {
            self.add(CMD_WRITE, offset, u32::try_from(bytes.len()).expect("small"));
            self.outgoing.extend_from_slice(bytes);
        }
        self.exchange(requests, 0);
    }

    fn flush(&mut self) {
        self.add(CMD_FLUSH, 0, 0);
        self.exchange(1, 0);
    }
}

/// A primary without a backup, all of it current.
fn primary(state: &tempfile::TempDir) -> Arc<PrimaryVolume> {
    let directory = FileDirectory::open(state.path(), false).expect("just made");
    let device = Arc::new(RamDevice::new(VOLUME_BYTES));
    let options = Options {
        policy: MirrorPolicy::Flush,
        backup: false,
        strict: false,
        missing_deadline_ms: 1000,
    };
    let engine = Engine::new().expect("threads");
    PrimaryVolume::open("v", Arc::new(directory), device, true, geometry(), options, engine)
        .expect("made empty")
}

pub fn serve(criterion: &mut Criterion) {
    let state = scratch();
    let exports = Arc::new(ExportTable::new());
    exports.insert("v", "", primary(&state)).expect("a new name");
    let server = Server::new(exports);
    let (ours, theirs) = UnixStream::pair().expect("two sockets");
    server.serve(OwnedFd::from(theirs), None).expect("admitted");
    let mut client = Client::new(ours);
    let mut random = scattered(VOLUME_BYTES / BLOCK).map(|block| block * BLOCK);
    let mut sequential = (0..VOLUME_BYTES).step_by(1 << 20).cycle();
    let (block, page) = (BLOCK as u32, [0x5a; BLOCK as usize]);

    let mut group = criterion.benchmark_group("NBD export in memory");
    group.throughput(Throughput::Bytes(BLOCK));
    group.bench_function("4 KiB random read", |bencher| {
        bencher.iter(|| client.read(&mut random, 1, block));
    });
    group.bench_function("4 KiB random write and flush", |bencher| {
        bencher.iter(|| {
            client.write(&mut random, 1, &page);
            client.flush();
        });
    });
    group.throughput(Throughput::Bytes(32 * BLOCK));
    group.bench_function("4 KiB random read, 32 at a time", |bencher| {
        bencher.iter(|| client.read(&mut random, 32, block));
    });
    group.bench_function("4 KiB random write, 32 at a time", |bencher| {
        bencher.iter(|| client.write(&mut random, 32, &page));
    });
    group.throughput(Throughput::Bytes(1 << 20));
    group.bench_function("1 MiB sequential read", |bencher| {
        bencher.iter(|| client.read(&mut sequential, 1, 1 << 20));
    });
    let large = vec![0x5a; 1 << 20];
    group.bench_function("1 MiB sequential write", |bencher| {
        bencher.iter(|| client.write(&mut sequential, 1, &large));
    });
    group.finish();
}
