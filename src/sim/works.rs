//! Whatever may happen next without anybody doing anything: jobs of the nodes, bytes on the wires.
//!
//! Guarantees: one thing at a time, in an order that chance decides; a job or an endpoint that is
//! at work may wait for others, who then work inside it. What a node that lost power left behind
//! never runs.
//! Does not know: what a job does, what bytes mean.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::chance::Chance;
use super::rare::{Counts, RareState};
use super::trace::Trace;
use super::wire::{Cut, HERE, News, THERE, Wire};
use crate::format::frames::Class;
use crate::link::Endpoint;
use crate::volume::engine::{Job, Scheduler};

/// What the transport takes from an endpoint at a time.
const TAKE_BYTES: u64 = 16 << 10;

/// See the module.
pub struct Works {
    state: Mutex<State>,
    trace: Trace,
}

struct State {
    chance: Chance,
    jobs: Vec<(usize, Job)>,
    wires: Vec<Wire>,
    next_wire: u64,
    /// Of eight steps, how many look at jobs first.
    jobs_first: u64,
    rare: Counts,
}

/// The scheduler of one node.
struct Hands {
    node: usize,
    works: Arc<Works>,
}

impl Scheduler for Hands {
    fn take(&self, job: Job) {
        self.works.lock().jobs.push((self.node, job));
    }

    fn work(&self) -> bool {
        self.works.step()
    }
}

impl Works {
    pub fn new(seed: u64, jobs_first: u64, trace: Trace) -> Arc<Self> {
        let state = State {
            chance: Chance::new(seed),
            jobs: Vec::new(),
            wires: Vec::new(),
            next_wire: 0,
            jobs_first,
            rare: Counts::default(),
        };
        Arc::new(Self { state: Mutex::new(state), trace })
    }

    pub fn hands(self: &Arc<Self>, node: usize) -> Arc<dyn Scheduler> {
        Arc::new(Hands { node, works: Arc::clone(self) })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets one thing happen; `false` if nothing can.
    pub fn step(&self) -> bool {
        let jobs_first = {
            let state = &mut *self.lock();
            state.chance.below(8) < state.jobs_first
        };
        let first: fn(&Self) -> bool = if jobs_first { Self::run_job } else { Self::move_bytes };
        first(self) || self.run_job() || self.move_bytes()
    }

    fn run_job(&self) -> bool {
        let (node, job) = {
            let state = &mut *self.lock();
            if state.jobs.is_empty() {
                return false;
            }
            let at = state.chance.index(state.jobs.len());
            state.jobs.swap_remove(at)
        };
        self.trace.note(|| format!("  job of {}", name(node)));
        job();
        true
    }

    /// Lets bytes enter or leave a wire, the first in which something can move.
    fn move_bytes(&self) -> bool {
        let (first, count) = {
            let state = &mut *self.lock();
            let count = state.wires.len() * 2;
            if count == 0 {
                return false;
            }
            (state.chance.index(count), count)
        };
        (0..count).any(|turn| {
            let at = (first + turn) % count;
            self.move_on(at / 2, at % 2)
        })
    }

    fn move_on(&self, wire: usize, end: usize) -> bool {
        let (news, rest) = {
            let state = &mut *self.lock();
            let Some(held) = state.wires.get_mut(wire).filter(|wire| !wire.stalled) else {
                return false;
            };
            if !state.chance.one_in(3)
                && let Some(news) = held.arrive(end, &mut state.chance)
            {
                (Some(news), None)
            } else {
                (None, held.end(end).cloned())
            }
        };
        if let Some(news) = news {
            self.note_late(wire, end, &news);
            self.tell(news, end);
            self.forget_wires();
            return true;
        }
        rest.is_some_and(|endpoint| self.take_from(wire, end, &endpoint)) || self.arrive(wire, end)
    }

    fn arrive(&self, wire: usize, end: usize) -> bool {
        let news = {
            let state = &mut *self.lock();
            let Some(held) = state.wires.get_mut(wire) else { return false };
            held.arrive(end, &mut state.chance)
        };
        let Some(news) = news else { return false };
        self.note_late(wire, end, &news);
        self.tell(news, end);
        self.forget_wires();
        true
    }

    fn tell(&self, news: News, end: usize) {
        match news {
            News::Bytes(endpoint, bytes) => {
                self.trace.note(|| format!("  {} receives {} bytes", name(end), bytes.len()));
                endpoint.receive(&bytes);
            }
            News::Closed(endpoint) => {
                endpoint.close();
                let problem = || endpoint.problem();
                self.trace.note(|| format!("  {} loses a connection: {:?}", name(end), problem()));
            }
        }
    }

    /// Bytes of a connection after its successor exists.
    fn note_late(&self, wire: usize, end: usize, news: &News) {
        let state = &mut *self.lock();
        let held = &state.wires[wire];
        let newer = |other: &Wire| {
            other.class == held.class
                && other.number > held.number
                && other.end(HERE).is_some_and(|endpoint| endpoint.state() == "active")
        };
        let late = held.class == Class::Mirror && state.wires.iter().any(newer);
        if late && matches!(news, News::Bytes(..)) {
            state.rare.note(match end {
                HERE => RareState::LateAcknowledgement,
                _ => RareState::SessionFenced,
            });
        }
    }

    fn take_from(&self, wire: usize, end: usize, endpoint: &Arc<Endpoint>) -> bool {
        let limit = 1 + self.lock().chance.below(TAKE_BYTES) as usize;
        if let Some(bytes) = endpoint.take_outgoing(limit) {
            self.lock().wires[wire].push(end, bytes);
            return true;
        }
        if matches!(endpoint.state(), "failed" | "closed") {
            self.trace
                .note(|| format!("  {} leaves a connection: {:?}", name(end), endpoint.problem()));
            self.lock().wires[wire].leave(end);
            // The transport tells that the socket is gone; there is nothing else to hear.
            endpoint.close();
            self.forget_wires();
            return true;
        }
        false
    }

    fn forget_wires(&self) {
        self.lock().wires.retain(|wire| !wire.is_over());
    }

    // For whoever drives the simulation.

    pub fn connect(&self, class: Class, ends: [Arc<Endpoint>; 2]) {
        let state = &mut *self.lock();
        let is_session = |wire: &Wire| {
            wire.class == class && wire.end(THERE).is_some_and(|endpoint| endpoint.epoch() > 0)
        };
        if class == Class::Mirror && state.wires.iter().any(is_session) {
            state.rare.note(RareState::SessionSuperseded);
        }
        state.next_wire += 1;
        let number = state.next_wire;
        state.wires.push(Wire::new(class, number, ends));
    }

    /// Whether the primary has a connection of this class that nobody has left.
    pub fn is_connected(&self, class: Class) -> bool {
        let state = self.lock();
        state.wires.iter().any(|wire| wire.class == class && wire.end(HERE).is_some())
    }

    pub fn wires(&self) -> usize {
        self.lock().wires.len()
    }

    /// Cuts a wire of those there are; `late`: what still arrives does so later.
    pub fn cut_one(&self, cut: Cut, late: bool) {
        let told = {
            let state = &mut *self.lock();
            if state.wires.is_empty() {
                return;
            }
            let at = state.chance.index(state.wires.len());
            self.trace.note(|| format!("a {:?} wire is cut: {cut:?}", state.wires[at].class));
            state.wires[at].stalled |= late;
            state.wires[at].cut(cut, &mut state.chance)
        };
        told.iter().for_each(Endpoint::close);
        self.forget_wires();
    }

    pub fn cut_all(&self, cut: Cut, late: bool) {
        self.trace.note(|| format!("all wires are cut: {cut:?}"));
        for _ in 0..self.wires() {
            let told = {
                let state = &mut *self.lock();
                let next = state.wires.iter_mut().find(|wire| !wire.is_half_open());
                next.map_or_else(Vec::new, |wire| {
                    wire.stalled |= late;
                    wire.cut(cut, &mut state.chance)
                })
            };
            told.iter().for_each(Endpoint::close);
        }
        self.forget_wires();
    }

    /// Nothing moves on a wire any more, or all move again.
    pub fn stall_one(&self) {
        let state = &mut *self.lock();
        if !state.wires.is_empty() {
            let at = state.chance.index(state.wires.len());
            state.wires[at].stalled = true;
        }
    }

    pub fn go_on(&self) {
        self.lock().wires.iter_mut().for_each(|wire| wire.stalled = false);
    }

    /// Changes a byte that is on its way somewhere; returns whether one was.
    pub fn damage_one(&self) -> bool {
        let state = &mut *self.lock();
        if state.wires.is_empty() {
            return false;
        }
        let at = state.chance.index(state.wires.len());
        let end = state.chance.index(2);
        state.wires[at].damage(end, &mut state.chance)
    }

    /// Lets the endpoints see that time has passed.
    pub fn tick(&self) {
        let endpoints: Vec<_> = {
            let state = self.lock();
            let ends = state.wires.iter().flat_map(|wire| [wire.end(HERE), wire.end(THERE)]);
            ends.flatten().cloned().collect()
        };
        for endpoint in endpoints {
            endpoint.tick();
        }
    }

    /// A node lost power: its jobs are gone, its ends of the wires say nothing any more.
    pub fn lose_power(&self, node: usize) {
        let jobs = {
            let state = &mut *self.lock();
            for wire in &mut state.wires {
                wire.lose_power(node, &mut state.chance);
            }
            let (gone, kept) = std::mem::take(&mut state.jobs)
                .into_iter()
                .partition::<Vec<_>, _>(|(held, _)| *held == node);
            state.jobs = kept;
            gone
        };
        // Dropped without the lock: what they hold may be the last of its kind.
        drop(jobs);
        self.forget_wires();
    }

    pub fn take_rare(&self) -> Counts {
        std::mem::take(&mut self.lock().rare)
    }
}

fn name(node: usize) -> &'static str {
    ["the primary", "the backup"][node]
}
