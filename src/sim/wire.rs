//! One connection of the link: two queues of bytes between two ends.
//!
//! | end | event | then |
//! |---|---|---|
//! | open | its endpoint has ended and has nothing to say | left: the other end hears of it |
//! | open | the other left, and all bytes on their way here were taken | closed |
//! | open | its node lost power | gone, without a word |
//!
//! Guarantees: bytes arrive in order, in pieces of any size, or not at all once the wire was cut.
//! Does not know: frames; when something happens.

use std::collections::VecDeque;
use std::sync::Arc;

use super::chance::Chance;
use crate::format::frames::Class;
use crate::link::Endpoint;

/// The primary's end of a wire, and the backup's.
pub const HERE: usize = 0;
pub const THERE: usize = 1;

/// How a wire is cut.
#[derive(Clone, Copy, Debug)]
pub enum Cut {
    /// Both ends hear of it at once; what was on its way is lost.
    Reset,
    /// This end hears of it, and later the other, which still gets what was on its way.
    HalfOpen(usize),
    /// As `HalfOpen`, and the last of what was on its way is lost.
    Truncated(usize),
}

/// See the module.
#[derive(Debug)]
pub struct Wire {
    pub class: Class,
    pub number: u64,
    ends: [Option<Arc<Endpoint>>; 2],
    /// On their way to each end.
    bytes: [VecDeque<Vec<u8>>; 2],
    /// The other side of each end has left.
    ended: [bool; 2],
    /// Nothing moves.
    pub stalled: bool,
}

/// What an end is to be told, outside of any lock.
#[derive(Debug)]
pub enum News {
    Bytes(Arc<Endpoint>, Vec<u8>),
    Closed(Arc<Endpoint>),
}

const PIECE_BYTES_MAX: u64 = 3_000;

impl Wire {
    pub fn new(class: Class, number: u64, ends: [Arc<Endpoint>; 2]) -> Self {
        let ends = ends.map(Some);
        Self { class, number, ends, bytes: Default::default(), ended: [false; 2], stalled: false }
    }

    pub fn end(&self, end: usize) -> Option<&Arc<Endpoint>> {
        self.ends[end].as_ref()
    }

    pub fn is_over(&self) -> bool {
        self.ends.iter().all(Option::is_none)
    }

    /// Whether the other side of an end has left.
    pub fn is_half_open(&self) -> bool {
        self.ends.iter().any(Option::is_none) || self.ended.contains(&true)
    }

    /// What an end said, on its way to the other.
    pub fn push(&mut self, from: usize, bytes: Vec<u8>) {
        if self.ends[1 - from].is_some() {
            self.bytes[1 - from].push_back(bytes);
        }
    }

    /// The endpoint there has ended by itself.
    pub fn leave(&mut self, end: usize) {
        self.ends[end] = None;
        self.bytes[end].clear();
        self.ended[1 - end] = true;
    }

    /// What comes next at an end, if something is on its way.
    pub fn arrive(&mut self, end: usize, chance: &mut Chance) -> Option<News> {
        let endpoint = self.ends[end].clone()?;
        let Some(mut first) = self.bytes[end].pop_front() else {
            if !self.ended[end] {
                return None;
            }
            self.leave(end);
            return Some(News::Closed(endpoint));
        };
        if chance.one_in(4) {
            let piece = 1 + chance.below(PIECE_BYTES_MAX) as usize;
            if piece < first.len() {
                self.bytes[end].push_front(first.split_off(piece));
            }
        }
        Some(News::Bytes(endpoint, first))
    }

    /// Returns whom to tell at once.
    pub fn cut(&mut self, cut: Cut, chance: &mut Chance) -> Vec<Arc<Endpoint>> {
        let told = match cut {
            Cut::Reset => {
                self.bytes = Default::default();
                self.ended = [true; 2];
                return self.ends.iter_mut().filter_map(Option::take).collect();
            }
            Cut::HalfOpen(end) => end,
            Cut::Truncated(end) => {
                let rest = &mut self.bytes[1 - end];
                let kept = chance.index(rest.len() + 1);
                rest.truncate(kept);
                end
            }
        };
        let endpoint = self.ends[told].take();
        self.leave(told);
        endpoint.into_iter().collect()
    }

    /// The node at this end lost power.
    pub fn lose_power(&mut self, end: usize, chance: &mut Chance) {
        if self.ends[end].is_some() {
            let kept = chance.index(self.bytes[1 - end].len() + 1);
            self.bytes[1 - end].truncate(kept);
            self.leave(end);
        }
    }

    /// Changes a byte on its way; `false` if there is none.
    pub fn damage(&mut self, end: usize, chance: &mut Chance) -> bool {
        let Some(last) = self.bytes[end].back_mut().filter(|bytes| !bytes.is_empty()) else {
            return false;
        };
        let at = chance.index(last.len());
        last[at] ^= 1 << chance.below(8);
        true
    }
}
