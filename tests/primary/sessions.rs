//! Sessions come and go, writes fail on one side: what the backup is told, and when the volume may
//! call itself mirrored. Each test that names no trap is a defect that was there.

use dualrestore::error::ErrorKind;
use dualrestore::extent::BlockRange;
use dualrestore::limits::MIRROR_WINDOW_BYTES;
use dualrestore::units::{BlockSize, Geometry};
use dualrestore::volume::primary::{Event, LagBound, MirrorPolicy, Options};

use crate::backup::Lane;
use crate::stage::{
    BLOCK, DEADLINE_MS, FLUSH, begin, block, is_commit, is_read, is_record, is_write, linked, old,
    sectors, world,
};
use dualrestore::sim::Chance;

#[test]
fn trap_17_a_block_is_unsent_from_before_the_send_until_the_backup_has_it_durably() {
    let mut world = linked([], FLUSH);
    world.write(block(3), &[7, 8], false);
    assert!(!world.is_unsent(3));
    world.do_job(is_record);
    assert!(world.is_unsent(3) && world.sent_writes() == [3 * BLOCK]);
    world.settle();
    assert!(world.is_unsent(3), "applied, not durable");
    world.rest();
    assert!(!world.is_unsent(3));
}

#[test]
fn trap_19_a_late_acknowledgement_after_a_reconnect_settles_nothing() {
    let mut world = linked([], FLUSH);
    world.write(block(3), &[7, 8], false);
    world.local();
    world.flush();
    let mut chance = Chance::new(0);
    world.link.apply_next(&mut world.backup, &mut chance);
    world.link.apply_next(&mut world.backup, &mut chance);
    world.link_down();
    world.write(block(3), &[9, 10], false);
    world.local();
    world.link_up();
    let late = std::mem::take(&mut world.link.late);
    assert!(late.iter().any(|event| matches!(event, Event::Flushed { .. })));
    for event in late {
        world.event(event);
    }
    assert!(world.is_unsent(3), "the newer write is not there");
    world.assert_mirrored();
    assert_eq!(world.there(block(3)), [9, 10]);
}

#[test]
fn trap_28_what_a_backup_lost_of_its_unflushed_tail_is_sent_again() {
    let mut world = linked([], FLUSH);
    let write = world.write(block(3), &[7, 8], false);
    world.settle();
    world.assert_ok(write);
    assert_eq!(world.there(block(3)), [7, 8]);
    let mut lost = false;
    while !lost {
        world.crash_backup();
        lost = world.there(block(3)) != [7, 8];
        world.link_up();
        if !lost {
            world.write(block(3), &[7, 8], false);
            world.settle();
        }
    }
    world.assert_mirrored();
    assert_eq!(world.there(block(3)), [7, 8]);
}

#[test]
fn trap_18_a_missing_block_whose_local_write_failed_is_fetched_after_that_write() {
    let mut world = linked([3], FLUSH);
    let write = world.write(block(3), &[7, 8], false);
    world.do_job(is_record);
    world.volume.fail_next_write();
    world.do_job(is_write);
    world.assert_failed(write, ErrorKind::Device);
    assert!(!world.is_current(3));
    assert_eq!(world.merge(world.all()), None, "the backup may have the write, a bundle has not");
    // The write is still on its way; the fetch must not overtake it.
    let read = world.read(block(3));
    assert!(world.link.ready_fetches(&world.backup, Lane::Demand).is_empty());
    world.settle();
    assert_eq!(world.found(read), [7, 8]);
    assert!(world.is_unsent(3), "the backup could still lose it");
    world.assert_mirrored();
}

#[test]
fn trap_18_a_current_block_whose_local_write_failed_is_sent_again_even_if_the_backup_has_it() {
    let mut world = linked([], FLUSH);
    let write = world.write(block(3), &[7, 8], false);
    world.do_job(is_record);
    world.exchange();
    world.wait(2_000);
    world.exchange();
    assert!(!world.is_unsent(3), "durable there before it was written here");
    world.volume.fail_next_write();
    world.do_job(is_write);
    world.assert_failed(write, ErrorKind::Device);
    assert!(world.is_unsent(3));
    world.assert_mirrored();
}

#[test]
fn a_partial_write_over_an_unsent_block_does_not_count_as_sending_it_whole() {
    let mut world = world([], FLUSH);
    world.write(block(3), &[7, 8], false);
    world.write(block(2), &[5, 6], false);
    world.local();
    world.write(sectors(5, 6), &[9], false);
    world.link_up();
    // Block 2 is being read to be pushed; block 3 gets a new second sector before its push.
    let partial = world.write(sectors(7, 8), &[10], false);
    world.settle();
    world.assert_ok(partial);
    world.assert_mirrored();
    assert_eq!(world.there(sectors(4, 8)), [5, 9, 7, 10]);
}

#[test]
fn a_write_under_way_when_the_link_comes_up_is_sent_before_a_flush_counts_as_mirrored() {
    let mut world = world([3], FLUSH);
    let write = world.write(block(3), &[7, 8], false);
    world.do_job(is_record);
    world.link_up();
    world.do_job(is_write);
    world.assert_ok(write);
    assert!(world.primary.is_resyncing());
    let flush = world.flush();
    assert!(!world.has_sent_flush() && world.has_job(is_commit));
    world.settle();
    world.assert_ok(flush);
    assert_eq!(world.there(block(3)), [7, 8]);
    world.assert_mirrored();
}

#[test]
fn one_unreadable_unsent_block_does_not_keep_the_others_from_being_sent() {
    let mut world = world([], FLUSH);
    world.write(block(2), &[7, 8], false);
    world.write(block(5), &[9, 10], false);
    world.local();
    world.volume.fail_next_read();
    world.link_up();
    world.compare();
    world.settle();
    assert_eq!(world.there(block(5)), [9, 10]);
    assert!(world.primary.is_resyncing(), "block 2 is still unsent");
    world.assert_mirrored();
    assert_eq!(world.there(block(2)), [7, 8]);
}

#[test]
fn trap_9_a_block_written_without_a_pause_holds_up_no_push_and_gets_its_own() {
    let mut world = world([], FLUSH);
    world.write(block(3), &[7, 8], false);
    world.write(block(5), &[5, 6], false);
    world.local();
    let first = world.write(sectors(6, 7), &[9], false);
    world.link_up();
    let second = world.write(sectors(6, 7), &[10], false);
    world.compare();
    world.do_job(is_read);
    assert_eq!(world.sent_writes(), [5 * BLOCK], "block 5 does not wait for block 3");
    world.do_job(is_write);
    world.assert_ok(first);
    assert_eq!(world.sent_writes(), [5 * BLOCK, 3 * BLOCK], "no write waits for a comparison");
    let third = world.write(sectors(6, 7), &[11], false);
    world.exchange();
    world.compare();
    world.do_job(is_write);
    world.assert_ok(second);
    assert!(!world.has_job(is_write), "the push of block 3 comes before the next write there");
    world.do_job(is_read);
    assert_eq!(world.sent_writes(), [3 * BLOCK, 3 * BLOCK], "the push, then the write");
    world.settle();
    world.assert_ok(third);
    world.assert_mirrored();
}

#[test]
fn what_a_session_before_left_unflushed_is_durable_before_a_fetch_is_served() {
    let mut world = linked([3], FLUSH);
    world.write(block(3), &[7, 8], false);
    world.local();
    world.exchange();
    let mut chance = Chance::new(0);
    world.crash(&mut chance);
    world.link_up();
    let read = world.read(block(3));
    world.settle();
    assert_eq!(world.found(read), [7, 8]);
    assert!(!world.is_unsent(3), "so the backup must not lose it any more");
    world.crash_backup();
    world.link_up();
    world.assert_mirrored();
}

#[test]
fn the_mirror_window_holds_writes_back_until_some_are_applied_or_the_link_is_down() {
    let size = BlockSize::new(64 << 10).expect("a power of two");
    let mut world = begin(Geometry::new(64 << 10, size).expect("valid"), vec![], FLUSH);
    world.link_up();
    for _ in 0..MIRROR_WINDOW_BYTES >> 16 {
        world.write(sectors(0, 128), &[6; 128], false);
        world.local();
    }
    assert_eq!(world.primary.in_flight_bytes(), MIRROR_WINDOW_BYTES);
    let first = world.write(sectors(0, 128), &[9; 128], false);
    world.local();
    assert!(!world.is_answered(first));
    let mut chance = Chance::new(0);
    world.link.apply_next(&mut world.backup, &mut chance);
    world.link.pay();
    world.receive(Lane::Mirror);
    world.local();
    world.assert_ok(first);
    let second = world.write(sectors(0, 128), &[11; 128], false);
    world.local();
    assert!(!world.is_answered(second));
    world.link_down();
    world.local();
    world.assert_ok(second);
    world.link_up();
    world.assert_mirrored();
    assert_eq!(world.there(sectors(0, 128)), [11; 128]);
}

#[test]
fn policy_write_answers_a_write_that_did_not_leave_once_the_one_that_covers_it_is_applied() {
    let mut world = linked([], Options { policy: MirrorPolicy::Write, ..FLUSH });
    world.link.supersedes = true;
    let first = world.write(block(3), &[7, 8], false);
    world.local();
    let between = world.write(block(5), &[5, 6], false);
    world.local();
    let second = world.write(block(3), &[9, 10], false);
    world.local();
    assert_eq!(world.sent_writes(), [5 * BLOCK, 3 * BLOCK], "the first does not leave");
    let mut chance = Chance::new(0);
    world.link.apply_next(&mut world.backup, &mut chance);
    world.link.pay();
    world.receive(Lane::Mirror);
    world.assert_ok(between);
    assert!(!world.is_answered(first) && !world.is_answered(second));
    world.exchange();
    world.assert_ok(first);
    world.assert_ok(second);
    world.assert_mirrored();
}

#[test]
fn no_write_is_left_out_in_favour_of_one_after_a_flush_that_the_backup_is_not_told_of() {
    let policy = MirrorPolicy::Async(LagBound { bytes: 1 << 20, ms: 5_000 });
    let mut world = linked([], Options { policy, ..FLUSH });
    world.link.supersedes = true;
    world.write(block(3), &[7, 8], false);
    world.local();
    let flush = world.flush();
    world.local();
    world.assert_ok(flush);
    world.write(block(3), &[9, 10], false);
    world.local();
    assert_eq!(world.sent_writes(), [3 * BLOCK, 3 * BLOCK], "each state that was flushed");
    world.assert_mirrored();
}

#[test]
fn trap_23_a_cut_waits_for_the_resync_and_comes_after_every_write_before_it() {
    let mut world = world([], FLUSH);
    world.write(block(3), &[7, 8], false);
    world.local();
    world.link_up();
    let cut = world.cut();
    assert!(world.link.waiting_there(Lane::Mirror).is_empty(), "the push comes first");
    world.settle();
    assert!(world.cuts[&cut].is_ok());
    let bytes = world.backup.cut.take().expect("it was cut");
    let held =
        dualrestore::sim::stamp::values(block(3), &bytes[3 * BLOCK as usize..4 * BLOCK as usize]);
    assert_eq!(held.into_values().collect::<Vec<_>>(), [7, 8]);
    world.link_down();
    let refused = world.cut();
    assert_eq!(world.cuts[&refused].as_ref().expect_err("refused").kind(), ErrorKind::Link);
}

#[test]
fn trap_37_a_bundle_supplies_blocks_that_readers_wait_for_with_the_link_down() {
    let mut world = world([2, 3], FLUSH);
    let waiting = world.read(block(2));
    let expired = world.read(block(3));
    world.wait(DEADLINE_MS);
    world.assert_failed(expired, ErrorKind::Timeout);
    world.assert_failed(waiting, ErrorKind::Timeout);
    let waiting = world.read(block(2));
    assert_eq!(world.merge(world.all()), Some(vec![BlockRange::new(2, 4)]));
    world.settle();
    assert_eq!(world.found(waiting), [old(4), old(5)]);
    assert!(world.is_current(3));
    world.link_up();
    assert_eq!(world.fetches(), 0, "nothing is left to be fetched");
    world.assert_mirrored();
}

#[test]
fn trap_37_without_a_backup_missing_blocks_come_from_a_bundle_or_not_at_all() {
    let mut world = world([2, 3], Options { backup: false, ..FLUSH });
    let read = world.read(block(2));
    world.merge(BlockRange::one(2));
    world.settle();
    assert_eq!(world.found(read), [old(4), old(5)]);
    let hopeless = world.read(block(3));
    world.wait(DEADLINE_MS);
    world.assert_failed(hopeless, ErrorKind::Timeout);
}

#[test]
fn a_volume_is_not_idle_while_an_intent_record_is_under_way() {
    let mut world = world([3], FLUSH);
    // The write gives up before its intent is durable: nothing but the record is left.
    let write = world.write(block(2), &[7, 8], false);
    let mut actions = Vec::new();
    world.primary.fail_waiting_requests(&dualrestore::error::Error::busy("over"), &mut actions);
    world.take(actions);
    world.assert_failed(write, ErrorKind::Busy);
    assert!(world.has_job(is_record) && !world.primary.is_idle());
    world.local();
    assert!(world.primary.is_idle());
}
