//! One test per trap that concerns the primary: missing blocks, claims, the order of durable
//! events. Numbers are those of the list of traps; R and I name rules and invariants.

use dualrestore::error::ErrorKind;
use dualrestore::extent::BlockRange;
use dualrestore::units::{BlockSize, Geometry};
use dualrestore::volume::primary::{Event, LagBound, MirrorPolicy, Options};

use crate::backup::Lane;
use crate::stage::{
    BLOCK, BLOCKS, DEADLINE_MS, FLUSH, begin, block, is_commit, is_flush, is_merge, is_read,
    is_record, is_write, linked, old, sectors, world,
};
use dualrestore::sim::Chance;
use dualrestore::sim::stamp::GARBAGE;

#[test]
fn trap_10_a_sub_block_write_to_a_missing_block_is_fetched_overlaid_and_then_current() {
    let mut world = linked([2], FLUSH);
    let write = world.write(sectors(5, 6), &[7], false);
    assert_eq!((world.fetches(), world.sent_writes().len()), (1, 0), "R7: the fetch comes first");
    assert!(!world.has_job(is_write));
    world.settle();
    world.assert_ok(write);
    assert!(world.is_current(2));
    assert_eq!(world.here(block(2)), [old(4), 7]);
    world.assert_mirrored();
}

#[test]
fn trap_11_a_sub_block_write_to_a_missing_block_fails_after_the_deadline_with_the_link_down() {
    let mut world = world([2], FLUSH);
    let write = world.write(sectors(5, 6), &[7], false);
    world.wait(DEADLINE_MS - 1);
    assert!(!world.is_answered(write));
    world.wait(1);
    world.assert_failed(write, ErrorKind::Timeout);
    assert!(!world.is_current(2));
    assert_eq!(world.here(block(2)), [GARBAGE; 2]);
    world.link_up();
    world.assert_mirrored();
}

#[test]
fn trap_12_a_read_that_spans_current_and_missing_blocks_fetches_only_the_missing() {
    let mut world = linked([3, 4], FLUSH);
    let read = world.read(sectors(5, 11));
    assert_eq!(world.fetches(), 1, "one fetch for the run");
    world.settle();
    let expected: Vec<_> = (5..11).map(old).collect();
    assert_eq!(world.found(read), expected);
    assert_eq!(world.primary.counters().bytes_fetched, 2 * BLOCK);
}

#[test]
fn trap_7_two_readers_of_one_missing_block_make_one_fetch() {
    let mut world = linked([3], FLUSH);
    let first = world.read(sectors(6, 7));
    let second = world.read(sectors(6, 8));
    assert_eq!(world.fetches(), 1);
    world.settle();
    assert_eq!(world.found(first), [old(6)]);
    assert_eq!(world.found(second), [old(6), old(7)]);
    assert_eq!(world.primary.counters().fetches, 1);
}

#[test]
fn trap_6_a_fetch_that_races_a_write_never_overwrites_it() {
    let mut world = linked([3], FLUSH);
    world.read(block(3));
    let at = world.link.ready_fetches(&world.backup, Lane::Demand)[0];
    world.link.serve(&world.backup, Lane::Demand, at, false);
    // The old bytes are on their way; a write of the whole block does not wait for them.
    let write = world.write(block(3), &[7, 8], false);
    world.do_job(is_record);
    assert!(world.has_job(is_write));
    world.receive(Lane::Demand);
    assert_eq!(world.writes(), [3 * BLOCK], "only the write is written");
    world.settle();
    world.assert_ok(write);
    assert_eq!(world.here(block(3)), [7, 8]);
    world.assert_mirrored();
}

#[test]
fn a_read_begun_after_a_write_ended_is_not_answered_from_an_older_fetch() {
    let mut world = linked([3, 4], FLUSH);
    world.read(sectors(6, 10));
    let at = world.link.ready_fetches(&world.backup, Lane::Demand)[0];
    world.link.serve(&world.backup, Lane::Demand, at, false);
    let write = world.write(block(3), &[7, 8], false);
    world.local();
    world.assert_ok(write);
    let read = world.read(sectors(6, 10));
    world.receive(Lane::Demand);
    world.settle();
    assert_eq!(world.found(read), [7, 8, old(8), old(9)]);
}

#[test]
fn trap_8_a_write_waits_for_a_merge_that_holds_its_block() {
    let mut world = linked([3], FLUSH);
    assert_eq!(world.merge(world.all()), Some(vec![BlockRange::one(3)]));
    let write = world.write(block(3), &[7, 8], false);
    assert!(!world.has_job(is_write) && world.sent_writes().is_empty());
    world.do_job(is_merge);
    world.settle();
    world.assert_ok(write);
    assert_eq!(world.here(block(3)), [7, 8]);
}

#[test]
fn trap_8_a_merge_leaves_out_what_is_being_written_fetched_or_current() {
    let mut world = linked([2, 3, 4], FLUSH);
    world.write(block(3), &[7, 8], false);
    world.do_job(is_record);
    assert!(world.has_job(is_write));
    world.read(block(4));
    assert_eq!(world.merge(world.all()), Some(vec![BlockRange::one(2)]));
    world.settle();
    assert_eq!(world.merge(world.all()), None);
    assert_eq!(world.here(block(3)), [7, 8]);
    world.assert_mirrored();
}

#[test]
fn trap_13_a_trim_zeroes_whole_blocks_on_both_sides_and_leaves_the_edges() {
    let mut world = linked([2, 3, 4], FLUSH);
    let trim = world.trim(sectors(5, 9), false);
    assert_eq!(world.fetches(), 0, "edges are not worth a fetch");
    world.settle();
    world.assert_ok(trim);
    assert_eq!([2, 3, 4].map(|index| world.is_current(index)), [false, true, false]);
    assert_eq!(world.here(block(3)), [0, 0]);
    assert_eq!(world.there(sectors(4, 10)), [old(4), old(5), 0, 0, old(8), old(9)]);
    world.assert_mirrored();
}

#[test]
fn trap_14_write_zeroes_zeroes_every_sector_asked_for_and_fetches_the_edges() {
    let mut world = linked([2, 3, 4], FLUSH);
    let zeroes = world.write_zeroes(sectors(5, 9), false);
    assert_eq!(world.fetches(), 2);
    world.settle();
    world.assert_ok(zeroes);
    assert_eq!(world.here(sectors(4, 10)), [old(4), 0, 0, 0, 0, old(9)]);
    assert_eq!([2, 3, 4].map(|index| world.is_current(index)), [true; 3]);
    world.assert_mirrored();
}

#[test]
fn trap_43_a_short_tail_is_whole_when_the_range_reaches_the_end() {
    let size = BlockSize::new(BLOCK as u32).expect("a power of two");
    let geometry = Geometry::new(7 * 512, size).expect("valid");
    let mut world = begin(geometry, vec![3], FLUSH);
    world.link_up();
    let write = world.write(sectors(6, 7), &[7], false);
    assert_eq!(world.fetches(), 0);
    world.settle();
    world.assert_ok(write);
    assert!(world.is_current(3));
    world.assert_mirrored();
}

#[test]
fn link_down_holds_reads_of_missing_blocks_until_the_deadline_and_never_reads_of_current_ones() {
    let mut world = world([3], FLUSH);
    let current = world.read(block(2));
    let missing = world.read(sectors(5, 7));
    world.settle();
    assert_eq!(world.found(current), [old(4), old(5)]);
    world.wait(DEADLINE_MS - 1);
    assert!(!world.is_answered(missing));
    world.wait(1);
    world.assert_failed(missing, ErrorKind::Timeout);
    let patient = world.read(block(3));
    world.wait(DEADLINE_MS - 1);
    world.link_up();
    world.settle();
    assert_eq!(world.found(patient), [old(6), old(7)]);
}

#[test]
fn trap_36_a_local_read_error_on_a_current_block_is_healed_from_the_backup() {
    let mut world = linked([], FLUSH);
    world.volume.fail_next_read();
    let read = world.read(block(3));
    world.do_job(is_read);
    assert_eq!((world.is_current(3), world.fetches()), (false, 1));
    assert_eq!(world.merge(world.all()), None, "demoted blocks come over the link only");
    world.settle();
    assert_eq!(world.found(read), [old(6), old(7)]);
    world.assert_mirrored();
}

#[test]
fn trap_36_a_local_read_error_on_an_unsent_block_is_an_error_and_demotes_nothing() {
    let mut world = world([], FLUSH);
    let write = world.write(block(3), &[7, 8], false);
    world.local();
    world.assert_ok(write);
    world.link_up();
    world.compare();
    world.do_job(is_read);
    assert_eq!(world.sent_writes(), [3 * BLOCK], "pushed, not yet durable there");
    world.volume.fail_next_read();
    let read = world.read(block(3));
    world.do_job(is_read);
    world.assert_failed(read, ErrorKind::Device);
    assert!(world.is_current(3));
    world.assert_mirrored();
}

#[test]
fn trap_40_hydration_finds_blocks_that_became_missing_behind_its_cursor() {
    let mut world = linked(0..BLOCKS, FLUSH);
    world.event(Event::Hydrate { enabled: true });
    world.settle();
    assert!(world.map.current().all_equal(world.all(), true));
    world.volume.fail_next_read();
    let cached = world.read(block(1));
    world.do_job(is_read);
    assert!(!world.is_current(1));
    world.settle();
    world.assert_ok(cached);
    world.assert_mirrored();
}

#[test]
fn trap_40_the_resync_finds_blocks_that_became_unsent_behind_its_cursor() {
    let mut world = world([], FLUSH);
    let first = world.write(block(5), &[7, 8], false);
    world.local();
    world.assert_ok(first);
    world.link_up();
    world.compare();
    // Block 5 is being read to be pushed; `verify --repair` finds block 1 different.
    let mut actions = Vec::new();
    let now = dualrestore::clock::Instant(world.now);
    world.primary.mark_unsent(BlockRange::one(1), now, &mut actions);
    world.take(actions);
    world.settle();
    let counters = world.primary.counters();
    assert_eq!((counters.bytes_resent, counters.bytes_found_equal), (BLOCK, BLOCK));
    world.assert_mirrored();
}

#[test]
fn trap_39_a_write_in_flight_keeps_a_full_map_from_being_mirrored() {
    let mut world = linked([], FLUSH);
    assert!(world.primary.is_mirrored());
    let write = world.write(block(3), &[7, 8], false);
    world.local();
    world.assert_ok(write);
    assert!(!world.primary.is_mirrored(), "sent, not applied");
    world.exchange();
    assert!(!world.primary.is_mirrored(), "applied, not durable");
    world.assert_mirrored();
}

#[test]
fn rule_3_nothing_leaves_for_either_side_before_the_intent_is_durable() {
    let mut world = linked([3], FLUSH);
    world.write(block(3), &[7, 8], false);
    assert!(!world.has_job(is_write) && world.sent_writes().is_empty());
    assert_eq!(world.items.len(), 1);
    world.do_job(is_record);
    assert!(world.has_job(is_write));
    assert_eq!(world.sent_writes(), [3 * BLOCK]);
    let warm = world.write(block(2), &[9, 10], false);
    assert_eq!(world.writes(), [3 * BLOCK, 2 * BLOCK], "a hot extent costs nothing more");
    world.settle();
    world.assert_ok(warm);
}

#[test]
fn rule_4_after_a_crash_no_bundle_supplies_a_missing_block_of_a_hot_extent() {
    let mut world = linked([2, 3], FLUSH);
    let write = world.write(block(3), &[7, 8], false);
    world.local();
    world.exchange();
    world.assert_ok(write);
    let mut chance = Chance::new(0);
    world.crash(&mut chance);
    assert!(!world.is_current(3), "the bit was not durable");
    assert_eq!(world.merge(world.all()), None, "nor is block 2 to be trusted to a bundle");
    world.link_up();
    let read = world.read(block(3));
    world.settle();
    assert_eq!(world.found(read), [7, 8], "the backup has it");
    world.assert_mirrored();
}

#[test]
fn rule_5_an_extent_leaves_the_log_only_once_its_bits_are_durable() {
    let mut world = linked([3], FLUSH);
    world.write(block(3), &[7, 8], false);
    world.settle();
    world.now += 10_000;
    world.event(Event::Tick);
    assert!(!world.has_job(is_record), "its bit is not durable yet");
    assert!(world.has_job(is_commit));
    world.local();
    world.wait(10_000);
    assert!(world.has_job(is_record));
    assert_eq!(world.primary.hot_extents(), 0);
}

#[test]
fn rule_8_a_mirrored_flush_waits_for_both_sides_and_not_for_the_map() {
    let mut world = linked([3], FLUSH);
    world.write(block(3), &[7, 8], false);
    world.local();
    let flush = world.flush();
    assert!(world.has_job(is_flush) && world.has_sent_flush());
    assert!(!world.has_job(is_commit));
    world.local();
    assert!(!world.is_answered(flush), "the backup has not flushed");
    world.exchange();
    world.assert_ok(flush);
    let mut chance = Chance::new(0);
    world.crash(&mut chance);
    world.link_up();
    let read = world.read(block(3));
    world.settle();
    assert_eq!(world.found(read), [7, 8]);
}

#[test]
fn rule_8_a_strict_flush_waits_for_the_map_too() {
    let mut world = linked([3], Options { strict: true, ..FLUSH });
    world.write(block(3), &[7, 8], false);
    world.local();
    let flush = world.flush();
    world.do_job(is_flush);
    world.exchange();
    assert!(!world.is_answered(flush));
    world.do_job(is_commit);
    world.assert_ok(flush);
}

#[test]
fn rule_9_a_flush_with_the_link_down_commits_map_and_unsent_first() {
    let mut world = world([3], FLUSH);
    world.write(block(3), &[7, 8], false);
    world.local();
    let flush = world.flush();
    assert!(world.has_job(is_commit) && !world.is_answered(flush));
    world.local();
    world.assert_ok(flush);
    let mut chance = Chance::new(0);
    world.crash(&mut chance);
    assert!(world.is_current(3) && world.is_unsent(3));
    let read = world.read(block(3));
    world.local();
    assert_eq!(world.found(read), [7, 8]);
    world.link_up();
    world.assert_mirrored();
}

#[test]
fn rule_9_a_mirrored_flush_that_loses_the_link_turns_to_the_map() {
    let mut world = linked([3], FLUSH);
    world.write(block(3), &[7, 8], false);
    world.local();
    let flush = world.flush();
    world.do_job(is_flush);
    world.link_down();
    assert!(!world.is_answered(flush));
    world.do_job(is_commit);
    world.assert_ok(flush);
}

#[test]
fn rule_10_a_flush_begun_during_a_resync_does_not_count_as_mirrored() {
    let mut world = world([], FLUSH);
    world.write(block(3), &[7, 8], false);
    world.local();
    world.link_up();
    assert!(world.primary.is_resyncing());
    let flush = world.flush();
    assert!(!world.has_sent_flush(), "it would be ahead of the push");
    assert!(world.has_job(is_commit), "the map answers for it");
    world.local();
    world.assert_ok(flush);
    world.settle();
    assert!(!world.primary.is_resyncing());
    world.flush();
    assert!(world.has_sent_flush());
    world.assert_mirrored();
}

#[test]
fn law_11_after_a_failed_flush_writes_and_flushes_fail_and_reads_go_on() {
    let mut world = linked([], FLUSH);
    world.write(block(3), &[7, 8], false);
    world.settle();
    world.volume.fail_next_flush();
    let flush = world.flush();
    world.settle();
    world.assert_failed(flush, ErrorKind::Poisoned);
    let write = world.write(block(2), &[9, 10], false);
    world.assert_failed(write, ErrorKind::Poisoned);
    let again = world.flush();
    world.assert_failed(again, ErrorKind::Poisoned);
    let read = world.read(block(3));
    world.settle();
    assert_eq!(world.found(read), [7, 8]);
    assert!(!world.primary.is_mirrored());
}

#[test]
fn law_11_a_failed_map_commit_or_intent_record_poisons_too() {
    let mut world = linked([3], FLUSH);
    world.write(block(3), &[7, 8], false);
    world.settle();
    world.map_disk.fail_next_write();
    world.wait(2_000);
    world.settle();
    assert!(world.primary.poisoned().is_some());
    let mut world = linked([3], FLUSH);
    world.intent_disk.fail_next_flush();
    let write = world.write(block(3), &[7, 8], false);
    world.settle();
    world.assert_failed(write, ErrorKind::Poisoned);
    assert!(!world.is_current(3) && world.there(block(3)) == [old(6), old(7)]);
}

#[test]
fn policy_write_answers_once_the_backup_has_applied_the_write() {
    let options = Options { policy: MirrorPolicy::Write, ..FLUSH };
    let mut world = linked([3], options);
    let write = world.write(block(3), &[7, 8], false);
    world.local();
    assert!(!world.is_answered(write));
    world.exchange();
    world.assert_ok(write);
    assert_eq!(world.there(block(3)), [7, 8]);
    world.write(block(2), &[9, 10], false);
    world.local();
    world.link_down();
    assert_eq!(world.outstanding(), 0, "with the link down it does not wait");
}

#[test]
fn policy_async_flushes_here_and_commits_the_map() {
    let policy = MirrorPolicy::Async(LagBound { bytes: 1 << 20, ms: 5_000 });
    let mut world = linked([3], Options { policy, ..FLUSH });
    let write = world.write(block(3), &[7, 8], true);
    world.local();
    world.assert_ok(write);
    assert!(!world.has_sent_flush());
    let mut chance = Chance::new(0);
    world.crash(&mut chance);
    assert!(world.is_current(3) && world.is_unsent(3));
    world.link_up();
    world.assert_mirrored();
}

#[test]
fn a_write_with_forced_access_is_answered_as_a_flush_is() {
    let mut world = linked([3], FLUSH);
    let write = world.write(block(3), &[7, 8], true);
    world.local();
    assert!(!world.is_answered(write));
    assert!(world.has_sent_flush());
    world.exchange();
    world.assert_ok(write);
}
