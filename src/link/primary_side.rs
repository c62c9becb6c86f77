//! The link as a primary volume uses it: three connections that make one session.
//!
//! | what happens | then |
//! |---|---|
//! | mirror welcomed with a session of an unknown backup | the volume meets it, or gives it up |
//! | mirror welcomed with a session | the waiting demand and bulk connections say hello |
//! | mirror welcomed without one | the volume learns its identity; the connection is ended |
//! | all three active | the volume's link is up |
//! | any of them ends | the link is down, the other two are ended: a session is whole or over |
//!
//! Guarantees: the volume sees messages of the session that is up, in the order of each stream.
//! Does not know: sockets, when to connect again.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use super::endpoint::{Endpoint, Side};
use super::{Event, Message};
use crate::extent::ByteRange;
use crate::format::frames::{
    BootId, Class, Content as FrameContent, CutName, FEATURE_CHANGES, GoodbyeReason, Hello,
    KNOWN_FEATURES, Role, Welcome,
};
use crate::volume::content::Content;
use crate::volume::primary::{
    Driver, Event as VolumeEvent, FetchClass, Introduction, Outbox, OutgoingMessage, PrimaryVolume,
};

/// Tags of digests are told from tags of fetches by this bit.
const DIGEST_TAG: u64 = 1 << 63;
/// Those that the machine asks for, by this one.
const COMPARISON_TAG: u64 = 1 << 61;
/// And tags of changes by this one.
const CHANGES_TAG: u64 = 1 << 62;

/// See the module.
pub struct PrimarySide {
    volume: Arc<PrimaryVolume>,
    /// The volume's name at the backup.
    remote_name: String,
    boot_id: BootId,
    state: Mutex<State>,
    this: Weak<PrimarySide>,
}

#[derive(Default)]
struct State {
    endpoints: HashMap<Class, Arc<Endpoint>>,
    session: Option<Welcome>,
    active: Vec<Class>,
    up: Option<(Arc<Driver>, Arc<dyn Outbox>)>,
    /// In use on the bulk connection.
    bulk_features: u64,
    /// Sequences of cuts that are not answered.
    cuts: HashSet<u64>,
}

impl PrimarySide {
    #[must_use]
    pub fn new(volume: Arc<PrimaryVolume>, remote_name: String, boot_id: BootId) -> Arc<Self> {
        Arc::new_cyclic(|this| Self {
            volume,
            remote_name,
            boot_id,
            state: Mutex::default(),
            this: Weak::clone(this),
        })
    }

    #[must_use]
    pub fn volume(&self) -> &Arc<PrimaryVolume> {
        &self.volume
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The hello of a connection of this class; `None` while it must wait for the session.
    #[must_use]
    pub fn hello(&self, class: Class) -> Option<Hello> {
        let session = self.lock().session.clone();
        self.hello_in(class, session.as_ref())
    }

    fn hello_in(&self, class: Class, session: Option<&Welcome>) -> Option<Hello> {
        let (volume, generation) = self.volume.hello_identity();
        let (session_epoch, peer_boot_id) = match (class, session) {
            (Class::Mirror, _) => (0, BootId::default()),
            (_, Some(welcome)) => (welcome.session_epoch, welcome.boot_id),
            (_, None) => return None,
        };
        Some(Hello {
            class,
            role: Role::Primary,
            name: self.remote_name.clone(),
            volume,
            geometry: self.volume.geometry(),
            generation,
            session_epoch,
            boot_id: self.boot_id,
            peer_boot_id,
            features_offered: KNOWN_FEATURES,
            features_required: 0,
        })
    }

    /// A connection of this class exists now; one that was there before is ended.
    pub fn add(&self, class: Class, endpoint: &Arc<Endpoint>) {
        let old = self.lock().endpoints.get(&class).cloned();
        if let Some(old) = old {
            self.end_session(&old, "a connection of the link was made again");
        }
        self.lock().endpoints.insert(class, Arc::clone(endpoint));
        // A session may have begun between the hello that was not possible and now.
        if let (true, Some(hello)) = (class != Class::Mirror, self.hello(class)) {
            let _ended = endpoint.begin(hello);
        }
    }

    /// What each class is doing, for status.
    #[must_use]
    pub fn states(&self) -> HashMap<Class, &'static str> {
        let endpoints = self.lock().endpoints.clone();
        endpoints.into_iter().map(|(class, endpoint)| (class, endpoint.state())).collect()
    }

    /// The number that the backup gave to the session, once it gave one.
    #[must_use]
    pub fn session_epoch(&self) -> Option<u64> {
        self.lock().session.as_ref().map(|session| session.session_epoch)
    }

    /// The latest problem of any connection.
    #[must_use]
    pub fn problem(&self) -> Option<String> {
        let endpoints = self.lock().endpoints.clone();
        endpoints.values().find_map(|endpoint| endpoint.problem())
    }

    fn class_of(&self, endpoint: &Arc<Endpoint>) -> Option<Class> {
        self.lock()
            .endpoints
            .iter()
            .find(|(_, held)| Arc::ptr_eq(held, endpoint))
            .map(|(class, _)| *class)
    }

    fn welcomed(&self, endpoint: &Arc<Endpoint>, class: Class, welcome: Welcome) {
        if welcome.session_epoch == 0 {
            self.volume.introduce(Introduction {
                volume: welcome.volume,
                generation: welcome.generation,
                backup: welcome.backup,
            });
            endpoint.depart(
                GoodbyeReason::Finished,
                "the volume waits for the operator's word: restore --lost all or none",
            );
            return;
        }
        if class == Class::Mirror && !self.volume.knows(welcome.backup) {
            // It may take a commit of the map.
            let side = self.this.upgrade().expect("a side lives in an Arc");
            let endpoint = Arc::clone(endpoint);
            self.volume.elsewhere(move || side.meet(&endpoint, welcome));
            return;
        }
        self.begin(class, welcome);
    }

    fn meet(&self, endpoint: &Arc<Endpoint>, welcome: Welcome) {
        if let Err(error) = self.volume.meet(welcome.backup) {
            endpoint.give_up(&error.to_string());
            self.end_session(endpoint, "another backup was expected");
        } else if self.class_of(endpoint) == Some(Class::Mirror) {
            self.begin(Class::Mirror, welcome);
        }
    }

    fn begin(&self, class: Class, welcome: Welcome) {
        let mut state = self.lock();
        state.active.push(class);
        if class == Class::Bulk {
            state.bulk_features = welcome.features;
        }
        if class == Class::Mirror {
            state.session = Some(welcome.clone());
            let waiting: Vec<_> = state
                .endpoints
                .iter()
                .filter(|(class, _)| **class != Class::Mirror)
                .map(|(class, endpoint)| (*class, Arc::clone(endpoint)))
                .collect();
            drop(state);
            for (class, endpoint) in waiting {
                if let Some(hello) = self.hello_in(class, Some(&welcome)) {
                    let _ended = endpoint.begin(hello);
                }
            }
            return;
        }
        if state.active.len() == 3 && state.up.is_none() {
            self.open(state);
        }
    }

    fn open(&self, mut state: MutexGuard<'_, State>) {
        let Some(driver) = self.volume.live() else { return };
        let outbox: Arc<dyn Outbox> = Arc::new(Lines {
            mirror: Arc::clone(&state.endpoints[&Class::Mirror]),
            demand: Arc::clone(&state.endpoints[&Class::Demand]),
            bulk: Arc::clone(&state.endpoints[&Class::Bulk]),
            bulk_features: state.bulk_features,
            side: Weak::clone(&self.this),
        });
        state.up = Some((Arc::clone(&driver), Arc::clone(&outbox)));
        drop(state);
        driver.link_up(outbox);
    }

    fn up(&self) -> Option<(Arc<Driver>, Arc<dyn Outbox>)> {
        self.lock().up.clone()
    }

    fn received(&self, endpoint: &Arc<Endpoint>, message: Message) {
        let Some((driver, outbox)) = self.up() else { return };
        let event = match message {
            Message::Applied { sequence } => VolumeEvent::Applied { sequence },
            Message::Flushed { sequence } => VolumeEvent::Flushed { sequence },
            Message::CutDone { sequence, generation, cut_sequence, .. } => {
                self.lock().cuts.remove(&sequence);
                VolumeEvent::CutAnswered { sequence, result: Ok((generation, cut_sequence)) }
            }
            Message::Failed { sequence, failure } => {
                let error = failure.to_error();
                if !self.lock().cuts.remove(&sequence) {
                    // Nothing more is applied there: what was sent stays unsent.
                    endpoint.give_up(&error.to_string());
                    self.end_session(endpoint, &error.to_string());
                    return;
                }
                VolumeEvent::CutAnswered { sequence, result: Err(error) }
            }
            Message::Data { tag, content, .. } => {
                let content = match content {
                    FrameContent::Bytes(bytes) => Content::Bytes(bytes),
                    FrameContent::Zero(length) => Content::Zeros(length),
                };
                VolumeEvent::Fetched { tag, result: Ok(content) }
            }
            Message::FetchFailed { tag, failure } if tag & DIGEST_TAG != 0 => {
                driver.digest_arrived(tag & !DIGEST_TAG, Err(failure.to_error()));
                return;
            }
            Message::FetchFailed { tag, failure } if tag & COMPARISON_TAG != 0 => {
                let result = Err(failure.to_error());
                VolumeEvent::DigestTold { tag: tag & !COMPARISON_TAG, result }
            }
            Message::DigestReply { tag, digest } if tag & COMPARISON_TAG != 0 => {
                VolumeEvent::DigestTold { tag: tag & !COMPARISON_TAG, result: Ok(digest) }
            }
            Message::FetchFailed { tag, failure } if tag & CHANGES_TAG != 0 => {
                driver.changes_arrived(tag & !CHANGES_TAG, Err(failure.to_error()));
                return;
            }
            Message::ChangesReply { tag, changed, .. } => {
                driver.changes_arrived(tag & !CHANGES_TAG, Ok(changed));
                return;
            }
            Message::FetchFailed { tag, failure } => {
                VolumeEvent::Fetched { tag, result: Err(failure.to_error()) }
            }
            Message::DigestReply { tag, digest } => {
                driver.digest_arrived(tag & !DIGEST_TAG, Ok(digest));
                return;
            }
            Message::Write { .. }
            | Message::Zero { .. }
            | Message::Flush { .. }
            | Message::Cut { .. }
            | Message::Fetch { .. }
            | Message::Digest { .. }
            | Message::Changes { .. } => unreachable!("the connection refuses these from a backup"),
        };
        driver.link_event(&outbox, event);
    }

    /// The session is over, whichever connection it was that ended.
    fn end_session(&self, ended: &Arc<Endpoint>, words: &str) {
        let (up, others) = {
            let mut state = self.lock();
            let mirror_ended =
                state.endpoints.get(&Class::Mirror).is_none_or(|mirror| Arc::ptr_eq(mirror, ended));
            let was_active = !state.active.is_empty();
            let others: Vec<_> = if was_active || mirror_ended {
                let active = std::mem::take(&mut state.active);
                state.session = None;
                state.cuts.clear();
                active.iter().filter_map(|class| state.endpoints.remove(class)).collect()
            } else {
                Vec::new()
            };
            state.endpoints.retain(|_, held| !Arc::ptr_eq(held, ended));
            (state.up.take(), others)
        };
        if let Some((driver, outbox)) = up {
            driver.link_down(&outbox);
        }
        for endpoint in others.iter().chain([ended]) {
            endpoint.depart(GoodbyeReason::Finished, words);
        }
    }

    /// Ends whatever there is; for a new generation, or the end of the volume.
    pub fn end(&self, words: &str) {
        let endpoints: Vec<_> = self.lock().endpoints.values().cloned().collect();
        for endpoint in endpoints {
            self.end_session(&endpoint, words);
        }
    }
}

impl Side for PrimarySide {
    fn event(&self, endpoint: &Arc<Endpoint>, event: Event) {
        let Some(class) = self.class_of(endpoint) else { return };
        match event {
            Event::Welcomed(welcome) => self.welcomed(endpoint, class, welcome),
            Event::Received(message) => self.received(endpoint, message),
            Event::HelloReceived(_) => unreachable!("a primary speaks first"),
            // Told by `closed`.
            Event::Refused(_) | Event::Departed(_) | Event::Dead | Event::Failed(_) => {}
        }
    }

    fn closed(&self, endpoint: &Arc<Endpoint>) {
        self.end_session(endpoint, "a connection of the link ended");
    }
}

/// The three connections of a session as the volume's way out.
struct Lines {
    mirror: Arc<Endpoint>,
    demand: Arc<Endpoint>,
    bulk: Arc<Endpoint>,
    bulk_features: u64,
    side: Weak<PrimarySide>,
}

impl Lines {
    /// `None` for what the link is not told.
    fn convert(message: OutgoingMessage) -> Option<(Class, Message)> {
        Some(match message {
            OutgoingMessage::Barrier => return None,
            OutgoingMessage::Write { sequence, offset, content: Content::Bytes(data) } => {
                (Class::Mirror, Message::Write { sequence, offset, data })
            }
            OutgoingMessage::Write { sequence, offset, content: Content::Zeros(length) } => {
                let range = ByteRange::new(offset, length);
                (Class::Mirror, Message::Zero { sequence, range })
            }
            OutgoingMessage::Flush { sequence } => (Class::Mirror, Message::Flush { sequence }),
            OutgoingMessage::Cut { sequence, snapshot, label, selection } => {
                (Class::Mirror, Message::Cut { sequence, snapshot, selection, label })
            }
            OutgoingMessage::Fetch { tag, class, range, after_sequence } => {
                let class = match class {
                    FetchClass::Demand => Class::Demand,
                    FetchClass::Bulk => Class::Bulk,
                };
                (class, Message::Fetch { tag, range, after_sequence })
            }
            OutgoingMessage::Digest { tag, range, after_sequence } => {
                let tag = tag | COMPARISON_TAG;
                (Class::Bulk, Message::Digest { tag, range, after_sequence })
            }
        })
    }

    fn line(&self, class: Class) -> &Endpoint {
        match class {
            Class::Mirror => &self.mirror,
            Class::Demand => &self.demand,
            Class::Bulk => &self.bulk,
        }
    }
}

impl Outbox for Lines {
    fn send(&self, message: OutgoingMessage) -> Vec<u64> {
        let Some((class, message)) = Self::convert(message) else {
            self.mirror.barrier();
            return Vec::new();
        };
        if let (Message::Cut { sequence, .. }, Some(side)) = (&message, self.side.upgrade()) {
            side.lock().cuts.insert(*sequence);
        }
        // A connection that has ended takes nothing; the volume is about to hear of it.
        self.line(class).send(message).unwrap_or_default()
    }

    fn ask_digest(&self, tag: u64, range: ByteRange) {
        let tag = tag | DIGEST_TAG;
        let _ended = self.bulk.send(Message::Digest { tag, range, after_sequence: 0 });
    }

    fn ask_changes(&self, tag: u64, range: ByteRange, cut: CutName) -> bool {
        if self.bulk_features & FEATURE_CHANGES == 0 {
            return false;
        }
        let tag = tag | CHANGES_TAG;
        let _ended = self.bulk.send(Message::Changes { tag, range, cut });
        true
    }

    fn close(&self, reason: &str) {
        for endpoint in [&self.mirror, &self.demand, &self.bulk] {
            endpoint.depart(GoodbyeReason::Finished, reason);
        }
        if let Some(side) = self.side.upgrade() {
            let mut state = side.lock();
            state.up = None;
            state.active.clear();
            state.session = None;
            state.endpoints.clear();
        }
    }
}
