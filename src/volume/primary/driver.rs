//! Runs the primary's machine: locks, device threads, completions, the way to the link.
//!
//! Guarantees: actions of one event are carried out in the order given; messages for the backup
//! leave in the order in which the machine gave them, whatever threads are involved; a range that
//! is wholly current is read without a lock.
//! Does not know: NBD, sockets, the bytes of the link.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError};

use super::asking::Questions;
use super::event::{Action, Event, OutgoingMessage};
use super::media_readers::MediaReaders;
use super::state::{Counters, Primary};
use crate::clock::Instant;
use crate::device::{AlignedBuffer, Device, digest};
use crate::error::{Error, ErrorKind, Result};
use crate::extent::{BlockRange, ByteRange};
use crate::format::frames::CutName;
use crate::map::{IntentLog, OverwriteMap};
use crate::volume::engine::{Engine, Timed};
use crate::volume::service::{Command, Completion, Outcome};

/// The way to the backup. `send` is called with the volume's lock held and must not wait.
pub trait Outbox: Send + Sync {
    /// Returns the sequences of writes that this one covers whole and that will not leave.
    fn send(&self, message: OutgoingMessage) -> Vec<u64>;
    /// Asks for the BLAKE3 of a range; answered by `Driver::digest_arrived` with the tag.
    fn ask_digest(&self, tag: u64, range: ByteRange);
    /// Asks which blocks of the range changed since a cut; answered by `Driver::changes_arrived`
    /// with the tag. `false` if the backup does not know how to answer that.
    fn ask_changes(&self, tag: u64, range: ByteRange, cut: CutName) -> bool;
    /// Ends the session: its connections are closed and made again.
    fn close(&self, reason: &str);
}

/// Where an event comes from: a guest's own thread may do quick device work itself, the link's
/// must not wait for a disk.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Caller {
    Guest,
    Other,
}

/// A primary at work.
pub struct Driver {
    pub(super) device: Arc<dyn Device>,
    pub(super) map: Arc<OverwriteMap>,
    intent: IntentLog,
    /// Blocks that opening presumed unsent after an unclean stop, and that the backup should hold
    /// all the same.
    pub(super) presumed: Mutex<Vec<BlockRange>>,
    pub(super) engine: Arc<Engine>,
    state: Mutex<State>,
    /// Signalled when the machine may have become idle.
    idle: Condvar,
    /// Reads of current blocks are refused too.
    pub(super) refused: AtomicBool,
    pub(super) fast_reads: AtomicU64,
    pub(super) fast_read_bytes: AtomicU64,
    this: Weak<Driver>,
}

pub(super) struct State {
    pub(super) machine: Primary,
    pub(super) completions: HashMap<u64, Completion>,
    cuts: HashMap<u64, crossbeam_channel::Sender<Result<(u64, u64)>>>,
    pub(super) questions: Questions,
    pub(super) media: MediaReaders,
    pub(super) next_id: u64,
    pub(super) outbox: Option<Arc<dyn Outbox>>,
    /// Set while requests are refused: closing, or the operator's word is being carried out.
    pub(super) closed: Option<Error>,
    /// Nothing is under way and nothing may begin: no tick, no session.
    still: bool,
    /// Samples of both sides agreed since the volume was opened, or there was nothing to compare.
    compared: bool,
}

/// A completion that is due, called once the lock is free.
type Due = (Completion, Outcome);

impl std::fmt::Debug for Driver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Driver").field("map", &self.map.identity()).finish_non_exhaustive()
    }
}

impl Driver {
    #[must_use]
    pub fn new(
        machine: Primary,
        device: Arc<dyn Device>,
        map: Arc<OverwriteMap>,
        intent: IntentLog,
        presumed: Vec<BlockRange>,
        engine: Arc<Engine>,
    ) -> Arc<Self> {
        let driver = Arc::new_cyclic(|this| Self {
            device,
            map,
            intent,
            presumed: Mutex::new(presumed),
            engine: Arc::clone(&engine),
            state: Mutex::new(State {
                machine,
                completions: HashMap::new(),
                cuts: HashMap::new(),
                questions: Questions::default(),
                media: MediaReaders::default(),
                next_id: 0,
                outbox: None,
                closed: None,
                still: false,
                compared: false,
            }),
            idle: Condvar::new(),
            refused: AtomicBool::new(false),
            fast_reads: AtomicU64::new(0),
            fast_read_bytes: AtomicU64::new(0),
            this: Weak::clone(this),
        });
        let timed: Weak<dyn Timed> = Weak::clone(&driver.this) as _;
        engine.register(timed);
        driver
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn own(&self) -> Arc<Self> {
        self.this.upgrade().expect("a driver lives in an Arc")
    }

    /// Tells the machine of an event and does what it says, with whatever follows from that.
    pub fn event(&self, event: Event, caller: Caller) {
        self.run(self.lock(), event, caller);
    }

    pub(super) fn run<'a>(&'a self, state: MutexGuard<'a, State>, event: Event, caller: Caller) {
        self.run_all(state, VecDeque::from([event]), caller);
    }

    pub(super) fn run_all<'a>(
        &'a self,
        mut state: MutexGuard<'a, State>,
        mut events: VecDeque<Event>,
        caller: Caller,
    ) {
        if state.still {
            return;
        }
        loop {
            let mut actions = Vec::new();
            while let Some(event) = events.pop_front() {
                let now = self.engine.now();
                state.machine.apply(event, now, &mut actions);
            }
            self.settle(state, actions, caller, &mut events);
            if events.is_empty() {
                return;
            }
            state = self.lock();
        }
    }

    /// Messages leave under the lock, so that their order is the machine's; then completions are
    /// called and device actions done without it.
    fn settle(
        &self,
        mut state: MutexGuard<'_, State>,
        actions: Vec<Action>,
        caller: Caller,
        events: &mut VecDeque<Event>,
    ) {
        let mut due = Vec::new();
        let rest = state.sort_out(actions, &mut due);
        if state.machine.is_idle() {
            self.idle.notify_all();
        }
        drop(state);
        for (completion, outcome) in due {
            completion(outcome);
        }
        for action in rest {
            self.carry_out(action, caller, events);
        }
    }

    /// As `settle`, with all device work left to the device threads.
    pub(super) fn settle_elsewhere(&self, state: MutexGuard<'_, State>, actions: Vec<Action>) {
        let mut events = VecDeque::new();
        self.settle(state, actions, Caller::Other, &mut events);
        assert!(events.is_empty(), "others do device work on device threads");
    }

    /// Does a device action here if that is quick, else beside this thread if it has a ring, else
    /// on a device thread.
    fn carry_out(&self, action: Action, caller: Caller, events: &mut VecDeque<Event>) {
        let quick = matches!(action, Action::ReadLocal { .. } | Action::WriteLocal { .. });
        if quick && caller == Caller::Guest && self.device.answers_at_once() {
            events.push_back(self.perform(action));
            return;
        }
        if caller == Caller::Guest && self.write_beside(&action) {
            return;
        }
        let driver = self.own();
        self.engine.spawn(move || {
            let event = driver.perform(action);
            let engine = Arc::clone(&driver.engine);
            engine.follow(move || driver.event(event, Caller::Guest));
        });
    }

    fn perform(&self, action: Action) -> Event {
        match action {
            Action::ReadLocal { token, range, parts } => {
                Event::ReadDone { token, result: self.read_parts(range, &parts) }
            }
            Action::WriteLocal { token, offset, content } => {
                self.expect_nothing_of(ByteRange::new(offset, content.len()));
                Event::WriteDone { token, result: content.write_to(&*self.device, offset) }
            }
            Action::DigestLocal { token, range } => {
                Event::DigestDone { token, result: digest(&*self.device, range) }
            }
            Action::FlushLocal => Event::DeviceFlushed { result: self.device.flush() },
            Action::Commit { epoch, capture } => {
                // R1: what the captured bits speak of is durable before they are.
                let flushed = self.device.flush();
                let result = flushed.and_then(|()| self.map.file().commit(&capture));
                Event::Committed { epoch, result }
            }
            Action::RecordIntent { extents } => {
                Event::IntentRecorded { result: self.intent.record(&extents) }
            }
            Action::Send(_)
            | Action::Complete { .. }
            | Action::CutDone { .. }
            | Action::ReadMedium { .. } => {
                unreachable!("those were sorted out under the lock")
            }
        }
    }

    fn read_parts(&self, range: ByteRange, parts: &[ByteRange]) -> Result<AlignedBuffer> {
        let mut buffer = AlignedBuffer::zeroed(range.length as usize);
        for part in parts {
            let start = (part.offset - range.offset) as usize;
            self.device.read_at(part.offset, &mut buffer[start..start + part.length as usize])?;
        }
        Ok(buffer)
    }

    // The link.

    /// The session is active: messages go to this outbox from now on.
    pub fn link_up(&self, outbox: Arc<dyn Outbox>) {
        let mut state = self.lock();
        if state.still {
            drop(state);
            outbox.close("the volume is being closed or declared lost");
            return;
        }
        if let Some(old) = state.outbox.replace(Arc::clone(&outbox)) {
            old.close("another session took over");
            let mut actions = Vec::new();
            state.machine.apply(Event::LinkDown, self.engine.now(), &mut actions);
            self.settle_elsewhere(state, actions);
            state = self.lock();
        }
        if state.compared {
            self.run(state, Event::LinkUp, Caller::Other);
            self.ask_for_media();
            return;
        }
        drop(state);
        let driver = self.own();
        self.engine.spawn(move || driver.begin_session(&outbox));
    }

    /// Before anything is sent to the backup for the first time, both sides must agree where the
    /// map says that they do: else one of the devices is not the one that the map speaks of.
    fn begin_session(&self, outbox: &Arc<dyn Outbox>) {
        let compared = self.compare_samples(outbox);
        let mut state = self.lock();
        if state.outbox.as_ref().is_none_or(|held| !Arc::ptr_eq(held, outbox)) {
            return;
        }
        match compared {
            Ok(()) => {
                state.compared = true;
                self.expect_nothing_of_the_backup();
                self.run(state, Event::LinkUp, Caller::Other);
                self.ask_for_media();
            }
            Err(error) if error.kind() == ErrorKind::Identity => {
                state.outbox = None;
                outbox.close(&error.to_string());
                self.refuse_from_now_on(state, &error);
            }
            // The link's affair: it is made again.
            Err(error) => {
                state.outbox = None;
                outbox.close(&error.to_string());
            }
        }
    }

    fn refuse_from_now_on(&self, mut state: MutexGuard<'_, State>, error: &Error) {
        self.refused.store(true, Ordering::Release);
        state.closed = Some(error.clone());
        let mut actions = Vec::new();
        state.machine.fail_waiting_requests(error, &mut actions);
        self.settle_elsewhere(state, actions);
    }

    /// Why requests are refused, if they are.
    #[must_use]
    pub fn refusal(&self) -> Option<Error> {
        self.lock().closed.clone()
    }

    /// The session that uses this outbox has ended.
    pub fn link_down(&self, outbox: &Arc<dyn Outbox>) {
        let mut state = self.lock();
        if state.outbox.as_ref().is_none_or(|held| !Arc::ptr_eq(held, outbox)) {
            return;
        }
        state.outbox = None;
        state.questions = Questions::default();
        self.run(state, Event::LinkDown, Caller::Other);
    }

    /// Takes an event of the session that uses this outbox; those of older ones are ignored (R11).
    pub fn link_event(&self, outbox: &Arc<dyn Outbox>, event: Event) {
        let state = self.lock();
        if state.outbox.as_ref().is_some_and(|held| Arc::ptr_eq(held, outbox)) {
            self.run(state, event, Caller::Other);
        }
    }

    /// Cuts a snapshot in the mirror stream; returns generation and cut sequence once it is
    /// durable at the backup.
    pub fn cut(
        &self,
        snapshot: uuid::Uuid,
        label: String,
        selection: Vec<ByteRange>,
        timeout_ms: u64,
    ) -> Result<(u64, u64)> {
        let receiver = self.begin_cut(snapshot, label, selection, timeout_ms)?;
        self.engine.receive(&receiver, None).map_err(|_| link_is_down())?
    }

    /// As `cut`, for who does not wait here.
    pub fn begin_cut(
        &self,
        snapshot: uuid::Uuid,
        label: String,
        selection: Vec<ByteRange>,
        timeout_ms: u64,
    ) -> Result<Receiver<Result<(u64, u64)>>> {
        let (sender, receiver) = crossbeam_channel::bounded(1);
        let mut state = self.lock();
        state.next_id += 1;
        let id = state.next_id;
        if let Some(error) = &state.closed {
            return Err(error.clone());
        }
        state.cuts.insert(id, sender);
        let event = Event::Cut { id, snapshot, label, selection, timeout_ms };
        self.run(state, event, Caller::Other);
        Ok(receiver)
    }

    /// Makes everything that is current durably so: device, then map.
    pub fn commit(&self) -> Result<()> {
        let (sender, receiver) = crossbeam_channel::bounded(1);
        let mut state = self.lock();
        if let Some(error) = &state.closed {
            return Err(error.clone());
        }
        state.next_id += 1;
        let id = state.next_id;
        let completion: Completion = Box::new(move |outcome| {
            let _gone = sender.send(outcome);
        });
        state.completions.insert(id, completion);
        self.run(state, Event::CommitMap { id }, Caller::Other);
        self.await_answer(&receiver).map(|_| ())
    }

    /// Waits for a request of its own, e.g. a flush.
    pub fn wait_for(&self, command: Command) -> Outcome {
        let (sender, receiver) = crossbeam_channel::bounded(1);
        self.submit(
            command,
            Box::new(move |outcome| {
                let _gone = sender.send(outcome);
            }),
        );
        self.await_answer(&receiver)
    }

    fn await_answer(&self, receiver: &Receiver<Outcome>) -> Outcome {
        self.engine.receive(receiver, None).unwrap_or_else(|gone| match gone {
            // Of threads that stand still nobody hears; a scheduler knows that nothing will come.
            RecvTimeoutError::Timeout => {
                Err(Error::new(ErrorKind::Timeout, "nothing is left that would answer"))
            }
            RecvTimeoutError::Disconnected => unreachable!("every request is answered"),
        })
    }

    /// Looks at the machine, or changes it outside of events; what follows is carried out.
    pub fn with_machine<T>(
        &self,
        look: impl FnOnce(&mut Primary, Instant, &mut Vec<Action>) -> T,
    ) -> T {
        let mut state = self.lock();
        let mut actions = Vec::new();
        let value = look(&mut state.machine, self.engine.now(), &mut actions);
        self.settle_elsewhere(state, actions);
        value
    }

    /// As `with_machine`, refused while the volume is being closed or declared lost.
    pub fn with_open_machine<T>(
        &self,
        change: impl FnOnce(&mut Primary) -> Result<T>,
    ) -> Result<T> {
        let mut state = self.lock();
        match &state.closed {
            Some(error) => Err(error.clone()),
            None => change(&mut state.machine),
        }
    }

    #[must_use]
    pub fn map(&self) -> &Arc<OverwriteMap> {
        &self.map
    }

    #[must_use]
    pub fn counters(&self) -> Counters {
        let mut counters = self.lock().machine.counters();
        counters.reads += self.fast_reads.load(Ordering::Relaxed);
        counters.bytes_read += self.fast_read_bytes.load(Ordering::Relaxed);
        counters
    }

    /// Refuses requests from now on with this error, ends those that wait, and waits until nothing
    /// is under way. Nothing begins again before `resume`.
    pub fn quiesce(&self, error: Error, timeout: Duration) -> Result<()> {
        let mut actions = Vec::new();
        let mut state = self.lock();
        state.closed = Some(error.clone());
        if let Some(outbox) = state.outbox.take() {
            outbox.close("the volume is being closed or declared lost");
        }
        state.questions = Questions::default();
        state.machine.fail_waiting_requests(&error, &mut actions);
        self.settle_elsewhere(state, actions);
        let timeout = self.engine.patience(timeout, || self.lock().machine.is_idle());
        let state = self.lock();
        let (mut state, waited) = self
            .idle
            .wait_timeout_while(state, timeout, |state| !state.machine.is_idle())
            .unwrap_or_else(PoisonError::into_inner);
        if waited.timed_out() {
            // The word is not carried out: the volume goes on as it was.
            state.closed = None;
            return Err(Error::busy("device operations are still under way; try again"));
        }
        state.still = true;
        Ok(())
    }

    /// Begins anew with another machine over the same map, after `quiesce`.
    pub fn resume(&self, machine: Primary) -> Result<()> {
        let mut state = self.lock();
        assert!(state.machine.is_idle(), "quiesced before");
        self.intent.record(&[])?;
        state.machine = machine;
        state.media = MediaReaders::default();
        state.closed = None;
        state.still = false;
        state.compared = false;
        self.refused.store(false, Ordering::Release);
        Ok(())
    }

    /// After `quiesce`: everything durable, and no extent hot.
    pub fn finish(&self) -> Result<()> {
        if let Some(error) = self.lock().machine.poisoned() {
            return Err(error.clone());
        }
        self.device.flush()?;
        self.map.file().commit_all()?;
        self.intent.record(&[])
    }
}

pub(super) fn link_is_down() -> Error {
    Error::link("the link to the backup is down")
}

impl State {
    /// Under the lock, in order: messages leave, completions are found; device actions remain.
    fn sort_out(&mut self, actions: Vec<Action>, due: &mut Vec<Due>) -> Vec<Action> {
        let mut rest = Vec::new();
        for action in actions {
            match action {
                Action::Send(message) => {
                    if let Some(outbox) = &self.outbox {
                        let sequence = message.sequence();
                        let superseded = outbox.send(message);
                        self.machine.superseded(&superseded, sequence);
                    }
                }
                Action::Complete { id, outcome } => {
                    let completion =
                        self.completions.remove(&id).expect("a request is answered once");
                    due.push((completion, outcome));
                }
                Action::ReadMedium { medium, token, range } => {
                    self.media.ask(medium, token, range);
                }
                Action::CutDone { id, result } => {
                    if let Some(waiting) = self.cuts.remove(&id) {
                        let _gone = waiting.send(result);
                    }
                }
                device => rest.push(device),
            }
        }
        rest
    }
}

impl Timed for Driver {
    fn tick(&self, _now: Instant) {
        self.event(Event::Tick, Caller::Other);
    }
}
