//! What a connection demands of its peer: which frames when, and which Welcome.
//!
//! Does not know: bytes, queues, time.

use crate::error::{Error, Result};
use crate::format::frames::{
    Class, FrameKind, Header, Hello, Refusal, RefusalCode, Sender, Traffic, Welcome,
};

/// Where a connection is; its table stands at the head of `connection.rs`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    AwaitHello,
    Deciding,
    AwaitWelcome,
    Active,
    Introduced,
    Ended,
}

/// Whether the peer may send a frame of this kind now. Called before anything is allocated for it.
pub(super) fn permit(
    header: &Header,
    state: State,
    is_primary: bool,
    class: Option<Class>,
    features: u64,
) -> Result<()> {
    let rule = header.rule;
    let peer = if is_primary { Sender::Backup } else { Sender::Primary };
    let in_time = match rule.traffic {
        Traffic::Handshake => match state {
            State::AwaitHello => rule.kind == FrameKind::Hello,
            State::AwaitWelcome => rule.kind == FrameKind::Welcome,
            _ => false,
        },
        Traffic::Ending => true,
        Traffic::Heartbeat => matches!(state, State::Active | State::Introduced),
        Traffic::Mirror | Traffic::Reading | Traffic::Bulk => {
            state == State::Active
                && class.is_some_and(|class| rule.traffic.travels_on(class))
                && header.features() & !features == 0
        }
    };
    if in_time && (rule.sender == peer || rule.sender == Sender::Either) {
        return Ok(());
    }
    let class = class.map_or_else(|| "new".to_owned(), |class| format!("{class:?}").to_lowercase());
    Err(Error::link(format!(
        "link {:?}: not expected from this side on this {class} connection while it is {state:?}",
        rule.kind
    )))
}

/// Whether the backup's answer fits what we said.
pub(super) fn check_welcome(hello: &Hello, welcome: &Welcome) -> std::result::Result<(), Refusal> {
    let refuse = |code, words: String| Err(Refusal::new(code, &words));
    if welcome.geometry != hello.geometry {
        return refuse(
            RefusalCode::WrongGeometry,
            format!("expected {:?} at the backup, found {:?}", hello.geometry, welcome.geometry),
        );
    }
    if welcome.features & !hello.features_offered != 0 {
        let words = format!("expected features among {:#x}", hello.features_offered);
        return refuse(RefusalCode::Feature, format!("{words}, found {:#x}", welcome.features));
    }
    if hello.volume.is_nil() {
        if welcome.session_epoch == 0 {
            return Ok(());
        }
        let words = "expected no session for a primary without identity, found one";
        return refuse(RefusalCode::Protocol, words.to_owned());
    }
    if welcome.volume != hello.volume {
        return refuse(
            RefusalCode::WrongVolume,
            format!("expected volume {} at the backup, found {}", hello.volume, welcome.volume),
        );
    }
    if welcome.generation != hello.generation {
        return refuse(
            RefusalCode::StaleGeneration,
            format!(
                "expected generation {} at the backup, found {}",
                hello.generation, welcome.generation
            ),
        );
    }
    let wrong_session = match hello.class {
        Class::Mirror => welcome.session_epoch == 0,
        Class::Demand | Class::Bulk => {
            welcome.session_epoch != hello.session_epoch || welcome.boot_id != hello.peer_boot_id
        }
    };
    if wrong_session {
        return refuse(
            RefusalCode::StaleSession,
            format!(
                "expected session {} of the mirror connection, found {}",
                hello.session_epoch, welcome.session_epoch
            ),
        );
    }
    Ok(())
}
