//! What the disks allow: a bare io_uring loop that copies given extents from one file to another,
//! with no map, no check, no order and no thread. The measure for the merge.
//!
//! `bound SOURCE TARGET EXTENTS SLOT_BYTES SLOTS`; EXTENTS has a line `OFFSET LENGTH` for each, in
//! multiples of 4096. Prints the seconds, then the processor's seconds.

#![expect(unsafe_code, reason = "io_uring has no safe form; this loop is the measure of ours")]
#![expect(clippy::print_stdout, reason = "a program of its own")]
#![expect(clippy::disallowed_methods, reason = "it measures time and opens files")]

use std::fs::{File, OpenOptions, read_to_string};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::time::Instant;

use dualrestore::device::AlignedBuffer;
use io_uring::{IoUring, opcode, types};

#[derive(Clone, Copy)]
struct Slot {
    offset: u64,
    length: u32,
    writing: bool,
}

fn open(path: &str, write: bool) -> File {
    let mut options = OpenOptions::new();
    options.read(!write).write(write).custom_flags(libc::O_DIRECT);
    options.open(path).expect("a file on a disk")
}

/// The extents cut to the size of a slot.
fn pieces(text: &str, slot: u64) -> Vec<(u64, u32)> {
    let mut pieces = Vec::new();
    for line in text.lines() {
        let (offset, length) = line.split_once(' ').expect("OFFSET LENGTH");
        let start: u64 = offset.parse().expect("a number");
        let end = start + length.parse::<u64>().expect("a number");
        let mut at = start;
        while at < end {
            let to = end.min(at + slot);
            pieces.push((at, (to - at) as u32));
            at = to;
        }
    }
    pieces
}

fn processor_seconds() -> f64 {
    // SAFETY: the call fills the structure, for which all zeros is a valid value.
    let usage = unsafe {
        let mut usage = std::mem::zeroed::<libc::rusage>();
        libc::getrusage(libc::RUSAGE_SELF, &raw mut usage);
        usage
    };
    let seconds = |time: libc::timeval| time.tv_sec as f64 + time.tv_usec as f64 / 1e6;
    seconds(usage.ru_utime) + seconds(usage.ru_stime)
}

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let [_, source, target, extents, slot_bytes, slots] = arguments.as_slice() else {
        panic!("bound SOURCE TARGET EXTENTS SLOT_BYTES SLOTS");
    };
    let slot_bytes: usize = slot_bytes.parse().expect("a number");
    let slots: usize = slots.parse().expect("a number");
    let pieces = pieces(&read_to_string(extents).expect("extents"), slot_bytes as u64);
    let (source, target) = (open(source, false), open(target, true));
    let mut memory = AlignedBuffer::zeroed(slot_bytes * slots);
    let start = memory.as_mut_ptr();
    let begun = (Instant::now(), processor_seconds());
    let mut ring: IoUring = IoUring::builder()
        .setup_single_issuer()
        .setup_defer_taskrun()
        .build(slots as u32)
        .expect("io_uring");
    let whole = libc::iovec { iov_base: start.cast(), iov_len: memory.len() };
    // SAFETY: the memory outlives the ring's last completion, which is waited for below.
    unsafe { ring.submitter().register_buffers(&[whole]) }.expect("registered");
    let (from, to) = (types::Fd(source.as_raw_fd()), types::Fd(target.as_raw_fd()));
    let mut at = vec![Slot { offset: 0, length: 0, writing: false }; slots];
    let mut free: Vec<usize> = (0..slots).collect();
    let mut waiting = pieces.into_iter();
    let mut left = waiting.len();
    while left > 0 {
        while let Some(slot) = free.pop() {
            let Some((offset, length)) = waiting.next() else { break };
            at[slot] = Slot { offset, length, writing: false };
            // SAFETY: slots do not overlap, and each has one request at a time.
            unsafe {
                let place = start.add(slot * slot_bytes);
                let read = opcode::ReadFixed::new(from, place, length, 0).offset(offset).build();
                ring.submission().push(&read.user_data(slot as u64)).expect("room");
            }
        }
        ring.submit_and_wait(1).expect("submitted");
        let ended: Vec<_> = ring.completion().map(|one| (one.user_data(), one.result())).collect();
        for (slot, result) in ended {
            let slot = slot as usize;
            let Slot { offset, length, writing } = at[slot];
            assert_eq!(result, length as i32, "a whole request");
            if writing {
                free.push(slot);
                left -= 1;
                continue;
            }
            at[slot].writing = true;
            // SAFETY: as above.
            unsafe {
                let place = start.add(slot * slot_bytes);
                let write = opcode::WriteFixed::new(to, place, length, 0).offset(offset).build();
                ring.submission().push(&write.user_data(slot as u64)).expect("room");
            }
        }
    }
    target.sync_data().expect("durable");
    let processor = processor_seconds() - begun.1;
    println!("{:.6} {processor:.6}", begun.0.elapsed().as_secs_f64());
}
