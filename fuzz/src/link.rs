//! The link's connections: frames of the peer, in any state.

use dualrestore::clock::Instant;
use dualrestore::extent::ByteRange;
use dualrestore::format::frames::{BootId, Class, Hello, KNOWN_FEATURES, Role, Welcome};
use dualrestore::link::{Connection, Event, Message};
use dualrestore::units::{BlockSize, Geometry};
use uuid::Uuid;

const START: Instant = Instant(1000);
const LINK: &[u8] = include_bytes!("../../tests/golden/link-v1.bin");
const PACKED: &[u8] = include_bytes!("../../tests/golden/link-v1-packed.bin");

fn geometry() -> Geometry {
    Geometry::new(10 << 30, BlockSize::DEFAULT).expect("valid")
}

/// What the golden frames say of primary and backup.
fn hello(class: Class) -> Hello {
    let reads = class != Class::Mirror;
    Hello {
        class,
        role: Role::Primary,
        name: "db".to_owned(),
        volume: Uuid::from_bytes(std::array::from_fn(|at| 0x10 + at as u8)),
        geometry: geometry(),
        generation: 3,
        session_epoch: if reads { 7 } else { 0 },
        boot_id: BootId(std::array::from_fn(|at| 0x20 + at as u8)),
        peer_boot_id: if reads { backup_boot() } else { BootId::default() },
        features_offered: KNOWN_FEATURES,
        features_required: 0,
    }
}

fn backup_boot() -> BootId {
    BootId(std::array::from_fn(|at| 0x30 + at as u8))
}

fn welcome(hello: &Hello) -> Welcome {
    Welcome {
        volume: hello.volume,
        geometry: hello.geometry,
        generation: hello.generation,
        session_epoch: 7,
        applied_sequence: 0,
        boot_id: backup_boot(),
        backup: Uuid::from_u128(9),
        features: hello.features_offered & KNOWN_FEATURES,
    }
}

fn class_of(mode: u8) -> Class {
    [Class::Mirror, Class::Demand, Class::Bulk][usize::from(mode % 3)]
}

/// Everything that waits on one side, to the other.
fn carry(source: &mut Connection, target: &mut Connection) {
    while let Some(batch) = source.take_outgoing(1 << 16, START) {
        target.receive(&batch, START).expect("two of ours understand each other");
    }
}

/// Primary and backup with an open session of that class.
fn pair(class: Class) -> (Connection, Connection) {
    let mut primary = Connection::client(hello(class), START).expect("a sound Hello");
    let mut backup = Connection::server(START);
    carry(&mut primary, &mut backup);
    let heard = backup.next_event();
    assert!(matches!(heard, Some(Event::HelloReceived(_))), "{heard:?}");
    backup.accept(&welcome(&hello(class)), START).expect("waiting");
    carry(&mut backup, &mut primary);
    let heard = primary.next_event();
    assert!(matches!(heard, Some(Event::Welcomed(_))), "{heard:?}");
    (primary, backup)
}

/// Gives a connection the bytes, and looks at what it makes of them.
fn feed(mut connection: Connection, bytes: &[u8]) {
    for piece in bytes.chunks(777) {
        let _told_as_an_event = connection.receive(piece, START);
        while let Some(event) = connection.next_event() {
            if let Event::HelloReceived(hello) = event {
                // It may have broken off in the same breath.
                let _accepted = connection.accept(&welcome(&hello), START);
            } else if let Event::Received(message) = event {
                assert!(message.range().is_none_or(|range| geometry().contains(range)));
            }
        }
        assert!(connection.outgoing_bytes() <= 1 << 20, "what is sent is bounded");
        while connection.take_outgoing(1 << 16, START).is_some() {}
    }
    connection.closed("the stream ended");
    connection.tick(Instant(1_000_000_000));
}

/// What a backup may send to a primary; the first byte says the class and whether it is welcomed.
pub fn link_primary(bytes: &[u8]) {
    let Some((mode, bytes)) = bytes.split_first() else { return };
    let class = class_of(*mode);
    if mode / 3 % 2 == 0 {
        feed(Connection::client(hello(class), START).expect("a sound Hello"), bytes);
        return;
    }
    let (mut primary, _) = pair(class);
    // So that some answers have a question.
    for tag in 1..4 {
        let range = ByteRange::new(4096 * tag, 4096);
        let asked = match class {
            Class::Mirror => Message::Flush { sequence: tag },
            Class::Demand | Class::Bulk => Message::Fetch { tag, range, after_sequence: 0 },
        };
        primary.send(asked).expect("an open session");
    }
    while primary.take_outgoing(1 << 16, START).is_some() {}
    feed(primary, bytes);
}

/// What a primary may send to a backup.
pub fn link_backup(bytes: &[u8]) {
    let Some((mode, bytes)) = bytes.split_first() else { return };
    if mode / 3 % 2 == 0 {
        feed(Connection::server(START), bytes);
    } else {
        feed(pair(class_of(*mode)).1, bytes);
    }
}

/// The golden frames, whole and one by one, in each class.
pub(crate) fn seeds() -> Vec<Vec<u8>> {
    let mut seeds = Vec::new();
    for mode in 0..6 {
        seeds.push([&[mode], LINK].concat());
        seeds.push([&[mode], PACKED].concat());
        let starts: Vec<usize> = (0..LINK.len().saturating_sub(32))
            .filter(|at| at % 8 == 0 && LINK[*at..].starts_with(&LINK[..2]))
            .collect();
        for pair in starts.windows(2).take(8) {
            seeds.push([&[mode], &LINK[pair[0]..pair[1]]].concat());
        }
    }
    seeds
}
