//! Both sides of a connection, carried to each other in pieces by a simulated clock.

use uuid::Uuid;

use super::*;
use crate::device::Payload;
use crate::extent::ByteRange;
use crate::format::frames::{
    BootId, Content, CutName, FEATURE_CHANGES, FEATURE_PACKED, KNOWN_FEATURES, Role,
};
use crate::limits::LINK_REQUESTS_MAX;
use crate::units::{BlockSize, Geometry, MIB};

const START: Instant = Instant(1000);
const PRIMARY: BootId = BootId([1; 16]);
const BACKUP: BootId = BootId([2; 16]);

fn hello(class: Class) -> Hello {
    let reads = class != Class::Mirror;
    Hello {
        class,
        role: Role::Primary,
        name: "db".to_owned(),
        volume: Uuid::from_u128(7),
        geometry: Geometry::new(MIB, BlockSize::DEFAULT).expect("valid"),
        generation: 3,
        session_epoch: u64::from(reads),
        boot_id: PRIMARY,
        peer_boot_id: if reads { BACKUP } else { BootId::default() },
        features_offered: 0,
        features_required: 0,
    }
}

fn welcome() -> Welcome {
    Welcome {
        volume: Uuid::from_u128(7),
        geometry: hello(Class::Mirror).geometry,
        generation: 3,
        session_epoch: 1,
        applied_sequence: 0,
        boot_id: BACKUP,
        backup: Uuid::from_u128(9),
        features: 0,
    }
}

fn client(class: Class) -> Connection {
    Connection::client(hello(class), START).expect("a sound Hello")
}

/// Everything that waits on one side, to the other, in pieces.
fn carry(source: &mut Connection, target: &mut Connection, piece_bytes: usize, now: Instant) {
    while let Some(batch) = source.take_outgoing(1 << 16, now) {
        for piece in batch.chunks(piece_bytes) {
            // Errors are told as events as well.
            let _told = target.receive(piece, now);
        }
    }
}

fn events(connection: &mut Connection) -> Vec<Event> {
    std::iter::from_fn(|| connection.next_event()).collect()
}

fn pair(class: Class) -> (Connection, Connection) {
    let (mut primary, mut backup) = (client(class), Connection::server(START));
    carry(&mut primary, &mut backup, 7, START);
    let Some(Event::HelloReceived(heard)) = backup.next_event() else { panic!("no Hello") };
    assert_eq!(heard, hello(class));
    backup.accept(&welcome(), START).expect("waiting");
    carry(&mut backup, &mut primary, 7, START);
    let Some(Event::Welcomed(heard)) = primary.next_event() else { panic!("no Welcome") };
    assert_eq!(heard, welcome());
    assert!(primary.is_active() && backup.is_active());
    (primary, backup)
}

fn write(sequence: u64) -> Message {
    Message::Write { sequence, offset: 4096, data: Payload::copy_of(&[9; 4096]) }
}

fn fetch(tag: u64, length: u64) -> Message {
    Message::Fetch { tag, range: ByteRange::new(0, length), after_sequence: 0 }
}

/// Bytes of frames after `count` others, as a hostile peer would send them.
fn raw(frames: &[Frame], count: u8) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (count, frame) in (count..).zip(frames) {
        frame.encode(count, &mut bytes);
    }
    bytes
}

fn failure(connection: &mut Connection) -> String {
    match events(connection).pop() {
        Some(Event::Failed(error)) => error.to_string(),
        other => panic!("expected a failure, found {other:?}"),
    }
}

/// The last frame that a connection has to send, read as frame `count`.
fn last_words(connection: &mut Connection, count: u8) -> Frame {
    let batch = connection.take_outgoing(1, START).expect("a last frame");
    assert!(connection.is_finished());
    let (head, payload) = batch.split_first_chunk().expect("a header");
    Frame::decode(&Header::decode(head, count).expect("sound"), payload).expect("sound")
}

#[test]
fn a_write_that_another_covers_before_it_left_is_neither_sent_nor_awaited() {
    let (mut primary, mut backup) = pair(Class::Mirror);
    primary.send(write(1)).expect("active");
    assert_eq!(primary.send(write(2)).expect("active"), [1]);
    primary.barrier();
    assert_eq!(primary.send(write(3)).expect("active"), [0; 0]);
    carry(&mut primary, &mut backup, 1, START);
    let sequences = events(&mut backup).into_iter().map(|event| match event {
        Event::Received(Message::Write { sequence, .. }) => sequence,
        other => panic!("{other:?}"),
    });
    assert!(sequences.eq([2, 3]));
    backup.send(Message::Applied { sequence: 3 }).expect("active");
    carry(&mut backup, &mut primary, 1, START);
    assert_eq!(primary.unanswered_bytes(), 0);
}

#[test]
fn mirrored_operations_and_their_answers_cross_the_link_in_order() {
    let (mut primary, mut backup) = pair(Class::Mirror);
    let snapshot = Uuid::from_u128(5);
    let requests = [
        write(1),
        Message::Zero { sequence: 2, range: ByteRange::new(MIB / 2, MIB / 2) },
        Message::Flush { sequence: 3 },
        Message::Cut { sequence: 4, snapshot, selection: Vec::new(), label: "x".to_owned() },
        write(5),
    ];
    for request in &requests {
        assert_eq!(primary.send(request.clone()).expect("active"), [0; 0]);
    }
    carry(&mut primary, &mut backup, 1, START);
    let heard = events(&mut backup).into_iter().map(|event| match event {
        Event::Received(message) => message,
        other => panic!("{other:?}"),
    });
    assert!(heard.eq(requests));
    let answers = [
        Message::Applied { sequence: 2 },
        Message::Flushed { sequence: 3 },
        Message::CutDone { sequence: 4, snapshot, generation: 3, cut_sequence: 44 },
        Message::Applied { sequence: 5 },
    ];
    for answer in &answers {
        backup.send(answer.clone()).expect("active");
    }
    carry(&mut backup, &mut primary, 100, START);
    assert_eq!(events(&mut primary).len(), answers.len());
    assert_eq!((primary.unanswered_bytes(), backup.unanswered_bytes()), (0, 0));
}

#[test]
fn fetched_blocks_cross_the_link() {
    let (mut primary, mut backup) = pair(Class::Demand);
    primary.send(fetch(1, 8192)).expect("active");
    primary.send(fetch(2, 4096)).expect("active");
    carry(&mut primary, &mut backup, 11, START);
    let content = Content::Bytes(Payload::copy_of(&[3; 8192]));
    backup.send(Message::Data { tag: 1, offset: 0, content }).expect("active");
    let content = Content::Zero(4096);
    backup.send(Message::Data { tag: 2, offset: 0, content }).expect("active");
    carry(&mut backup, &mut primary, 11, START);
    assert_eq!(events(&mut primary).len(), 2);
    assert_eq!(primary.unanswered_bytes(), 0);
}

#[test]
fn no_message_travels_before_the_session_is_active() {
    let mut primary = client(Class::Mirror);
    assert!(primary.send(write(1)).is_err());
    // A hostile primary: messages instead of a Hello, and right behind one.
    for (frames, words) in [
        (vec![Frame::Message(write(1))], "on this new connection while it is AwaitHello"),
        (vec![Frame::Ping { sequence: 1 }], "while it is AwaitHello"),
        (
            vec![Frame::Hello(hello(Class::Mirror)), Frame::Message(write(1))],
            "on this mirror connection while it is Deciding",
        ),
    ] {
        let mut backup = Connection::server(START);
        assert!(backup.receive(&raw(&frames, 0), START).is_err());
        let text = failure(&mut backup);
        assert!(text.contains(words), "{text}");
        assert!(backup.accept(&welcome(), START).is_err());
    }
    // A hostile backup: answers before its Welcome.
    let answer = Frame::Message(Message::Applied { sequence: 0 });
    assert!(primary.receive(&raw(&[answer], 0), START).is_err());
}

#[test]
fn a_message_of_another_class_or_of_the_wrong_side_is_refused() {
    for (class, message) in [
        (Class::Mirror, fetch(1, 4096)),
        (Class::Demand, write(1)),
        (Class::Bulk, Message::Flush { sequence: 1 }),
        (Class::Mirror, Message::Applied { sequence: 0 }),
    ] {
        let (_, mut backup) = pair(class);
        assert!(backup.receive(&raw(&[Frame::Message(message)], 1), START).is_err());
        assert!(failure(&mut backup).contains("not expected from this side"));
    }
    let (mut primary, _) = pair(Class::Mirror);
    assert!(primary.receive(&raw(&[Frame::Message(write(1))], 1), START).is_err());
}

#[test]
fn a_failed_connection_says_why_and_hears_nothing_more() {
    let (mut primary, mut backup) = pair(Class::Mirror);
    primary.send(write(2)).expect("active");
    carry(&mut primary, &mut backup, 100, START);
    backup.send(Message::Applied { sequence: 2 }).expect("active");
    let stale = raw(&[Frame::Message(write(1)), Frame::Message(write(3))], 2);
    assert!(backup.receive(&stale, START).is_err());
    let heard = events(&mut backup);
    assert!(matches!(&heard[..], [Event::Received(_), Event::Failed(_)]), "{heard:?}");
    assert!(backup.receive(&raw(&[Frame::Message(write(9))], 3), START).is_ok());
    assert!(backup.next_event().is_none());
    assert!(backup.send(Message::Applied { sequence: 2 }).is_err());
    let Frame::Goodbye(goodbye) = last_words(&mut backup, 1) else { panic!("no goodbye") };
    assert_eq!(goodbye.reason, GoodbyeReason::Protocol);
    assert!(goodbye.text.contains("sequence above 2, found 1"), "{goodbye:?}");
}

#[test]
fn an_answer_to_what_is_queued_but_did_not_leave_is_refused() {
    let (mut primary, _) = pair(Class::Mirror);
    primary.send(write(1)).expect("active");
    let early = raw(&[Frame::Message(Message::Applied { sequence: 1 })], 1);
    assert!(primary.receive(&early, START).is_err());
}

#[test]
fn requests_beyond_the_limits_wait_for_answers_and_a_peer_that_does_not_wait_is_refused() {
    let (mut primary, mut backup) = pair(Class::Bulk);
    let requests = LINK_REQUESTS_MAX as u64 + 1;
    (0..requests).for_each(|tag| assert!(primary.send(fetch(tag, 512)).is_ok()));
    carry(&mut primary, &mut backup, 1 << 16, START);
    assert_eq!(events(&mut backup).len() as u64, requests - 1);
    assert_eq!(primary.outgoing_bytes(), 48);
    assert!(primary.take_outgoing(1 << 16, START).is_none());
    let more = raw(&[Frame::Message(fetch(requests, 512))], requests as u8);
    assert!(backup.receive(&more, START).is_err());
}

#[test]
fn a_welcome_of_another_volume_life_size_or_session_is_refused_by_the_primary() {
    let geometry = Geometry::new(2 * MIB, BlockSize::DEFAULT).expect("valid");
    let volume = Uuid::from_u128(8);
    for (class, wrong, code) in [
        (Class::Mirror, Welcome { volume, ..welcome() }, RefusalCode::WrongVolume),
        (Class::Mirror, Welcome { geometry, ..welcome() }, RefusalCode::WrongGeometry),
        (Class::Mirror, Welcome { generation: 2, ..welcome() }, RefusalCode::StaleGeneration),
        (Class::Mirror, Welcome { session_epoch: 0, ..welcome() }, RefusalCode::StaleSession),
        (Class::Demand, Welcome { session_epoch: 2, ..welcome() }, RefusalCode::StaleSession),
        (Class::Demand, Welcome { boot_id: PRIMARY, ..welcome() }, RefusalCode::StaleSession),
        (Class::Mirror, Welcome { features: 1, ..welcome() }, RefusalCode::Feature),
    ] {
        let mut primary = client(class);
        primary.take_outgoing(1 << 16, START).expect("the Hello");
        primary.receive(&raw(&[Frame::Welcome(wrong)], 0), START).expect("well formed");
        assert!(!primary.is_active());
        failure(&mut primary);
        let Frame::Refuse(refusal) = last_words(&mut primary, 1) else { panic!("no refusal") };
        assert_eq!(refusal.code, code, "{}", refusal.text);
    }
}

#[test]
fn a_primary_without_identity_learns_it_and_nothing_else_is_allowed() {
    let hello = Hello { volume: Uuid::nil(), generation: 0, ..hello(Class::Mirror) };
    let mut primary = Connection::client(hello, START).expect("sound");
    let mut backup = Connection::server(START);
    carry(&mut primary, &mut backup, 50, START);
    let told = Welcome { session_epoch: 0, ..welcome() };
    backup.accept(&told, START).expect("waiting");
    carry(&mut backup, &mut primary, 50, START);
    assert!(matches!(primary.next_event(), Some(Event::Welcomed(heard)) if heard == told));
    assert!(primary.send(write(1)).is_err() && !primary.is_active());
    assert!(backup.receive(&raw(&[Frame::Message(write(1))], 1), START).is_err());
}

#[test]
fn a_refusal_is_told_with_its_words() {
    let (mut primary, mut backup) = (client(Class::Mirror), Connection::server(START));
    carry(&mut primary, &mut backup, 50, START);
    backup.refuse(Refusal::new(RefusalCode::UnknownVolume, "no volume `db` here"));
    carry(&mut backup, &mut primary, 50, START);
    let Some(Event::Refused(refusal)) = primary.next_event() else { panic!("no refusal") };
    assert_eq!(refusal.code, RefusalCode::UnknownVolume);
    assert_eq!(refusal.to_error().to_string(), "no volume `db` here");
    assert!(primary.is_finished() && backup.is_finished());
}

#[test]
fn a_stranger_is_refused_with_words() {
    let mut backup = Connection::server(START);
    assert!(backup.receive(b"GET / HTTP/1.1\r\nHost: backup.example\r\n\r\n", START).is_err());
    assert!(failure(&mut backup).contains("are no frame"));
    let Frame::Refuse(refusal) = last_words(&mut backup, 0) else { panic!("no refusal") };
    assert_eq!(refusal.code, RefusalCode::Protocol);
}

#[test]
fn a_required_feature_that_we_do_not_know_is_refused() {
    let hello = Hello { features_offered: 6, features_required: 4, ..hello(Class::Mirror) };
    let mut primary = Connection::client(hello, START).expect("sound");
    let mut backup = Connection::server(START);
    carry(&mut primary, &mut backup, 50, START);
    assert!(failure(&mut backup).contains("features 0x4"));
    let Frame::Refuse(refusal) = last_words(&mut backup, 0) else { panic!("no refusal") };
    assert_eq!(refusal.code, RefusalCode::Feature);
}

#[test]
fn changes_since_a_cut_travel_on_bulk_and_only_where_both_sides_know_them() {
    let cut = CutName { snapshot: Uuid::from_u128(5), generation: 1, sequence: 2 };
    let ask = Message::Changes { tag: 1, range: ByteRange::new(0, 4096), cut };
    for (class, features, taken) in [
        (Class::Bulk, FEATURE_CHANGES, true),
        (Class::Bulk, 0, false),
        (Class::Demand, FEATURE_CHANGES, false),
    ] {
        let mut backup = Connection::server(START);
        let hello = Hello { features_offered: FEATURE_CHANGES, ..hello(class) };
        backup.receive(&raw(&[Frame::Hello(hello)], 0), START).expect("sound");
        backup.accept(&Welcome { features, ..welcome() }, START).expect("waiting");
        let found = backup.receive(&raw(&[Frame::Message(ask.clone())], 1), START);
        assert_eq!(found.is_ok(), taken, "{class:?}, features {features}: {found:?}");
    }
}

#[test]
fn packed_blocks_travel_only_where_both_sides_know_them() {
    const PACKED: &[u8] = include_bytes!("../../../tests/golden/link-v1-packed.bin");
    let length = 32 + PACKED[4] as usize;
    let mut write = PACKED[..length].to_vec();
    write[3] = 1;
    let crc = crc32c::crc32c(&write[..28]);
    write[28..32].copy_from_slice(&crc.to_le_bytes());
    for (features, taken) in [(FEATURE_PACKED, true), (FEATURE_CHANGES, false), (0, false)] {
        let mut backup = Connection::server(START);
        let hello = Hello { features_offered: KNOWN_FEATURES, ..hello(Class::Mirror) };
        backup.receive(&raw(&[Frame::Hello(hello)], 0), START).expect("sound");
        backup.accept(&Welcome { features, ..welcome() }, START).expect("waiting");
        let found = backup.receive(&write, START);
        assert_eq!(found.is_ok(), taken, "features {features}: {found:?}");
    }
}

#[test]
fn an_idle_link_is_kept_alive_by_heartbeats() {
    let (mut primary, mut backup) = pair(Class::Demand);
    let mut now = START;
    for _ in 0..20 {
        now = primary.next_deadline().expect("alive");
        assert_eq!(Some(now), backup.next_deadline());
        primary.tick(now);
        backup.tick(now);
        for _ in 0..2 {
            carry(&mut primary, &mut backup, 50, now);
            carry(&mut backup, &mut primary, 50, now);
        }
    }
    assert_eq!(now, START.plus_ms(20 * LINK_HEARTBEAT_MS));
    assert!(primary.is_active() && backup.is_active());
    assert!(events(&mut primary).is_empty() && events(&mut backup).is_empty());
}

#[test]
fn a_peer_that_is_silent_for_8_seconds_is_dead() {
    let (mut primary, _) = pair(Class::Mirror);
    let mut now = START;
    let mut pings = 0;
    while primary.is_active() {
        now = primary.next_deadline().expect("alive");
        primary.tick(now);
        pings += usize::from(primary.take_outgoing(1 << 16, now).is_some());
    }
    assert_eq!((now, pings), (START.plus_ms(LINK_SILENCE_MS), 3));
    assert!(matches!(&events(&mut primary)[..], [Event::Dead]));
    assert!(primary.is_finished() && primary.next_deadline().is_none());
}

#[test]
fn a_primary_whose_requests_wait_for_a_slow_backup_is_not_silent() {
    let (mut primary, mut backup) = pair(Class::Bulk);
    let requests = LINK_REQUESTS_MAX as u64 + 1;
    (0..requests).for_each(|tag| assert!(primary.send(fetch(tag, 512)).is_ok()));
    carry(&mut primary, &mut backup, 1 << 16, START);
    assert!(primary.outgoing_bytes() > 0 && !primary.is_ready());
    let now = START.plus_ms(LINK_HEARTBEAT_MS);
    assert_eq!(primary.next_deadline(), Some(now));
    primary.tick(now);
    assert!(primary.is_ready());
    assert_eq!(primary.take_outgoing(1 << 16, now).map(|batch| batch.len()), Some(32));
    assert_eq!(primary.next_deadline(), Some(now.plus_ms(LINK_HEARTBEAT_MS)));
}

#[test]
fn a_transport_that_takes_nothing_is_not_called_again_and_again() {
    let (mut primary, _) = pair(Class::Bulk);
    primary.tick(START.plus_ms(LINK_HEARTBEAT_MS));
    assert_eq!(primary.next_deadline(), Some(START.plus_ms(LINK_SILENCE_MS)));
}

#[test]
fn a_name_that_cannot_be_sent_is_refused_before_connecting() {
    for name in ["", "a\nb", &"x".repeat(256)] {
        let hello = Hello { name: name.to_owned(), ..hello(Class::Mirror) };
        assert!(Connection::client(hello, START).is_err(), "{name:?}");
    }
}

#[test]
fn a_handshake_that_takes_too_long_is_ended() {
    let mut backup = Connection::server(START);
    let hello = client(Class::Mirror).take_outgoing(1 << 16, START).expect("the Hello");
    let late = START.plus_ms(LINK_HANDSHAKE_MS - 1);
    // One byte after the other does not gain time.
    backup.receive(&hello[..hello.len() - 1], late).expect("sound");
    backup.tick(late);
    assert!(backup.next_event().is_none());
    assert_eq!(backup.next_deadline(), Some(START.plus_ms(LINK_HANDSHAKE_MS)));
    backup.tick(START.plus_ms(LINK_HANDSHAKE_MS));
    assert!(matches!(backup.next_event(), Some(Event::Dead)));
}

#[test]
fn a_decision_that_took_long_does_not_count_as_silence() {
    let (mut primary, mut backup) = (client(Class::Mirror), Connection::server(START));
    carry(&mut primary, &mut backup, 50, START);
    let now = START.plus_ms(LINK_SILENCE_MS + 1);
    backup.accept(&welcome(), now).expect("waiting");
    backup.tick(now);
    assert!(backup.is_active());
}

#[test]
fn a_goodbye_ends_both_sides_and_drops_what_was_queued() {
    let (mut primary, mut backup) = pair(Class::Mirror);
    primary.send(write(1)).expect("active");
    primary.depart(Goodbye::new(GoodbyeReason::Superseded, "a newer session"));
    carry(&mut primary, &mut backup, 50, START);
    let heard = events(&mut backup);
    assert!(matches!(&heard[..], [Event::Departed(goodbye)]
        if goodbye.reason == GoodbyeReason::Superseded));
    assert!(primary.is_finished() && backup.is_finished());
}

#[test]
fn a_stream_that_ends_without_a_goodbye_says_where() {
    let (_, mut backup) = pair(Class::Mirror);
    let bytes = raw(&[Frame::Message(write(1))], 1);
    backup.receive(&bytes[..40], START).expect("sound so far");
    backup.closed("connection reset by peer");
    assert!(failure(&mut backup).contains("in the middle of a frame"));
    let (_, mut backup) = pair(Class::Mirror);
    backup.closed("end of stream");
    backup.closed("end of stream");
    assert_eq!(events(&mut backup).len(), 1);
}

#[test]
fn every_flipped_bit_on_the_way_ends_the_connection() {
    let request = raw(&[Frame::Message(write(1))], 1);
    for bit in (0..request.len() * 8).step_by(7) {
        let (_, mut backup) = pair(Class::Mirror);
        let mut bytes = request.clone();
        bytes[bit / 8] ^= 1 << (bit % 8);
        assert!(backup.receive(&bytes, START).is_err(), "bit {bit}");
        assert!(matches!(&events(&mut backup)[..], [Event::Failed(_)]));
    }
}
