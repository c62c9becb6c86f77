//! The thread that owns the files of a bundle: carries out orders until they end or one fails.
//!
//! Guarantees: a segment counts as closed once it and its name are durable; how far the open one
//! reached is known when its medium is full.
//! Does not know: chunks.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crossbeam_channel::{Receiver, Sender};

use super::assemble::Order;
use super::pace::{Pace, Stage};
use crate::clock::MonotonicClock;
use crate::device::{AlignedBuffer, Folder, FolderFile};
use crate::error::Result;

/// What the writing thread came to.
pub(super) struct Written {
    pub closed: usize,
    /// Bytes of the segment that was open at the end.
    pub reached: u64,
    pub result: Result<()>,
}

/// Carries out orders until they end or one fails. `closed` counts segments for others to see.
pub(super) fn carry_out(
    folder: &dyn Folder,
    orders: &Receiver<Order>,
    written: &Sender<AlignedBuffer>,
    (clock, pace): (MonotonicClock, &Pace),
    closed: &AtomicUsize,
) -> Written {
    let mut open: Option<Arc<dyn FolderFile>> = None;
    let mut done = Written { closed: 0, reached: 0, result: Ok(()) };
    for order in orders {
        let bytes = match &order {
            Order::WriteBatch(_, _, part) => part.len() as u64,
            _ => 0,
        };
        let began = clock.now_ns();
        if let Err(error) = carry_out_one(folder, order, &mut open, &mut done, written) {
            done.result = Err(error);
            return done;
        }
        pace.note(Stage::Sink, bytes, clock.now_ns() - began);
        closed.store(done.closed, Ordering::Release);
    }
    done
}

fn carry_out_one(
    folder: &dyn Folder,
    order: Order,
    open: &mut Option<Arc<dyn FolderFile>>,
    done: &mut Written,
    written: &Sender<AlignedBuffer>,
) -> Result<()> {
    let file = || open.as_ref().expect("a segment is created before it is written");
    match order {
        Order::Create(name) => {
            *open = Some(folder.create(&name)?);
            done.reached = 0;
        }
        Order::Write(position, bytes) => {
            file().write_at(position, &bytes)?;
            done.reached = position + bytes.len() as u64;
        }
        Order::WriteBatch(position, memory, part) => {
            file().write_at(position, &memory[part.clone()])?;
            done.reached = position + part.len() as u64;
            // The assembler may have ended meanwhile; then nobody needs the memory.
            let _unneeded = written.send(memory);
        }
        Order::Close => {
            file().flush()?;
            *open = None;
            folder.flush()?;
            done.closed += 1;
        }
    }
    Ok(())
}
