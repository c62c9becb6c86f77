//! The options of a client before transmission, one at a time.
//!
//! | option | TLS required, not begun | otherwise |
//! |---|---|---|
//! | `ABORT` | acknowledged, end | the same |
//! | `STARTTLS` | acknowledged, handed over to TLS | refused: policy without, invalid inside TLS |
//! | `EXPORT_NAME` | end | transmission, or end when there is no such export |
//! | `STRUCTURED_REPLY` after `EXTENDED_HEADERS` | refused: TLS required | refused: those stay |
//! | `EXPORT_NAME` after `EXTENDED_HEADERS` | end | end |
//! | the others of the specification | refused: TLS required | answered |
//! | any other | refused: TLS required | refused: unsupported |
//!
//! While the server stops, all but `ABORT` are refused as shutting down (`EXPORT_NAME` ends).
//!
//! Guarantees: an option is answered by one final reply; a malformed payload changes nothing but
//! the selection of contexts, which it clears, as the specification wants.
//! Does not know: how options are framed, TLS itself, requests.

use std::sync::Arc;

use super::contexts;
use super::exports::{Export, Seen};
use super::outgoing::Outgoing;
use super::session::Tls;
use super::transmission::offers_fast_zeroes;
use crate::format::nbd as protocol;
use crate::format::nbd::{ExportQuery, MetaQuery, Style};
use crate::limits;
use crate::volume::service::{BlockService, StatusContext};

/// What follows an option.
pub(super) enum Step {
    /// The next option.
    Stay,
    Transmit(Chosen),
    StartTls,
    End,
}

/// What the handshake leads to.
pub(super) struct Chosen {
    pub(super) export: Arc<Export>,
    pub(super) style: Style,
    pub(super) contexts: Vec<StatusContext>,
}

/// What has been agreed so far.
#[derive(Debug, Default)]
pub(super) struct Handshake {
    pub(super) fixed: bool,
    pub(super) no_zeroes: bool,
    style: Style,
    selected: Option<(Arc<Export>, Vec<StatusContext>)>,
}

/// A refusal: the type of the reply and words for a person.
type Refusal = (u32, &'static str);

const MALFORMED: Refusal = (protocol::REP_ERR_INVALID, "the option's lengths do not add up");
const UNKNOWN: Refusal = (protocol::REP_ERR_UNKNOWN, "no export has this name");

impl Handshake {
    /// What of this one still holds inside TLS: how it is spoken, and nothing that was agreed on.
    pub(super) fn inside_tls(&self) -> Self {
        Self { fixed: self.fixed, no_zeroes: self.no_zeroes, ..Self::default() }
    }

    /// Answers one option.
    pub(super) fn option(
        &mut self,
        option: u32,
        payload: &[u8],
        around: &Surroundings<'_>,
        out: &mut Outgoing,
    ) -> Step {
        let outcome = match option {
            protocol::OPT_ABORT => {
                acknowledge(option, out);
                return Step::End;
            }
            protocol::OPT_EXPORT_NAME => return self.export_name(payload, around, out),
            _ if around.stopping => {
                Err((protocol::REP_ERR_SHUTDOWN, "the server is being shut down"))
            }
            protocol::OPT_STARTTLS => start_tls(payload, around.tls),
            _ if around.tls == Tls::Required => {
                Err((protocol::REP_ERR_TLS_REQD, "this address is served over TLS only"))
            }
            protocol::OPT_LIST => list(payload, around.exports, out),
            protocol::OPT_INFO => self.describe(option, payload, around, out).map(|_| Step::Stay),
            protocol::OPT_GO => {
                self.describe(option, payload, around, out).map(|to| self.transmit(to))
            }
            protocol::OPT_STRUCTURED_REPLY => self.agree_on(Style::Structured, payload),
            protocol::OPT_EXTENDED_HEADERS => self.agree_on(Style::Extended, payload),
            protocol::OPT_LIST_META_CONTEXT => self.list_contexts(payload, around, out),
            protocol::OPT_SET_META_CONTEXT => self.select_contexts(payload, around, out),
            _ => Err((protocol::REP_ERR_UNSUP, "this option is not known here")),
        };
        match outcome {
            Ok(step) => {
                acknowledge(option, out);
                step
            }
            Err((kind, words)) => {
                reply(option, kind, &[words.as_bytes()], out);
                Step::Stay
            }
        }
    }

    /// An option whose payload is longer than any sensible one, and is skipped.
    pub(super) fn too_long(option: u32, tls: Tls, out: &mut Outgoing) {
        let (kind, words) = match tls {
            Tls::Required => (protocol::REP_ERR_TLS_REQD, "this address is served over TLS only"),
            Tls::Off | Tls::Done => (protocol::REP_ERR_TOO_BIG, "the option is too long"),
        };
        reply(option, kind, &[words.as_bytes()], out);
    }

    fn agree_on(&mut self, style: Style, payload: &[u8]) -> Result<Step, Refusal> {
        if !payload.is_empty() {
            return Err(MALFORMED);
        }
        if self.style > style {
            let words = "extended headers were agreed on, which include structured replies";
            return Err((protocol::REP_ERR_EXT_HEADER_REQD, words));
        }
        self.style = style;
        Ok(Step::Stay)
    }

    fn export_name(&self, name: &[u8], around: &Surroundings<'_>, out: &mut Outgoing) -> Step {
        let extended = self.style == Style::Extended;
        if around.stopping || around.tls == Tls::Required || extended {
            return Step::End;
        }
        let found = protocol::decode_string(name).and_then(|name| around.exports.find(name));
        let Some(export) = found else { return Step::End };
        let service = export.service().as_ref();
        let flags = self.transmission_flags(&export);
        out.push(&protocol::export_name_reply(service.size(), flags));
        if !self.no_zeroes {
            out.push(&[0; protocol::EXPORT_NAME_ZEROES]);
        }
        self.transmit(export)
    }

    fn transmit(&self, export: Arc<Export>) -> Step {
        let contexts = self.contexts_of(&export).to_vec();
        Step::Transmit(Chosen { export, style: self.style, contexts })
    }

    /// The contexts that were selected, if they were for this export.
    fn contexts_of(&self, export: &Arc<Export>) -> &[StatusContext] {
        match &self.selected {
            Some((of, contexts)) if Arc::ptr_eq(of, export) => contexts,
            _ => &[],
        }
    }

    /// What a client may ask of the export. Flush, FUA and multi-conn hold everywhere: the volume
    /// guarantees that a flush covers what was answered on any connection.
    fn transmission_flags(&self, export: &Arc<Export>) -> u16 {
        let service = export.service().as_ref();
        let filters = self.style == Style::Extended && !self.contexts_of(export).is_empty();
        let of_any = protocol::HAS_FLAGS
            | protocol::SEND_FLUSH
            | protocol::SEND_FUA
            | protocol::CAN_MULTI_CONN
            | given(self.style > Style::Simple, protocol::SEND_DF)
            | given(filters, protocol::BLOCK_STATUS_PAYLOAD);
        if service.read_only() {
            return of_any | protocol::READ_ONLY;
        }
        of_any
            | protocol::SEND_TRIM
            | protocol::SEND_WRITE_ZEROES
            | protocol::SEND_CACHE
            | given(offers_fast_zeroes(service), protocol::SEND_FAST_ZERO)
    }

    /// `INFO` and `GO`: everything about the export but the acknowledgement.
    fn describe(
        &self,
        option: u32,
        payload: &[u8],
        around: &Surroundings<'_>,
        out: &mut Outgoing,
    ) -> Result<Arc<Export>, Refusal> {
        let query = ExportQuery::decode(payload).ok_or(MALFORMED)?;
        let export = around.exports.find(query.name).ok_or(UNKNOWN)?;
        let service = export.service().as_ref();
        let flags = self.transmission_flags(&export);
        let size_and_flags = protocol::export_name_reply(service.size(), flags);
        item(option, protocol::INFO_EXPORT, &size_and_flags, out);
        if query.canonical_name || query.name != export.name() {
            item(option, protocol::INFO_NAME, export.name().as_bytes(), out);
        }
        if query.description && !export.description().is_empty() {
            item(option, protocol::INFO_DESCRIPTION, export.description().as_bytes(), out);
        }
        if query.block_size {
            item(option, protocol::INFO_BLOCK_SIZE, &block_sizes(service), out);
        }
        Ok(export)
    }

    fn list_contexts(
        &self,
        payload: &[u8],
        around: &Surroundings<'_>,
        out: &mut Outgoing,
    ) -> Result<Step, Refusal> {
        let (export, query) = self.meta_query(payload, around)?;
        for context in export.service().contexts() {
            let asked = |query: &&str| contexts::listed_by(context, query);
            if query.queries.is_empty() || query.queries.iter().any(asked) {
                offer(protocol::OPT_LIST_META_CONTEXT, 0, context, out);
            }
        }
        Ok(Step::Stay)
    }

    fn select_contexts(
        &mut self,
        payload: &[u8],
        around: &Surroundings<'_>,
        out: &mut Outgoing,
    ) -> Result<Step, Refusal> {
        self.selected = None;
        let (export, query) = self.meta_query(payload, around)?;
        let mut selected = export.service().contexts();
        selected.retain(|context| {
            query.queries.iter().any(|query| contexts::selected_by(*context, query))
        });
        for &context in &selected {
            let identifier = contexts::identifier(context);
            offer(protocol::OPT_SET_META_CONTEXT, identifier, context, out);
        }
        self.selected = Some((export, selected));
        Ok(Step::Stay)
    }

    fn meta_query<'a>(
        &self,
        payload: &'a [u8],
        around: &Surroundings<'_>,
    ) -> Result<(Arc<Export>, MetaQuery<'a>), Refusal> {
        if self.style == Style::Simple {
            return Err((protocol::REP_ERR_INVALID, "structured replies must be agreed on first"));
        }
        let query = MetaQuery::decode(payload).ok_or(MALFORMED)?;
        let export = around.exports.find(query.export).ok_or(UNKNOWN)?;
        Ok((export, query))
    }
}

/// What an option is answered from, besides what was agreed before it.
pub(super) struct Surroundings<'a> {
    pub(super) exports: Seen<'a>,
    pub(super) tls: Tls,
    pub(super) stopping: bool,
}

fn start_tls(payload: &[u8], tls: Tls) -> Result<Step, Refusal> {
    match tls {
        Tls::Off => Err((protocol::REP_ERR_POLICY, "this address is served without TLS")),
        Tls::Done => Err((protocol::REP_ERR_INVALID, "TLS is in use already")),
        Tls::Required if !payload.is_empty() => Err(MALFORMED),
        Tls::Required => Ok(Step::StartTls),
    }
}

fn list(payload: &[u8], exports: Seen<'_>, out: &mut Outgoing) -> Result<Step, Refusal> {
    if !payload.is_empty() {
        return Err(MALFORMED);
    }
    for export in exports.all() {
        let name = export.name().as_bytes();
        let length = (name.len() as u32).to_be_bytes();
        let parts = [&length[..], name, export.description().as_bytes()];
        reply(protocol::OPT_LIST, protocol::REP_SERVER, &parts, out);
    }
    Ok(Step::Stay)
}

fn given(condition: bool, flag: u16) -> u16 {
    if condition { flag } else { 0 }
}

/// Minimum, preferred and maximum size of a request.
fn block_sizes(service: &dyn BlockService) -> [u8; 12] {
    let least = service.sector_size();
    let preferred = service
        .preferred_size()
        .max(least)
        .checked_next_power_of_two()
        .map_or(limits::NBD_BLOCK_BYTES_MAX, |size| size.min(limits::NBD_BLOCK_BYTES_MAX));
    let mut bytes = [0; 12];
    bytes[..4].copy_from_slice(&least.to_be_bytes());
    bytes[4..8].copy_from_slice(&preferred.to_be_bytes());
    bytes[8..].copy_from_slice(&limits::NBD_BLOCK_BYTES_MAX.to_be_bytes());
    bytes
}

fn acknowledge(option: u32, out: &mut Outgoing) {
    reply(option, protocol::REP_ACK, &[], out);
}

fn item(option: u32, kind: u16, body: &[u8], out: &mut Outgoing) {
    reply(option, protocol::REP_INFO, &[&kind.to_be_bytes(), body], out);
}

fn offer(option: u32, identifier: u32, context: StatusContext, out: &mut Outgoing) {
    let parts = [&identifier.to_be_bytes()[..], contexts::name(context).as_bytes()];
    reply(option, protocol::REP_META_CONTEXT, &parts, out);
}

fn reply(option: u32, kind: u32, parts: &[&[u8]], out: &mut Outgoing) {
    let length: usize = parts.iter().map(|part| part.len()).sum();
    out.push(&protocol::option_reply(option, kind, length as u32));
    parts.iter().for_each(|part| out.push(part));
}
