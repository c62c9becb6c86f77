//! Attached media as a read source, one test per sentence: which block comes from where, and what
//! happens when a medium fails, stalls, is pulled out or is too old.

use dualrestore::error::{Error, ErrorKind};
use dualrestore::extent::{BlockRange, ByteRange};
use dualrestore::volume::primary::{Event, MediumCondition, MirrorPolicy, Options};

use crate::backup::Lane;
use crate::stage::{
    BLOCK, DEADLINE_MS, FLUSH, block, is_read, is_record, linked, old, sectors, world,
};
use crate::world::{Job, World};

const ALONE: Options = Options { backup: false, ..FLUSH };

fn is_medium(job: &Job) -> bool {
    matches!(job, Job::Medium { .. })
}

fn medium_reads(world: &World) -> usize {
    world.items.iter().filter(|item| is_medium(&item.job)).count()
}

fn failed(errno: i32) -> Error {
    Error::device("read", &std::io::Error::from_raw_os_error(errno))
}

fn gone(world: &World, id: u64) -> bool {
    let told = world.primary.medium_status(id).expect("attached");
    matches!(told.condition, MediumCondition::Gone(_))
}

#[test]
fn a_missing_block_that_the_medium_holds_is_read_from_it_with_the_link_down_and_kept() {
    let mut world = world([3, 4], FLUSH);
    world.attach(vec![world.all()]);
    let read = world.read(sectors(5, 9));
    assert_eq!((medium_reads(&world), world.fetches()), (1, 0));
    world.settle();
    assert_eq!(world.found(read), [old(5), old(6), old(7), old(8)]);
    assert!(world.is_current(3) && world.is_current(4), "kept as a fetch is");
    assert_eq!(world.here(block(3)), [old(6), old(7)]);
    let counters = world.primary.counters();
    assert_eq!((counters.bytes_from_media, counters.bytes_fetched), (2 * BLOCK, 0));
    world.link_up();
    world.assert_mirrored();
}

#[test]
fn the_medium_comes_first_and_the_link_brings_what_it_lacks() {
    let mut world = linked([2, 3, 4], FLUSH);
    world.attach(vec![BlockRange::one(3)]);
    let read = world.read(sectors(4, 10));
    assert_eq!((medium_reads(&world), world.fetches()), (1, 2));
    world.settle();
    assert_eq!(world.found(read), (4..10).map(old).collect::<Vec<_>>());
    world.assert_mirrored();
}

#[test]
fn two_readers_of_one_missing_block_make_one_read_of_the_medium() {
    let mut world = world([3], FLUSH);
    world.attach(vec![world.all()]);
    let first = world.read(sectors(6, 7));
    let second = world.read(sectors(6, 8));
    assert_eq!(medium_reads(&world), 1);
    world.settle();
    assert_eq!((world.found(first), world.found(second)), (vec![old(6)], vec![old(6), old(7)]));
}

#[test]
fn law_5_a_link_only_block_never_comes_from_a_medium() {
    let mut world = linked([3], FLUSH);
    world.map.demote(BlockRange::one(3));
    world.attach(vec![world.all()]);
    let read = world.read(block(3));
    assert_eq!((medium_reads(&world), world.fetches()), (0, 1));
    world.settle();
    assert_eq!(world.found(read), [old(6), old(7)]);
}

#[test]
fn a_sub_block_write_to_a_missing_block_is_laid_over_what_the_medium_holds() {
    let mut world = world([2], FLUSH);
    world.attach(vec![world.all()]);
    let write = world.write(sectors(5, 6), &[7], false);
    world.settle();
    world.assert_ok(write);
    assert_eq!(world.here(block(2)), [old(4), 7]);
    world.link_up();
    world.assert_mirrored();
}

#[test]
fn a_write_that_overtakes_a_read_of_the_medium_stays() {
    let mut world = world([3], FLUSH);
    world.attach(vec![world.all()]);
    world.read(block(3));
    let write = world.write(block(3), &[7, 8], false);
    world.do_job(is_record);
    world.do_job(|job| matches!(job, Job::Write { .. }));
    world.assert_ok(write);
    world.do_job(is_medium);
    assert_eq!(world.writes(), [] as [u64; 0], "what the medium said is not written");
    world.settle();
    assert_eq!(world.here(block(3)), [7, 8]);
}

#[test]
fn a_damaged_chunk_is_fetched_over_the_link_and_its_neighbours_still_come_from_the_medium() {
    let mut world = linked([3, 5], FLUSH);
    let id = world.attach(vec![world.all()]).expect("a bundle");
    world.shelf.fault = Some(Error::integrity("a chunk is damaged"));
    let read = world.read(block(3));
    world.do_job(is_medium);
    assert_eq!(world.fetches(), 1, "the link takes over at once");
    world.settle();
    assert_eq!(world.found(read), [old(6), old(7)]);
    assert!(!gone(&world, id));
    assert_eq!(world.primary.medium_status(id).expect("attached").reads_damaged, 1);
    world.read(block(5));
    assert_eq!((medium_reads(&world), world.fetches()), (1, 0));
}

#[test]
fn a_medium_pulled_out_is_gone_and_everything_it_was_asked_for_goes_to_the_link() {
    let mut world = linked([2, 4, 6], FLUSH);
    let id = world.attach(vec![world.all()]).expect("a bundle");
    let reads = [world.read(block(2)), world.read(block(4))];
    assert_eq!(medium_reads(&world), 2);
    world.shelf.fault = Some(failed(19));
    world.do_job(is_medium);
    assert!(gone(&world, id));
    assert_eq!(world.fetches(), 2);
    // What the medium still says is of no use.
    world.do_job(is_medium);
    world.settle();
    assert_eq!(world.found(reads[0]), [old(4), old(5)]);
    assert_eq!(world.found(reads[1]), [old(8), old(9)]);
    world.read(block(6));
    assert_eq!((medium_reads(&world), world.fetches()), (0, 1));
    assert_eq!(world.primary.counters().bytes_from_media, 0);
}

#[test]
fn a_medium_that_fails_to_read_three_times_in_a_row_is_gone() {
    let mut world = linked([1, 2, 3, 4], FLUSH);
    let id = world.attach(vec![world.all()]).expect("a bundle");
    for at in 1..4 {
        assert!(!gone(&world, id));
        world.shelf.fault = Some(failed(5));
        world.read(block(at));
        world.settle();
    }
    assert!(gone(&world, id));
    world.assert_mirrored();
}

#[test]
fn a_medium_that_stalls_is_left_in_time_for_the_link() {
    let mut world = linked([3], FLUSH);
    let id = world.attach(vec![world.all()]).expect("a bundle");
    let read = world.read(block(3));
    world.wait(DEADLINE_MS / 2 - 1);
    assert!(!gone(&world, id));
    world.wait(1);
    assert!(gone(&world, id) && world.fetches() == 1);
    world.exchange();
    assert_eq!(world.found(read), [old(6), old(7)], "before its deadline");
    world.settle();
    assert_eq!(world.primary.counters().bytes_from_media, 0, "the late answer is not used");
    world.assert_mirrored();
}

#[test]
fn without_a_link_nothing_waits_past_its_deadline_for_a_medium_that_stalls() {
    let mut world = world([3], FLUSH);
    world.attach(vec![world.all()]);
    let read = world.read(block(3));
    world.wait(DEADLINE_MS);
    world.assert_failed(read, ErrorKind::Timeout);
}

#[test]
fn a_fetch_that_waits_for_the_link_goes_to_a_medium_that_is_attached_meanwhile() {
    let mut world = world([3], FLUSH);
    let read = world.read(block(3));
    assert_eq!(medium_reads(&world), 0);
    world.attach(vec![world.all()]);
    assert_eq!(medium_reads(&world), 1);
    world.settle();
    assert_eq!(world.found(read), [old(6), old(7)]);
}

#[test]
fn a_volume_without_a_backup_reads_from_the_medium_what_waited() {
    let mut world = world([3], ALONE);
    let read = world.read(block(3));
    world.attach(vec![BlockRange::new(2, 5)]);
    world.settle();
    assert_eq!(world.found(read), [old(6), old(7)]);
}

#[test]
fn a_detached_medium_is_asked_nothing_and_what_it_was_asked_goes_to_the_link() {
    let mut world = linked([3, 5], FLUSH);
    let id = world.attach(vec![world.all()]).expect("a bundle");
    let read = world.read(block(3));
    world.detach(id);
    assert_eq!(world.fetches(), 1);
    assert!(world.primary.medium_status(id).is_none());
    world.settle();
    assert_eq!(world.found(read), [old(6), old(7)]);
    world.read(block(5));
    assert_eq!((medium_reads(&world), world.fetches()), (0, 1));
}

#[test]
fn a_merge_leaves_what_is_read_from_the_medium_to_that_read() {
    let mut world = world([3, 4], FLUSH);
    world.attach(vec![world.all()]);
    world.read(block(3));
    assert_eq!(world.merge(world.all()), Some(vec![BlockRange::one(4)]));
    world.settle();
    assert!(world.is_current(3) && world.is_current(4));
}

#[test]
fn hydration_takes_from_the_medium_what_it_holds() {
    let mut world = linked([2, 3, 4], FLUSH);
    world.attach(vec![BlockRange::new(3, 5)]);
    world.event(Event::Hydrate { enabled: true });
    world.settle();
    let counters = world.primary.counters();
    assert_eq!((counters.bytes_from_media, counters.bytes_fetched), (2 * BLOCK, BLOCK));
    assert_eq!(counters.bytes_hydrated, 3 * BLOCK);
    world.assert_mirrored();
}

#[test]
fn law_7_an_earlier_generation_supplies_only_what_was_vouched_for() {
    let mut world = linked(0..8, FLUSH);
    let id = world.attach_old(vec![world.all()]);
    let unvouched = world.read(block(0));
    assert_eq!((medium_reads(&world), world.fetches()), (0, 1));
    world.settle();
    assert_eq!(world.found(unvouched), [old(0), old(1)]);
    world.vouch(id);
    let vouched = (1..8).filter(|at| world.shelf.vouched.get(*at)).count();
    assert!((1..7).contains(&vouched), "the seed gives some of each");
    for at in 1..8 {
        let read = world.read(block(at));
        assert_eq!(medium_reads(&world) == 1, world.shelf.vouched.get(at), "block {at}");
        world.settle();
        assert_eq!(world.found(read), [old(2 * at), old(2 * at + 1)]);
    }
    world.assert_mirrored();
}

#[test]
fn what_was_vouched_for_is_void_when_the_session_ends() {
    let mut world = linked(0..8, FLUSH);
    let id = world.attach_old(vec![world.all()]);
    world.vouch(id);
    let at = (0..8).find(|at| world.shelf.vouched.get(*at)).expect("the seed gives some");
    let read = world.read(block(at));
    assert_eq!(medium_reads(&world), 1);
    world.link_down();
    let told = world.primary.medium_status(id).expect("attached");
    assert!(matches!(told.condition, MediumCondition::Unvouched));
    // An answer of the session that is over.
    world.vouch(id);
    world.local();
    assert!(!world.is_answered(read) && !world.is_current(at));
    world.link_up();
    assert_eq!((medium_reads(&world), world.fetches()), (0, 1));
    world.settle();
    assert_eq!(world.found(read), [old(2 * at), old(2 * at + 1)]);
}

#[test]
fn a_merge_of_an_earlier_generation_writes_only_what_was_vouched_for() {
    let mut world = linked(0..8, FLUSH);
    let vouched: Vec<u64> = (0..8).filter(|at| world.shelf.vouched.get(*at)).collect();
    let written = world.merge_from(world.all(), true).expect("some is");
    let blocks: Vec<u64> = written.iter().flat_map(|run| run.start..run.end).collect();
    assert_eq!(blocks, vouched);
    world.settle();
    assert!((0..8).all(|at| world.is_current(at) == vouched.contains(&at)));
    world.assert_mirrored();
}

#[test]
#[should_panic(expected = "the medium is older")]
fn a_block_that_is_vouched_for_wrongly_is_caught_here() {
    let mut world = linked(0..8, FLUSH);
    world.shelf.vouched.fill(BlockRange::new(0, 8), true);
    let id = world.attach_old(vec![world.all()]);
    world.vouch(id);
    world.read(ByteRange::new(0, 8 * BLOCK));
}

#[test]
#[should_panic(expected = "the bundle is older")]
fn a_block_that_is_vouched_for_wrongly_is_caught_in_a_merge_as_well() {
    let mut world = linked(0..8, FLUSH);
    world.shelf.vouched.fill(BlockRange::new(0, 8), true);
    world.merge_from(world.all(), true);
}

#[test]
fn a_read_of_current_blocks_never_meets_the_medium() {
    let mut world = world([3], Options { policy: MirrorPolicy::Write, ..FLUSH });
    world.attach(vec![world.all()]);
    world.read(block(4));
    assert!(world.has_job(is_read) && medium_reads(&world) == 0);
    assert!(world.link.ready_fetches(&world.backup, Lane::Demand).is_empty());
}
