//! Which session a backup volume listens to (I9, R11). One fence per backup volume.
//!
//! What a Hello meets, first row that fits:
//!
//! | the Hello | the backup | decision |
//! |---|---|---|
//! | not of a primary | any | refuse `WrongRole` |
//! | of another geometry | any | refuse `WrongGeometry` |
//! | without UUID | without identity | refuse `NoIdentity` |
//! | without UUID | with identity | introduce: Welcome with session 0; nobody is superseded |
//! | of another UUID | with identity | refuse `WrongVolume` |
//! | of a lower generation | with identity | refuse `StaleGeneration` |
//! | mirror | no session | accept; record identity or generation first if it is new |
//! | mirror, same boot id | a session | accept, superseding it |
//! | mirror, higher generation | a session | accept, superseding it: a declared new life |
//! | mirror, other boot id | a session | refuse `Occupied` until that session has ended |
//! | demand, bulk: all fields as in the open session | a session, open | accept |
//! | demand, bulk: anything else | any | refuse `StaleSession` |
//!
//! A primary that was restarted while its old connection hangs half open is `Occupied` as well: it
//! is let in once that is found dead, within `LINK_SILENCE_MS`. So no second primary can push out
//! the first.
//!
//! | session state | on | then |
//! |---|---|---|
//! | none | accepted | opening |
//! | opening | `opened` (old session discarded, record durable) | open |
//! | opening, open | `ended` of this epoch; `advance` | none |
//! | opening, open | a superseding Hello | opening, of a new epoch |
//!
//! "With identity" means: recorded, or brought by the session there is.
//!
//! Guarantees: at most one session is listened to; from the moment a Hello is accepted the session
//! before it is not. Identity and generation change only with `opened` or `advance`, after they
//! were made durable. Does not know: connections, files, time.

use uuid::Uuid;

use crate::format::frames::{
    BootId, Class, Hello, KNOWN_FEATURES, Refusal, RefusalCode, Role, Welcome,
};
use crate::units::Geometry;

/// Which volume, in which of its lives. A generation is bumped at loss, promotion and role change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    pub volume: Uuid,
    pub generation: u64,
}

/// What to do with a Hello.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    Accept(Acceptance),
    Refuse(Refusal),
}

/// The steps of an acceptance, in order: end the connections of `supersedes` and drain or discard
/// what they brought; make `record` durable; call `Fence::opened` for mirror connections; send
/// `welcome`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Acceptance {
    /// The epoch of the session that is over.
    pub supersedes: Option<u64>,
    pub record: Option<Identity>,
    pub welcome: Welcome,
}

#[derive(Clone, Copy, Debug)]
struct Session {
    epoch: u64,
    identity: Identity,
    primary: BootId,
    is_open: bool,
}

#[derive(Debug)]
pub struct Fence {
    backup: Uuid,
    geometry: Geometry,
    identity: Option<Identity>,
    boot_id: BootId,
    epoch: u64,
    session: Option<Session>,
}

impl Fence {
    /// Of the backup of that UUID; `identity` as recorded, `None` where it was never spoken to;
    /// `boot_id` of this process.
    #[must_use]
    pub fn new(
        backup: Uuid,
        geometry: Geometry,
        identity: Option<Identity>,
        boot_id: BootId,
    ) -> Self {
        assert!(!boot_id.is_nil(), "a process draws its boot id");
        Self { backup, geometry, identity, boot_id, epoch: 0, session: None }
    }

    #[must_use]
    pub fn identity(&self) -> Option<Identity> {
        self.identity
    }

    /// Whether what arrives on a connection of this session may be applied.
    #[must_use]
    pub fn admits(&self, epoch: u64) -> bool {
        self.session.is_some_and(|session| session.epoch == epoch && session.is_open)
    }

    /// Decides on a Hello.
    pub fn hello(&mut self, hello: &Hello) -> Decision {
        let decided = self.check(hello).and_then(|()| match hello.class {
            _ if hello.volume.is_nil() => self.introduce(hello),
            Class::Mirror => self.accept_mirror(hello),
            Class::Demand | Class::Bulk => self.accept_reader(hello),
        });
        match decided {
            Ok(acceptance) => Decision::Accept(acceptance),
            Err(refusal) => Decision::Refuse(refusal),
        }
    }

    /// The record is durable and the session before it discarded: from here on this one is
    /// listened to. `false` if it was superseded or has ended meanwhile: discard it.
    #[must_use]
    pub fn opened(&mut self, epoch: u64) -> bool {
        match self.session.as_mut().filter(|session| session.epoch == epoch) {
            Some(session) => {
                session.is_open = true;
                self.identity = Some(session.identity);
                true
            }
            None => false,
        }
    }

    /// The mirror connection of the session is gone, or could not be opened.
    pub fn ended(&mut self, epoch: u64) {
        self.session.take_if(|session| session.epoch == epoch);
    }

    /// This side begins a new life of the volume (promotion); `identity` is durable already.
    /// Returns the session that is over.
    pub fn advance(&mut self, identity: Identity) -> Option<u64> {
        let recorded = self.identity.map_or(0, |recorded| recorded.generation);
        assert!(identity.generation > recorded, "generations only grow");
        self.identity = Some(identity);
        self.session.take().map(|session| session.epoch)
    }

    fn check(&self, hello: &Hello) -> Result<(), Refusal> {
        if hello.role != Role::Primary {
            return refuse(
                RefusalCode::WrongRole,
                format!("volume `{}`: expected a primary to call, found a backup", hello.name),
            );
        }
        if hello.geometry != self.geometry {
            return refuse(
                RefusalCode::WrongGeometry,
                format!(
                    "volume `{}`: expected {:?} at the primary, found {:?}: give both sides the \
                     same size and block size",
                    hello.name, self.geometry, hello.geometry
                ),
            );
        }
        // What an opening session brought may be on the disk already: no going back behind it.
        let held = self.session.map(|session| session.identity).or(self.identity);
        let Some(held) = held.filter(|_| !hello.volume.is_nil()) else {
            return Ok(());
        };
        if hello.volume != held.volume {
            return refuse(
                RefusalCode::WrongVolume,
                format!(
                    "volume `{}`: expected UUID {}, found {}: this backup holds another volume",
                    hello.name, held.volume, hello.volume
                ),
            );
        }
        if hello.generation < held.generation {
            return refuse(
                RefusalCode::StaleGeneration,
                format!(
                    "volume `{}`: expected generation {} or later, found {}: the volume has gone \
                     on without this primary; declare its loss with `restore --lost all`",
                    hello.name, held.generation, hello.generation
                ),
            );
        }
        Ok(())
    }

    fn introduce(&self, hello: &Hello) -> Result<Acceptance, Refusal> {
        let Some(identity) = self.identity else {
            return refuse(
                RefusalCode::NoIdentity,
                "neither side knows which volume this is: run `restore NAME --lost none` on the \
                 primary first"
                    .to_owned(),
            );
        };
        Ok(Acceptance { supersedes: None, record: None, welcome: self.welcome(hello, identity, 0) })
    }

    fn accept_mirror(&mut self, hello: &Hello) -> Result<Acceptance, Refusal> {
        let identity = Identity { volume: hello.volume, generation: hello.generation };
        if let Some(session) = self.session {
            let newer_life = identity.generation > session.identity.generation;
            if session.primary != hello.boot_id && !newer_life {
                return refuse(
                    RefusalCode::Occupied,
                    format!(
                        "volume `{}`: expected one primary, found a second while the first is \
                         connected: stop one of them; if the primary was restarted, it is let in \
                         once the old connection is found dead",
                        hello.name
                    ),
                );
            }
        }
        let supersedes = self.session.map(|session| session.epoch);
        self.epoch += 1;
        let epoch = self.epoch;
        self.session = Some(Session { epoch, identity, primary: hello.boot_id, is_open: false });
        Ok(Acceptance {
            supersedes,
            record: (self.identity != Some(identity)).then_some(identity),
            welcome: self.welcome(hello, identity, epoch),
        })
    }

    fn accept_reader(&self, hello: &Hello) -> Result<Acceptance, Refusal> {
        let fits = |session: &Session| {
            session.is_open
                && session.epoch == hello.session_epoch
                && session.primary == hello.boot_id
                && session.identity.volume == hello.volume
                && session.identity.generation == hello.generation
                && self.boot_id == hello.peer_boot_id
        };
        let Some(session) = self.session.filter(fits) else {
            return refuse(
                RefusalCode::StaleSession,
                format!(
                    "volume `{}`: expected a {:?} connection of the open session, found one of \
                     session {}: open the mirror connection first",
                    hello.name, hello.class, hello.session_epoch
                ),
            );
        };
        let welcome = self.welcome(hello, session.identity, session.epoch);
        Ok(Acceptance { supersedes: None, record: None, welcome })
    }

    fn welcome(&self, hello: &Hello, identity: Identity, session_epoch: u64) -> Welcome {
        Welcome {
            volume: identity.volume,
            geometry: self.geometry,
            generation: identity.generation,
            session_epoch,
            applied_sequence: 0,
            boot_id: self.boot_id,
            backup: self.backup,
            features: KNOWN_FEATURES & hello.features_offered,
        }
    }
}

fn refuse<T>(code: RefusalCode, words: String) -> Result<T, Refusal> {
    Err(Refusal::new(code, &words))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::{BlockSize, MIB};

    const OURS: BootId = BootId([0xbb; 16]);

    fn geometry(mebibytes: u64) -> Geometry {
        Geometry::new(mebibytes * MIB, BlockSize::DEFAULT).expect("valid")
    }

    fn identity(volume: u128, generation: u64) -> Identity {
        Identity { volume: Uuid::from_u128(volume), generation }
    }

    fn fence(identity: Option<Identity>) -> Fence {
        Fence::new(Uuid::from_u128(9), geometry(1), identity, OURS)
    }

    fn mirror(volume: u128, generation: u64, boot: u8) -> Hello {
        Hello {
            class: Class::Mirror,
            role: Role::Primary,
            name: "db".to_owned(),
            volume: Uuid::from_u128(volume),
            geometry: geometry(1),
            generation,
            session_epoch: 0,
            boot_id: BootId([boot; 16]),
            peer_boot_id: BootId::default(),
            features_offered: 0,
            features_required: 0,
        }
    }

    fn reader(epoch: u64) -> Hello {
        let peer_boot_id = OURS;
        Hello { class: Class::Bulk, session_epoch: epoch, peer_boot_id, ..mirror(7, 3, 1) }
    }

    fn accepted(fence: &mut Fence, hello: &Hello) -> Acceptance {
        match fence.hello(hello) {
            Decision::Accept(acceptance) => acceptance,
            Decision::Refuse(refusal) => panic!("refused: {refusal:?}"),
        }
    }

    fn refused(fence: &mut Fence, hello: &Hello) -> RefusalCode {
        match fence.hello(hello) {
            Decision::Accept(acceptance) => panic!("accepted: {acceptance:?}"),
            Decision::Refuse(refusal) => {
                assert!(!refusal.text.is_empty());
                refusal.code
            }
        }
    }

    /// A fence of volume 7, generation 3, with an open session of primary process 1.
    fn open_fence() -> (Fence, u64) {
        let mut fence = fence(Some(identity(7, 3)));
        let epoch = accepted(&mut fence, &mirror(7, 3, 1)).welcome.session_epoch;
        assert!(fence.opened(epoch));
        (fence, epoch)
    }

    #[test]
    fn a_hello_of_a_backup_is_refused() {
        let hello = Hello { role: Role::Backup, ..mirror(7, 3, 1) };
        assert_eq!(refused(&mut fence(Some(identity(7, 3))), &hello), RefusalCode::WrongRole);
    }

    #[test]
    fn a_hello_of_another_geometry_is_refused() {
        let hello = Hello { geometry: geometry(2), ..mirror(7, 3, 1) };
        assert_eq!(refused(&mut fence(None), &hello), RefusalCode::WrongGeometry);
    }

    #[test]
    fn two_sides_without_identity_are_sent_to_the_operator() {
        assert_eq!(refused(&mut fence(None), &mirror(0, 0, 1)), RefusalCode::NoIdentity);
    }

    #[test]
    fn a_primary_without_identity_is_told_and_disturbs_nobody() {
        let (mut fence, epoch) = open_fence();
        let acceptance = accepted(&mut fence, &mirror(0, 0, 9));
        assert_eq!((acceptance.supersedes, acceptance.record), (None, None));
        let Welcome { volume, generation, session_epoch, .. } = acceptance.welcome;
        assert_eq!((volume.as_u128(), generation, session_epoch), (7, 3, 0));
        assert!(fence.admits(epoch) && !fence.admits(0));
    }

    #[test]
    fn another_volume_is_refused() {
        assert_eq!(
            refused(&mut fence(Some(identity(7, 3))), &mirror(8, 3, 1)),
            RefusalCode::WrongVolume
        );
    }

    #[test]
    fn a_primary_of_an_older_generation_is_refused() {
        let (mut fence, epoch) = open_fence();
        assert_eq!(refused(&mut fence, &mirror(7, 2, 1)), RefusalCode::StaleGeneration);
        assert!(fence.admits(epoch));
    }

    #[test]
    fn a_known_primary_is_accepted_with_nothing_to_record() {
        let mut fence = fence(Some(identity(7, 3)));
        let acceptance = accepted(&mut fence, &mirror(7, 3, 1));
        assert_eq!((acceptance.supersedes, acceptance.record), (None, None));
        assert_eq!(acceptance.welcome.boot_id, OURS);
        assert_eq!(acceptance.welcome.applied_sequence, 0);
    }

    #[test]
    fn a_backup_without_identity_records_that_of_the_primary_first() {
        let mut fence = fence(None);
        let acceptance = accepted(&mut fence, &mirror(7, 3, 1));
        assert_eq!(acceptance.record, Some(identity(7, 3)));
        assert_eq!(fence.identity(), None);
        assert!(fence.opened(acceptance.welcome.session_epoch));
        assert_eq!(fence.identity(), Some(identity(7, 3)));
    }

    #[test]
    fn a_higher_generation_is_recorded_before_its_session_opens() {
        let (mut fence, old) = open_fence();
        let acceptance = accepted(&mut fence, &mirror(7, 4, 2));
        assert_eq!(acceptance.record, Some(identity(7, 4)));
        assert_eq!(acceptance.supersedes, Some(old));
        let epoch = acceptance.welcome.session_epoch;
        assert!(!fence.admits(old) && !fence.admits(epoch));
        assert!(fence.opened(epoch) && fence.admits(epoch));
    }

    #[test]
    fn a_newer_connection_of_the_same_process_supersedes_the_older_at_once() {
        let (mut fence, old) = open_fence();
        let acceptance = accepted(&mut fence, &mirror(7, 3, 1));
        assert_eq!((acceptance.supersedes, acceptance.record), (Some(old), None));
        assert!(acceptance.welcome.session_epoch > old);
        assert!(!fence.admits(old));
        assert_eq!(refused(&mut fence, &reader(old)), RefusalCode::StaleSession);
        // The late end of the old connection does not end the new session.
        fence.ended(old);
        assert!(fence.opened(acceptance.welcome.session_epoch));
    }

    #[test]
    fn a_second_primary_is_refused_until_the_first_is_gone() {
        let (mut fence, epoch) = open_fence();
        assert_eq!(refused(&mut fence, &mirror(7, 3, 2)), RefusalCode::Occupied);
        assert!(fence.admits(epoch));
        fence.ended(epoch);
        assert!(!fence.admits(epoch));
        assert_eq!(accepted(&mut fence, &mirror(7, 3, 2)).supersedes, None);
    }

    #[test]
    fn readers_are_let_in_to_the_open_session_only() {
        let mut fence = fence(Some(identity(7, 3)));
        assert_eq!(refused(&mut fence, &reader(1)), RefusalCode::StaleSession);
        let epoch = accepted(&mut fence, &mirror(7, 3, 1)).welcome.session_epoch;
        assert_eq!(refused(&mut fence, &reader(epoch)), RefusalCode::StaleSession);
        assert!(fence.opened(epoch));
        let acceptance = accepted(&mut fence, &reader(epoch));
        assert_eq!((acceptance.supersedes, acceptance.record), (None, None));
        assert_eq!(acceptance.welcome.session_epoch, epoch);
        fence.ended(epoch);
        assert_eq!(refused(&mut fence, &reader(epoch)), RefusalCode::StaleSession);
    }

    #[test]
    fn readers_of_another_epoch_process_or_life_are_refused() {
        let (mut fence, epoch) = open_fence();
        let right = reader(epoch);
        for stale in [
            reader(epoch + 1),
            Hello { boot_id: BootId([2; 16]), ..right.clone() },
            Hello { peer_boot_id: BootId([2; 16]), ..right.clone() },
            Hello { generation: 4, ..right.clone() },
        ] {
            assert_eq!(refused(&mut fence, &stale), RefusalCode::StaleSession, "{stale:?}");
        }
        accepted(&mut fence, &right);
    }

    #[test]
    fn what_an_opening_session_brought_is_not_gone_back_behind() {
        let mut fence = fence(None);
        accepted(&mut fence, &mirror(7, 3, 1));
        assert_eq!(refused(&mut fence, &mirror(8, 3, 1)), RefusalCode::WrongVolume);
        assert_eq!(refused(&mut fence, &mirror(7, 2, 1)), RefusalCode::StaleGeneration);
    }

    #[test]
    fn a_session_that_was_superseded_while_opening_does_not_open() {
        let mut fence = fence(None);
        let first = accepted(&mut fence, &mirror(7, 3, 1)).welcome.session_epoch;
        let second = accepted(&mut fence, &mirror(7, 3, 1));
        assert_eq!(second.supersedes, Some(first));
        assert_eq!(second.record, Some(identity(7, 3)));
        assert!(!fence.opened(first));
        assert_eq!(fence.identity(), None);
        assert!(fence.opened(second.welcome.session_epoch));
    }

    #[test]
    fn a_promoted_backup_hears_no_primary_of_the_life_before() {
        let (mut fence, epoch) = open_fence();
        assert_eq!(fence.advance(identity(7, 4)), Some(epoch));
        assert!(!fence.admits(epoch));
        assert_eq!(refused(&mut fence, &mirror(7, 3, 1)), RefusalCode::StaleGeneration);
    }

    #[test]
    fn only_features_that_were_offered_are_welcomed() {
        let mut fence = fence(None);
        let hello = Hello { features_offered: u64::MAX, ..mirror(7, 3, 1) };
        let features = accepted(&mut fence, &hello).welcome.features;
        assert_eq!(features, KNOWN_FEATURES);
    }
}
