//! What is unsent is compared with the backup before it is sent.

use dualrestore::clock::Instant;
use dualrestore::extent::{BlockRange, ByteRange};
use dualrestore::limits::COMPARISONS_MAX;
use dualrestore::units::{BlockSize, Geometry};

use crate::backup::Lane;
use crate::stage::{
    BLOCK, FLUSH, begin, block, is_digest, is_read, is_write, linked, old, sectors, world,
};
use crate::world::World;
use dualrestore::sim::Chance;
use dualrestore::sim::stamp::SECTOR;

const PAGE: u64 = 4096;

/// So many blocks of 4 KiB, the link down.
fn pages(count: u64) -> World {
    let size = BlockSize::new(PAGE as u32).expect("a power of two");
    begin(Geometry::new(count * PAGE, size).expect("valid"), vec![], FLUSH)
}

/// Writes the whole page with this value, or with what the backup holds.
fn write_page(world: &mut World, index: u64, value: Option<u64>) {
    let first = index * PAGE / SECTOR;
    let values: Vec<u64> = (first..first + 8).map(|at| value.unwrap_or(old(at))).collect();
    world.write(ByteRange::new(index * PAGE, PAGE), &values, false);
    world.local();
}

fn mark_unsent(world: &mut World, blocks: BlockRange) {
    let mut actions = Vec::new();
    world.primary.mark_unsent(blocks, Instant(world.now), &mut actions);
    world.take(actions);
}

#[test]
fn what_the_backup_holds_already_is_not_sent_again() {
    let mut world = pages(64);
    for index in 0..64 {
        write_page(&mut world, index, None);
    }
    world.link_up();
    assert_eq!(world.digests_asked(), 2, "one for each piece");
    world.assert_mirrored();
    let counters = world.primary.counters();
    assert_eq!((counters.bytes_resent, counters.bytes_found_equal), (0, 64 * PAGE));
}

#[test]
fn of_a_piece_that_differs_only_the_parts_that_do_are_sent() {
    let mut world = pages(64);
    for index in 0..40 {
        write_page(&mut world, index, (index == 17).then_some(9));
    }
    world.link_up();
    world.assert_mirrored();
    let counters = world.primary.counters();
    assert_eq!((counters.bytes_resent, counters.bytes_found_equal), (PAGE, 39 * PAGE));
}

#[test]
fn after_a_crash_of_the_primary_its_hot_extents_are_compared_and_little_is_sent() {
    let mut world = pages(256);
    world.link_up();
    write_page(&mut world, 3, Some(9));
    let mut chance = Chance::new(0);
    world.crash(&mut chance);
    assert_eq!(world.map.unsent_bytes(), 256 * PAGE);
    world.link_up();
    world.assert_mirrored();
    assert!(world.primary.counters().bytes_resent <= PAGE);
}

#[test]
fn an_equal_block_counts_as_sent_and_is_unsent_until_the_backup_has_flushed() {
    let mut world = world([], FLUSH);
    world.write(block(3), &[old(6), old(7)], false);
    world.local();
    world.link_up();
    world.compare();
    assert!(!world.primary.is_resyncing(), "nothing is left to be sent");
    assert!(world.is_unsent(3) && !world.primary.is_mirrored());
    world.wait(1_500);
    assert!(world.has_sent_flush());
    world.exchange();
    assert!(!world.is_unsent(3));
    world.assert_mirrored();
}

#[test]
fn a_comparison_sees_what_was_sent_before_it() {
    let mut world = linked([], FLUSH);
    // The write is lost here and on its way there; then the block holds what it did.
    world.write(block(3), &[7, 8], false);
    world.local();
    world.write(block(3), &[old(6), old(7)], false);
    world.volume.fail_next_write();
    world.do_job(is_write);
    mark_unsent(&mut world, BlockRange::one(3));
    assert_eq!(world.digests_asked(), 1);
    assert!(world.link.ready_fetches(&world.backup, Lane::Bulk).is_empty());
    world.settle();
    world.assert_mirrored();
}

#[test]
fn a_block_that_is_written_while_it_is_compared_is_sent_whatever_the_digests_say() {
    let mut world = world([], FLUSH);
    world.write(block(3), &[old(6), old(7)], false);
    world.local();
    world.link_up();
    let at = world.link.ready_fetches(&world.backup, Lane::Bulk)[0];
    world.link.serve(&world.backup, Lane::Bulk, at, false);
    world.receive(Lane::Bulk);
    assert!(world.has_job(is_digest));
    // Half of the block: the other half is not sent with it.
    let write = world.write(sectors(6, 7), &[9], false);
    world.do_job(is_digest);
    assert!(!world.has_job(is_read), "the push waits for the write");
    world.do_job(is_write);
    world.assert_ok(write);
    world.do_job(is_read);
    assert_eq!(world.sent_writes(), [3 * BLOCK, 3 * BLOCK]);
    world.assert_mirrored();
    assert_eq!(world.there(block(3)), [9, old(7)]);
}

#[test]
fn a_block_that_the_backup_cannot_read_is_sent() {
    let mut world = world([], FLUSH);
    world.write(block(3), &[old(6), old(7)], false);
    world.local();
    world.link_up();
    world.link.serve(&world.backup, Lane::Bulk, 0, true);
    world.receive(Lane::Bulk);
    world.do_job(is_read);
    assert_eq!(world.sent_writes(), [3 * BLOCK]);
    world.assert_mirrored();
}

#[test]
fn a_comparison_of_a_session_that_ended_says_nothing_in_the_next() {
    let mut world = world([], FLUSH);
    world.write(block(3), &[old(6), old(7)], false);
    world.local();
    world.link_up();
    world.link.serve(&world.backup, Lane::Bulk, 0, false);
    world.receive(Lane::Bulk);
    world.link_down();
    world.link_up();
    world.do_job(is_digest);
    assert_eq!(world.digests_asked(), 1, "asked anew");
    assert!(world.primary.is_resyncing() && world.is_unsent(3));
    world.assert_mirrored();
}

#[test]
fn where_nothing_is_equal_most_is_sent_without_being_compared() {
    const PAGES: u64 = 8_192;
    let mut world = pages(PAGES);
    for index in 0..PAGES {
        write_page(&mut world, index, Some(9));
    }
    world.link_up();
    let mut asked = 0;
    while !world.primary.is_mirrored() {
        asked += world.digests_asked();
        assert!(world.digests_asked() <= COMPARISONS_MAX);
        world.exchange();
        world.local();
        world.wait(100);
    }
    assert_eq!(world.primary.counters().bytes_resent, PAGES * PAGE);
    // At most 4 MiB and what is under way, then one piece in sixteen.
    let pieces = PAGES / 32;
    assert!(asked < pieces as usize * 33 / 2, "{asked} digests");
}
