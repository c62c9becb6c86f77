//! How far the backup may lag under the policy `async`, in bytes and in time.

use dualrestore::volume::primary::{LagBound, MirrorPolicy, Options};

use crate::backup::Lane;
use crate::stage::{BLOCK, FLUSH, block, linked, sectors};
use crate::world::World;

const BOUND: LagBound = LagBound { bytes: 4 * BLOCK, ms: 1_000 };
const OPTIONS: Options = Options { policy: MirrorPolicy::Async(BOUND), ..FLUSH };

fn written(world: &mut World, index: u64) -> u64 {
    let write = world.write(block(index), &[7 + index, 8], false);
    world.local();
    write
}

fn flushes_sent(world: &World) -> usize {
    let sent = world.link.waiting_there(Lane::Mirror).iter();
    sent.filter(|message| format!("{message:?}").starts_with("Flush")).count()
}

#[test]
fn policy_async_holds_a_write_back_until_the_backup_lags_less_bytes() {
    let mut world = linked([], OPTIONS);
    for index in 0..4 {
        let write = written(&mut world, index);
        world.assert_ok(write);
    }
    assert_eq!(world.primary.lag().bytes, BOUND.bytes);
    let held = written(&mut world, 4);
    assert!(!world.is_answered(held) && world.sent_writes().len() == 4);
    world.settle();
    world.assert_ok(held);
    world.assert_mirrored();
    assert_eq!(world.primary.lag().bytes, 0);
}

#[test]
fn policy_async_holds_a_write_back_while_the_oldest_is_not_durable_for_too_long() {
    let mut world = linked([], OPTIONS);
    let first = written(&mut world, 0);
    world.assert_ok(first);
    world.wait(BOUND.ms - 1);
    let in_time = written(&mut world, 1);
    world.assert_ok(in_time);
    world.wait(1);
    assert_eq!(world.primary.lag_ms(), BOUND.ms);
    let held = written(&mut world, 2);
    assert!(!world.is_answered(held));
    world.settle();
    world.assert_ok(held);
    world.assert_mirrored();
}

#[test]
fn policy_async_has_the_backup_flush_at_half_of_the_bound_and_once() {
    let mut world = linked([], OPTIONS);
    written(&mut world, 0);
    assert_eq!(flushes_sent(&world), 0);
    written(&mut world, 1);
    written(&mut world, 2);
    assert_eq!(flushes_sent(&world), 1, "at half of the bytes");
    world.settle();
    assert_eq!(world.primary.lag().writes, 1, "sent after the flush");
    world.wait(BOUND.ms / 2 - 1);
    assert_eq!(flushes_sent(&world), 0);
    world.wait(1);
    assert_eq!(flushes_sent(&world), 1, "at half of the time");
}

#[test]
fn policy_async_lets_a_write_that_is_larger_than_the_bound_go_when_nothing_lags() {
    let mut world = linked([], OPTIONS);
    let large = world.write(sectors(0, 12), &[6; 12], false);
    world.local();
    world.assert_ok(large);
    let held = written(&mut world, 7);
    assert!(!world.is_answered(held));
    world.settle();
    world.assert_ok(held);
}

#[test]
fn policy_async_holds_nothing_back_with_the_link_down() {
    let mut world = linked([], OPTIONS);
    for index in 0..4 {
        written(&mut world, index);
    }
    let held = written(&mut world, 4);
    assert!(!world.is_answered(held));
    world.link_down();
    world.local();
    world.assert_ok(held);
    for index in 0..8 {
        let write = written(&mut world, index);
        world.assert_ok(write);
    }
    world.link_up();
    assert_eq!(world.primary.lag().bytes, 0, "what is resynced comes on top");
    world.assert_mirrored();
}
