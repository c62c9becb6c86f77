//! The link as a backup volume uses it: which session it listens to, and the work that arrives.
//!
//! | arrives | done where | order |
//! |---|---|---|
//! | hello | device thread | behind what the older session brought (R11) |
//! | mirrored operations | one device thread at a time | as they came; what waits is one batch |
//! | fetch, digest | any device thread | at once, or after the operations it must see |
//! | changes | any device thread | at once: what is asked for does not change in a session |
//!
//! Guarantees: nothing of an older session is applied once a newer one is welcomed; a fetch sees
//! the operations that it asked to see. Does not know: sockets.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use uuid::Uuid;

use super::endpoint::{Endpoint, Side};
use super::fence::{Acceptance, Decision, Fence, Identity};
use super::{Event, Message};
use crate::bitmap::Bitmap;
use crate::device::{AlignedBuffer, Payload};
use crate::error::{Error, ErrorKind, Result};
use crate::extent::ByteRange;
use crate::format::frames::{
    BootId, ChangedBlocks, Class, Content, CutName, Failure, GoodbyeReason, Hello, Refusal,
    RefusalCode,
};
use crate::snapshot::CutOrder;
use crate::volume::backup::{Answer, BackupVolume, MirrorOperation};
use crate::volume::engine::Engine;

/// Fetches wait in `deferred` for what they must see, so that no device thread waits for another.
const NO_WAIT: Duration = Duration::ZERO;

/// See the module.
pub struct BackupSide {
    name: String,
    volume: Arc<BackupVolume>,
    /// The daemon itself has made the device, and nothing was ever written to it.
    created_empty: bool,
    engine: Arc<Engine>,
    /// Milliseconds since 1970, for the date of a cut.
    wall_clock: fn() -> u64,
    state: Mutex<State>,
    this: Weak<BackupSide>,
}

struct State {
    fence: Fence,
    endpoints: HashMap<u64, (Arc<Endpoint>, Class, u64)>,
    mirrored: Vec<(Arc<Endpoint>, u64, Message)>,
    applying: bool,
    deferred: Vec<(Arc<Endpoint>, u64, Message)>,
    /// What was last told of, by session and cut: asked for piece by piece.
    changed: Option<(u64, CutName, Arc<Bitmap>)>,
    counters: BackupCounters,
}

/// What has happened since the volume was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BackupCounters {
    pub reads: u64,
    pub bytes_sent: u64,
    pub writes: u64,
    pub bytes_mirrored: u64,
    pub flushes: u64,
}

impl BackupSide {
    #[must_use]
    pub fn new(
        name: String,
        volume: Arc<BackupVolume>,
        created_empty: bool,
        boot_id: BootId,
        engine: Arc<Engine>,
        wall_clock: fn() -> u64,
    ) -> Arc<Self> {
        let identity = volume.identity();
        let known = (!identity.volume.is_nil())
            .then_some(Identity { volume: identity.volume, generation: identity.generation });
        let state = State {
            fence: Fence::new(identity.backup, identity.geometry, known, boot_id),
            endpoints: HashMap::new(),
            mirrored: Vec::new(),
            applying: false,
            deferred: Vec::new(),
            changed: None,
            counters: BackupCounters::default(),
        };
        Arc::new_cyclic(|this| Self {
            name,
            volume,
            created_empty,
            engine,
            wall_clock,
            state: Mutex::new(state),
            this: Weak::clone(this),
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn own(&self) -> Arc<Self> {
        self.this.upgrade().expect("a side lives in an Arc")
    }

    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    #[must_use]
    pub fn volume(&self) -> &Arc<BackupVolume> {
        &self.volume
    }

    #[must_use]
    pub fn counters(&self) -> BackupCounters {
        self.lock().counters
    }

    /// What each class is doing, for status.
    #[must_use]
    pub fn states(&self) -> HashMap<Class, &'static str> {
        let endpoints: Vec<_> = self.lock().endpoints.values().cloned().collect();
        endpoints.into_iter().map(|(endpoint, class, _)| (class, endpoint.state())).collect()
    }

    /// Whether a primary mirrors to it now.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        let state = self.lock();
        state
            .endpoints
            .values()
            .any(|(_, class, epoch)| *class == Class::Mirror && state.fence.admits(*epoch))
    }

    /// A hello named this volume.
    pub(super) fn greet(&self, endpoint: Arc<Endpoint>, hello: Hello) {
        let side = self.own();
        self.engine.spawn(move || side.decide(&endpoint, &hello));
    }

    fn decide(&self, endpoint: &Arc<Endpoint>, hello: &Hello) {
        if hello.generation == 0 && !hello.volume.is_nil() && !self.may_begin_empty(hello) {
            endpoint.refuse(Refusal::new(
                RefusalCode::WrongVolume,
                &format!(
                    "volume `{}`: the primary is new and empty, this backup is not: say `restore \
                     NAME --lost all` at the primary if the backup is the truth, `--lost none` if \
                     the primary is",
                    self.name
                ),
            ));
            return;
        }
        let decision = self.lock().fence.hello(hello);
        match decision {
            Decision::Refuse(refusal) => endpoint.refuse(refusal),
            Decision::Accept(acceptance) => {
                if let Err(error) = self.accept(endpoint, hello.class, &acceptance) {
                    self.lock().fence.ended(acceptance.welcome.session_epoch);
                    let code = RefusalCode::NotReady;
                    endpoint.refuse(Refusal::new(code, &error.to_string()));
                }
            }
        }
    }

    /// Both sides were made empty, or this is the volume that began so.
    fn may_begin_empty(&self, hello: &Hello) -> bool {
        let held = self.volume.identity();
        held.volume == hello.volume || (held.volume.is_nil() && self.created_empty)
    }

    fn accept(
        &self,
        endpoint: &Arc<Endpoint>,
        class: Class,
        acceptance: &Acceptance,
    ) -> Result<()> {
        let welcome = &acceptance.welcome;
        let epoch = welcome.session_epoch;
        if let Some(old) = acceptance.supersedes {
            self.end_session(old, GoodbyeReason::Superseded, "a newer session took its place");
        }
        if let Some(identity) = acceptance.record {
            self.volume.adopt(identity.volume, identity.generation)?;
        }
        if class == Class::Mirror && epoch != 0 {
            // Waits for the batch in progress; what the older session still queued is refused.
            self.volume.begin_session(epoch, welcome.applied_sequence)?;
            if !self.lock().fence.opened(epoch) {
                return Err(Error::link("another session took over meanwhile"));
            }
        }
        self.lock().endpoints.insert(endpoint.id(), (Arc::clone(endpoint), class, epoch));
        endpoint.set_label(format!("{} {class:?}", self.name).to_lowercase());
        endpoint.accept(welcome)
    }

    fn end_session(&self, epoch: u64, reason: GoodbyeReason, words: &str) {
        let mut state = self.lock();
        state.fence.ended(epoch);
        state.changed = None;
        let ended: Vec<_> = state
            .endpoints
            .values()
            .filter(|(_, _, held)| *held == epoch)
            .map(|(endpoint, _, _)| Arc::clone(endpoint))
            .collect();
        state.endpoints.retain(|_, (_, _, held)| *held != epoch);
        state.mirrored.retain(|(_, held, _)| *held != epoch);
        state.deferred.retain(|(_, held, _)| *held != epoch);
        drop(state);
        for endpoint in ended {
            endpoint.depart(reason, words);
        }
    }

    /// Ends every session; for the end of the volume.
    pub fn end(&self) {
        let epochs: Vec<u64> = self.lock().endpoints.values().map(|(_, _, e)| *e).collect();
        for epoch in epochs {
            self.end_session(epoch, GoodbyeReason::Stopping, "the backup is stopping");
        }
    }

    pub(super) fn received(&self, endpoint: &Arc<Endpoint>, message: Message) {
        let mut state = self.lock();
        let epoch = endpoint.epoch();
        match message {
            Message::Changes { .. } => {
                drop(state);
                self.serve_elsewhere(Arc::clone(endpoint), epoch, message);
            }
            Message::Fetch { after_sequence, .. } | Message::Digest { after_sequence, .. } => {
                if after_sequence == 0 {
                    drop(state);
                    self.serve_elsewhere(Arc::clone(endpoint), epoch, message);
                } else {
                    state.deferred.push((Arc::clone(endpoint), epoch, message));
                    self.begin_applying(state);
                }
            }
            message => {
                state.mirrored.push((Arc::clone(endpoint), epoch, message));
                self.begin_applying(state);
            }
        }
    }

    fn serve_elsewhere(&self, endpoint: Arc<Endpoint>, epoch: u64, message: Message) {
        let side = self.own();
        self.engine.spawn(move || side.serve(&endpoint, epoch, &message));
    }

    fn begin_applying(&self, mut state: MutexGuard<'_, State>) {
        if !std::mem::replace(&mut state.applying, true) {
            drop(state);
            let side = self.own();
            self.engine.spawn(move || side.apply_all());
        }
    }

    /// Applies what has arrived, as one batch, then what arrived meanwhile.
    fn apply_all(&self) {
        loop {
            let mut state = self.lock();
            let batch = std::mem::take(&mut state.mirrored);
            let deferred = std::mem::take(&mut state.deferred);
            if batch.is_empty() && deferred.is_empty() {
                state.applying = false;
                return;
            }
            drop(state);
            let mut from = 0;
            while from < batch.len() {
                let (endpoint, epoch, _) = &batch[from];
                let same = batch[from..].iter().take_while(|(_, held, _)| held == epoch).count();
                self.apply(endpoint, *epoch, &batch[from..from + same]);
                from += same;
            }
            // Sent before what was applied just now, or behind it in this very session.
            let mut early: Vec<_> = deferred
                .into_iter()
                .filter(|(endpoint, epoch, message)| {
                    !self.serve_unless_early(endpoint, *epoch, message)
                })
                .collect();
            let mut state = self.lock();
            early.retain(|(_, epoch, _)| state.fence.admits(*epoch));
            // What they must see is still on its way, on another connection: with it comes the next
            // round. Whatever arrived meanwhile has it now.
            let rests = state.mirrored.is_empty() && state.deferred.is_empty();
            state.deferred.extend(early);
            if rests {
                state.applying = false;
                return;
            }
        }
    }

    fn apply(&self, endpoint: &Arc<Endpoint>, epoch: u64, batch: &[(Arc<Endpoint>, u64, Message)]) {
        let operations: Vec<MirrorOperation> =
            batch.iter().map(|(_, _, message)| self.operation(message)).collect();
        self.count(&operations);
        match self.volume.apply(epoch, operations) {
            Ok(answers) => {
                for answer in answers {
                    // A session that has ended is told nothing.
                    let _ended = endpoint.send(self.message(answer));
                }
            }
            Err(error) => {
                self.end_session(epoch, GoodbyeReason::Fault, &error.to_string());
            }
        }
    }

    fn count(&self, operations: &[MirrorOperation]) {
        let mut state = self.lock();
        for operation in operations {
            match operation {
                MirrorOperation::Flush { .. } => state.counters.flushes += 1,
                MirrorOperation::Cut { .. } => {}
                MirrorOperation::Write { .. } | MirrorOperation::Zero { .. } => {
                    state.counters.writes += 1;
                    state.counters.bytes_mirrored +=
                        operation.overwrites().map_or(0, |range| range.length);
                }
            }
        }
    }

    fn operation(&self, message: &Message) -> MirrorOperation {
        match message {
            Message::Write { sequence, offset, data } => {
                MirrorOperation::Write { sequence: *sequence, offset: *offset, data: data.clone() }
            }
            Message::Zero { sequence, range } => {
                MirrorOperation::Zero { sequence: *sequence, range: *range }
            }
            Message::Flush { sequence } => MirrorOperation::Flush { sequence: *sequence },
            Message::Cut { sequence, snapshot, selection, label } => MirrorOperation::Cut {
                sequence: *sequence,
                order: CutOrder {
                    snapshot: *snapshot,
                    label: label.clone(),
                    created_ms: (self.wall_clock)(),
                    selection: selection.clone(),
                },
            },
            _ => unreachable!("the connection lets only mirrored operations through"),
        }
    }

    fn message(&self, answer: Answer) -> Message {
        match answer {
            Answer::Applied { through } => Message::Applied { sequence: through },
            Answer::Flushed { sequence } => Message::Flushed { sequence },
            Answer::CutDone { sequence, snapshot } => Message::CutDone {
                sequence,
                snapshot,
                generation: self.volume.identity().generation,
                cut_sequence: sequence,
            },
            Answer::CutFailed { sequence, error, .. } | Answer::Failed { sequence, error } => {
                Message::Failed { sequence, failure: Failure::from_error(&error) }
            }
        }
    }

    /// Answers a read, but not before the operations that it must see; whether it did.
    fn serve_unless_early(&self, endpoint: &Arc<Endpoint>, epoch: u64, message: &Message) -> bool {
        let awaited = match message {
            Message::Fetch { after_sequence, .. } | Message::Digest { after_sequence, .. } => {
                *after_sequence
            }
            _ => unreachable!("only reads are deferred"),
        };
        let applied = self.volume.has_applied(epoch, awaited);
        if applied {
            self.serve(endpoint, epoch, message);
        }
        applied
    }

    fn serve(&self, endpoint: &Arc<Endpoint>, epoch: u64, message: &Message) {
        let reply = match message {
            Message::Fetch { tag, range, after_sequence } => {
                match self.fetch(epoch, *range, *after_sequence) {
                    Ok(content) => Message::Data { tag: *tag, offset: range.offset, content },
                    Err(error) => failed(*tag, &error),
                }
            }
            Message::Digest { tag, range, .. } => match self.volume.digest(*range) {
                Ok(digest) => Message::DigestReply { tag: *tag, digest },
                Err(error) => failed(*tag, &error),
            },
            Message::Changes { tag, range, cut } => match self.changed_since(epoch, cut) {
                Ok(map) => {
                    let asked = self.volume.identity().geometry.touched(*range);
                    let changed = ChangedBlocks::of(&map, asked);
                    Message::ChangesReply { tag: *tag, offset: range.offset, changed }
                }
                Err(error) => failed(*tag, &error),
            },
            _ => unreachable!("only reads are served"),
        };
        let _ended = endpoint.send(reply);
    }

    /// The blocks changed since a cut, as the session found them when it first asked. What has
    /// changed since then this very primary has written, and knows.
    fn changed_since(&self, epoch: u64, cut: &CutName) -> Result<Arc<Bitmap>> {
        if let Some((held, name, map)) = &self.lock().changed
            && (*held, name) == (epoch, cut)
        {
            return Ok(Arc::clone(map));
        }
        let map = Arc::new(self.volume.changed_since(cut)?);
        let mut state = self.lock();
        if state.fence.admits(epoch) {
            state.changed = Some((epoch, *cut, Arc::clone(&map)));
        }
        Ok(map)
    }

    fn fetch(&self, epoch: u64, range: ByteRange, after_sequence: u64) -> Result<Content<Payload>> {
        let mut buffer = AlignedBuffer::zeroed(range.length as usize);
        self.volume.read(epoch, range.offset, &mut buffer, after_sequence, NO_WAIT)?;
        let mut state = self.lock();
        state.counters.reads += 1;
        state.counters.bytes_sent += range.length;
        drop(state);
        Ok(if buffer.iter().all(|byte| *byte == 0) {
            Content::Zero(range.length)
        } else {
            Content::Bytes(Payload::new(buffer))
        })
    }

    pub(super) fn ended(&self, endpoint: &Arc<Endpoint>) {
        let mut state = self.lock();
        let Some((_, class, epoch)) = state.endpoints.remove(&endpoint.id()) else { return };
        drop(state);
        // A session is whole or over; the primary makes all of it again.
        let words = format!("its {class:?} connection ended").to_lowercase();
        if epoch != 0 {
            self.end_session(epoch, GoodbyeReason::Finished, &words);
        }
    }

    /// A cut without the primary, for when it does not run.
    pub fn snapshot_now(
        &self,
        snapshot: Uuid,
        label: String,
        selection: Vec<ByteRange>,
    ) -> Result<()> {
        if self.is_connected() {
            return Err(Error::busy(
                "the primary is connected: take the snapshot through it, so that the cut is an \
                 instant of its write stream",
            ));
        }
        let created_ms = (self.wall_clock)();
        self.volume.snapshot_now(&CutOrder { snapshot, label, created_ms, selection })
    }
}

fn failed(tag: u64, error: &Error) -> Message {
    Message::FetchFailed { tag, failure: Failure::from_error(error) }
}

/// Connections that were accepted and have not said which volume they mean.
pub struct Reception {
    sides: Mutex<HashMap<String, Arc<BackupSide>>>,
    by_endpoint: Mutex<HashMap<u64, Arc<BackupSide>>>,
}

impl Reception {
    #[must_use]
    pub fn new() -> Self {
        Self { sides: Mutex::default(), by_endpoint: Mutex::default() }
    }

    pub fn serve(&self, side: Arc<BackupSide>) -> Result<()> {
        let mut sides = self.sides.lock().unwrap_or_else(PoisonError::into_inner);
        if sides.contains_key(side.name()) {
            return Err(Error::new(
                ErrorKind::Usage,
                format!("a backup named `{}` is served already", side.name()),
            ));
        }
        sides.insert(side.name().to_owned(), side);
        Ok(())
    }

    pub fn withdraw(&self, name: &str) -> Option<Arc<BackupSide>> {
        self.sides.lock().unwrap_or_else(PoisonError::into_inner).remove(name)
    }

    fn side_of(&self, endpoint: &Endpoint) -> Option<Arc<BackupSide>> {
        let held = self.by_endpoint.lock().unwrap_or_else(PoisonError::into_inner);
        held.get(&endpoint.id()).cloned()
    }

    fn greeted(&self, endpoint: &Arc<Endpoint>, hello: Hello) {
        let side = {
            let sides = self.sides.lock().unwrap_or_else(PoisonError::into_inner);
            sides.get(&hello.name).cloned()
        };
        let Some(side) = side else {
            let words = format!(
                "expected a volume in the role backup called `{}` here, found none: mend \
                 HOST:PORT/NAME in `backups` of the primary, or the role of the volume here",
                hello.name
            );
            endpoint.refuse(Refusal::new(RefusalCode::UnknownVolume, &words));
            return;
        };
        let mut held = self.by_endpoint.lock().unwrap_or_else(PoisonError::into_inner);
        held.insert(endpoint.id(), Arc::clone(&side));
        drop(held);
        side.greet(Arc::clone(endpoint), hello);
    }
}

impl Default for Reception {
    fn default() -> Self {
        Self::new()
    }
}

impl Side for Reception {
    fn event(&self, endpoint: &Arc<Endpoint>, event: Event) {
        match event {
            Event::HelloReceived(hello) => self.greeted(endpoint, hello),
            Event::Received(message) => {
                let side = self.side_of(endpoint).expect("messages follow an accepted hello");
                side.received(endpoint, message);
            }
            Event::Welcomed(_) => unreachable!("a backup answers"),
            // Told by `closed`.
            Event::Refused(_) | Event::Departed(_) | Event::Dead | Event::Failed(_) => {}
        }
    }

    fn closed(&self, endpoint: &Arc<Endpoint>) {
        let side =
            self.by_endpoint.lock().unwrap_or_else(PoisonError::into_inner).remove(&endpoint.id());
        if let Some(side) = side {
            side.ended(endpoint);
        }
    }
}
