//! Real clients against the server on a Unix socket, as their users run them.

#![expect(clippy::disallowed_methods, reason = "clients are programs, images are files")]

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use dualrestore::extent::ByteRange;
use dualrestore::nbd::{ExportTable, Server};

use crate::ram_service::{Pace, RamService};

const SIZE: u64 = 24 << 20;

/// A server with the exports `db` and `frozen` behind a listening socket.
struct Listening {
    directory: tempfile::TempDir,
    db: Arc<RamService>,
}

impl Listening {
    fn new(pace: Pace) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let db = Arc::new(RamService::new(SIZE, pace));
        let mut frozen = RamService::new(SIZE, pace);
        frozen.read_only = true;
        let exports = Arc::new(ExportTable::new());
        exports.insert("db", "the ledger", db.clone()).expect("a new name");
        exports.insert("frozen", "", Arc::new(frozen)).expect("a new name");
        let listener = UnixListener::bind(directory.path().join("sock")).expect("a free path");
        let server = Server::new(exports);
        // The thread and the server live until the test process ends.
        std::thread::spawn(move || {
            while let Ok((socket, _)) = listener.accept() {
                server.serve(OwnedFd::from(socket), None).expect("admitted");
            }
        });
        Self { directory, db }
    }

    fn uri(&self, export: &str) -> String {
        let socket = self.directory.path().join("sock");
        format!("nbd+unix:///{export}?socket={}", socket.display())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn image(&self, name: &str) -> PathBuf {
        let path = self.path(name);
        std::fs::write(&path, pattern()).expect("room for an image");
        path
    }

    fn contents(&self) -> Vec<u8> {
        self.db.contents(ByteRange::new(0, SIZE))
    }
}

/// Data, holes of many sizes, data.
fn pattern() -> Vec<u8> {
    let filled = |at: u64| (at >> 16) % 3 != 1 && !(4 << 20..9 << 20).contains(&at);
    let byte = |at: u64| if filled(at) { (at % 251) as u8 + 1 } else { 0 };
    (0..SIZE).map(byte).collect()
}

/// What the tool prints; the test fails if the tool does, or is not installed.
fn run(package: &str, tool: &str, arguments: &[&str]) -> String {
    let output = Command::new(tool).args(arguments).output();
    let output = output.unwrap_or_else(|error| {
        panic!("{tool}: {error}: install the Debian package {package}");
    });
    let (stdout, stderr) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{tool} {arguments:?}\n{stdout}\n{stderr}");
    stdout.into_owned() + &stderr
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a plain path")
}

#[test]
fn qemu_img_converts_compares_and_maps() {
    for pace in [Pace::AtOnce, Pace::Elsewhere] {
        let listening = Listening::new(pace);
        let (image, uri) = (listening.image("image"), listening.uri("db"));
        let qemu_img = |arguments: &[&str]| run("qemu-utils", "qemu-img", arguments);
        qemu_img(&["convert", "-n", "-W", "-f", "raw", "-O", "raw", text(&image), &uri]);
        assert!(listening.contents() == pattern());
        qemu_img(&["compare", "-f", "raw", "-F", "raw", text(&image), &uri]);
        assert!(qemu_img(&["info", &uri]).contains("24 MiB (25165824 bytes)"));
        let map = qemu_img(&["map", "--output=json", "-f", "raw", &uri]);
        assert!(map.contains("\"start\": 4194304, \"length\": 5242880"), "{map}");
        let copy = listening.path("copy");
        qemu_img(&["convert", "-f", "raw", "-O", "raw", &uri, text(&copy)]);
        assert!(std::fs::read(copy).expect("written") == pattern());
    }
}

#[test]
fn qemu_img_sees_missing_blocks_as_a_bitmap() {
    let listening = Listening::new(Pace::AtOnce);
    let socket = listening.path("sock");
    let options = format!(
        "driver=nbd,server.type=unix,server.path={},export=db,\
         x-dirty-bitmap=qemu:dirty-bitmap:missing",
        socket.display()
    );
    let map = run("qemu-utils", "qemu-img", &["map", "--output=json", "--image-opts", &options]);
    assert!(map.contains("\"start\": 65536, \"length\": 65536"), "{map}");
}

#[test]
fn qemu_io_reads_writes_zeroes_discards_and_flushes() {
    let listening = Listening::new(Pace::Elsewhere);
    let uri = listening.uri("db");
    let commands = [
        "write -P 7 0 1M",
        "write -f -P 8 512 512",
        "write -z 64k 64k",
        "write -z -u 128k 64k",
        "discard 192k 64k",
        "flush",
        "read -P 7 1024 64512",
        "read -P 8 512 512",
        "read -P 0 64k 192k",
        "read -P 7 256k 768k",
    ];
    let mut arguments = vec!["-f", "raw"];
    commands.iter().for_each(|command| arguments.extend(["-c", command]));
    arguments.push(&uri);
    let said = run("qemu-utils", "qemu-io", &arguments);
    assert!(!said.contains("failed"), "{said}");
    let frozen = listening.uri("frozen");
    let read = run("qemu-utils", "qemu-io", &["-r", "-f", "raw", "-c", "read -P 0 0 1M", &frozen]);
    assert!(!read.contains("failed"), "{read}");
}

#[test]
fn nbdinfo_lists_exports_and_maps() {
    let listening = Listening::new(Pace::AtOnce);
    let nbdinfo = |arguments: &[&str]| run("libnbd-bin", "nbdinfo", arguments);
    let list = nbdinfo(&["--list", "--json", &listening.uri("")]);
    assert!(list.contains("\"export-name\": \"frozen\""), "{list}");
    assert!(list.contains("\"description\": \"the ledger\""), "{list}");
    let about = nbdinfo(&["--json", &listening.uri("db")]);
    for words in [
        "\"protocol\": \"newstyle-fixed\"",
        "\"structured\": true",
        "\"export-size\": 25165824",
        "\"can_multi_conn\": true",
        "\"can_df\": true",
        "\"block_size_minimum\": 512",
        "\"block_size_maximum\": 33554432",
        "base:allocation",
        "qemu:dirty-bitmap:missing",
    ] {
        assert!(about.contains(words), "{words} in {about}");
    }
    let map = nbdinfo(&["--map", &listening.uri("db")]);
    assert!(map.contains("hole,zero"), "{map}");
    let map = nbdinfo(&["--map=qemu:dirty-bitmap:missing", "--json", &listening.uri("db")]);
    assert!(map.contains("\"offset\": 65536, \"length\": 65536"), "{map}");
}

#[test]
fn nbdcopy_copies_in_and_out_over_several_connections() {
    for pace in [Pace::AtOnce, Pace::Elsewhere] {
        let listening = Listening::new(pace);
        let (image, uri) = (listening.image("image"), listening.uri("db"));
        let nbdcopy = |arguments: &[&str]| run("libnbd-bin", "nbdcopy", arguments);
        nbdcopy(&["--connections=4", "--requests=16", "--flush", text(&image), &uri]);
        assert!(listening.contents() == pattern());
        let copy = listening.path("copy");
        nbdcopy(&["--connections=4", "--request-size=1048576", &uri, text(&copy)]);
        assert!(std::fs::read(copy).expect("written") == pattern());
    }
}

#[test]
fn nbd_client_lists_the_exports() {
    let listening = Listening::new(Pace::AtOnce);
    let list = run("nbd-client", "nbd-client", &["-l", "-u", text(&listening.path("sock"))]);
    assert!(list.contains("db") && list.contains("frozen"), "{list}");
}

#[test]
fn qemu_nbd_lists_the_exports_and_hands_one_on() {
    let listening = Listening::new(Pace::Elsewhere);
    let socket = listening.path("sock");
    let list = run("qemu-utils", "qemu-nbd", &["--list", "-k", text(&socket)]);
    assert!(list.contains("export: 'frozen'") && list.contains("base:allocation"), "{list}");
    let (behind, image) = (listening.path("behind"), listening.image("image"));
    let mut relay = Command::new("qemu-nbd");
    relay.args(["-f", "raw", "-x", "relayed", "-k", text(&behind), &listening.uri("db")]);
    let mut relay = relay.spawn().expect("qemu-nbd is there, as above");
    while !behind.exists() {
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
    let relayed = format!("nbd+unix:///relayed?socket={}", behind.display());
    // It serves one client and ends with it.
    run("libnbd-bin", "nbdcopy", &["--flush", text(&image), &relayed]);
    assert!(relay.wait().expect("ended").success());
    assert!(listening.contents() == pattern());
}

/// What Debian's Python does with libnbd's binding: `h` is a connection to `db`, `uri` leads there.
const BINDING: &str = r#"
import nbd
assert h.get_size() == 24 << 20 and h.can_multi_conn() and h.can_df() and not h.is_read_only()
h.pwrite(b"a" * 4096, 4096, nbd.CMD_FLAG_FUA)
h.zero(512, 4096); h.trim(512, 7680); h.cache(4096, 0)
assert h.pread(4096, 4096) == bytes(512) + b"a" * 3072 + bytes(512)
seen = []
h.pread_structured(1024, 4096, lambda data, at, status, error: seen.append((at, status)))
assert seen == [(4096, nbd.READ_DATA)], seen
runs = {}
h.block_status(1 << 20, 0, lambda name, at, entries, error: runs.update({name: entries}))
assert runs["base:allocation"][0] == 1 << 16, runs
assert sum(runs["qemu:dirty-bitmap:missing"][::2]) == 1 << 20, runs
# Sixty-four writes under way at a time, and what another connection reads after a flush.
buffers = [nbd.Buffer.from_bytearray(bytearray([at]) * 8192) for at in range(64)]
cookies = [h.aio_pwrite(buffer, 1 << 20 | at << 13) for at, buffer in enumerate(buffers)]
while h.aio_in_flight():
    h.poll(-1)
assert all(h.aio_command_completed(cookie) for cookie in cookies)
h.flush()
other = nbd.NBD(); other.connect_uri(uri)
assert other.pread(64 << 13, 1 << 20) == b"".join(bytes([at]) * 8192 for at in range(64))
h.set_strict_mode(0)
for wrong in (lambda: h.pread(512, 24 << 20), lambda: h.pwrite(b"x", 1), lambda: h.trim(0, 0, 64)):
    try:
        wrong()
    except nbd.Error as problem:
        assert problem.errno in ("EINVAL", "ENOSPC"), problem
    else:
        raise AssertionError("not refused")
assert h.pread(1, 5000) == b"a"
other.shutdown(); h.shutdown()
"#;

#[test]
fn nbdsh_and_its_python_binding_read_write_and_are_refused() {
    for pace in [Pace::AtOnce, Pace::Elsewhere] {
        let listening = Listening::new(pace);
        let uri = listening.uri("db");
        let begin = "h.add_meta_context('base:allocation'); \
                     h.add_meta_context('qemu:dirty-bitmap:missing')";
        let connect = format!("uri = {uri:?}; h.connect_uri(uri)");
        // Debian's Python has the binding, not one of a virtual environment.
        let words = ["PATH=/usr/bin:/bin", "nbdsh", "-c", begin, "-c", &connect, "-c", BINDING];
        run("python3-libnbd", "env", &words);
    }
}

#[test]
fn fio_verifies_what_it_wrote() {
    for pace in [Pace::AtOnce, Pace::Elsewhere] {
        let listening = Listening::new(pace);
        let uri = format!("--uri={}", listening.uri("db"));
        run(
            "fio",
            "fio",
            &[
                "--name=verify",
                "--ioengine=nbd",
                &uri,
                "--rw=randrw",
                "--bssplit=4k/60:512/10:64k/20:256k/10",
                "--size=16M",
                "--io_size=32M",
                "--iodepth=32",
                "--verify=crc32c",
                "--verify_fatal=1",
                "--fsync=64",
                "--verify_state_save=0",
            ],
        );
    }
}
