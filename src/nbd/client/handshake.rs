//! A client's way into transmission, as a state machine: it says how many bytes it wants next, and
//! what to send once it has them.
//!
//! | state | the server says | we say | next |
//! |---|---|---|---|
//! | greeting | fixed newstyle | flags, `STRUCTURED_REPLY` | structured |
//! | greeting | anything else | | an error |
//! | structured | acknowledged | `SET_META_CONTEXT` of `base:allocation` | contexts |
//! | structured | refused | `GO` | go |
//! | contexts | the context, acknowledged; refused | `GO` | go |
//! | go | information, acknowledged | | done |
//! | go | refused | | an error |
//!
//! Behind TLS the greeting has been said before: it begins with `STRUCTURED_REPLY`.
//!
//! Guarantees: a length is checked against its limit before it is used; the number of answers to an
//! option is bounded. Does not know: sockets.

use crate::error::{Error, Result};
use crate::format::nbd as protocol;
use crate::format::nbd::client::{
    GREETING_BYTES, Information, OPTION_REPLY_BYTES, OptionReply, context_query, decode_context,
    decode_greeting, export_query, option,
};
use crate::limits::{
    NBD_NAME_BYTES_MAX, NBD_OPTION_BYTES_MAX, NBD_REPLIES_MAX, NBD_REQUEST_BYTES_MAX,
    VOLUME_BYTES_MAX,
};

const ALLOCATION: &str = "base:allocation";
/// The most that a server may want requests to be aligned to, by the specification.
const ALIGNMENT_MAX: u32 = 64 << 10;

/// What the handshake has led to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Agreed {
    pub size: u64,
    pub flags: u16,
    /// Replies come in chunks.
    pub structured: bool,
    /// The number of `base:allocation` in replies, if the server tells it.
    pub allocation: Option<u32>,
    /// Requests are multiples of this, and not longer than that.
    pub minimum: u32,
    pub maximum: u32,
    pub description: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Greeting,
    /// Of an answer to the option.
    Header(u32),
    Body(OptionReply),
    Done,
}

/// See the module.
#[derive(Debug)]
pub struct ClientHandshake {
    export: String,
    state: State,
    agreed: Agreed,
    /// Whether the server has told size and flags.
    described: bool,
    /// Answers to the option so far.
    answers: u32,
}

impl ClientHandshake {
    /// `greeted`: the greeting and our flags have been said, and TLS has begun. Gives what to send
    /// at once.
    pub fn new(export: &str, greeted: bool) -> Result<(Self, Vec<u8>)> {
        if export.len() > NBD_NAME_BYTES_MAX as usize || export.contains('\0') {
            return Err(Error::usage(format!(
                "expected an export name of at most {NBD_NAME_BYTES_MAX} bytes without NUL"
            )));
        }
        let agreed = Agreed { minimum: 1, maximum: NBD_REQUEST_BYTES_MAX, ..Agreed::default() };
        let mut handshake = Self {
            export: export.to_owned(),
            state: State::Greeting,
            agreed,
            described: false,
            answers: 0,
        };
        let first = if greeted { handshake.ask_structured() } else { Vec::new() };
        Ok((handshake, first))
    }

    /// Bytes to bring next; 0: it is done.
    #[must_use]
    pub fn wants(&self) -> usize {
        match self.state {
            State::Greeting => GREETING_BYTES,
            State::Header(_) => OPTION_REPLY_BYTES,
            State::Body(reply) => reply.length as usize,
            State::Done => 0,
        }
    }

    /// Takes exactly what was wanted; gives what to send.
    pub fn receive(&mut self, bytes: &[u8]) -> Result<Vec<u8>> {
        assert_eq!(bytes.len(), self.wants(), "what was wanted");
        match self.state {
            State::Greeting => self.greeted(bytes),
            State::Header(asked) => self.header(asked, bytes),
            State::Body(reply) => self.answer(reply, bytes),
            State::Done => Ok(Vec::new()),
        }
    }

    /// What was agreed; `None` until it is done.
    #[must_use]
    pub fn agreed(&self) -> Option<&Agreed> {
        (self.state == State::Done).then_some(&self.agreed)
    }

    fn greeted(&mut self, bytes: &[u8]) -> Result<Vec<u8>> {
        let flags = decode_greeting(bytes.first_chunk().expect("as long as wanted"));
        let Some(flags) = flags.filter(|flags| flags & protocol::FIXED_NEWSTYLE != 0) else {
            return Err(Error::format(
                "expected an NBD server that speaks fixed newstyle, found another: name the socket \
                 or port of one",
            ));
        };
        let ours = flags & (protocol::FIXED_NEWSTYLE | protocol::NO_ZEROES);
        let mut said = u32::from(ours).to_be_bytes().to_vec();
        said.extend(self.ask_structured());
        Ok(said)
    }

    fn ask(&mut self, number: u32, payload: &[u8]) -> Vec<u8> {
        self.state = State::Header(number);
        self.answers = 0;
        option(number, payload)
    }

    fn ask_structured(&mut self) -> Vec<u8> {
        self.ask(protocol::OPT_STRUCTURED_REPLY, &[])
    }

    fn ask_contexts(&mut self) -> Vec<u8> {
        let query = context_query(&self.export, ALLOCATION);
        self.ask(protocol::OPT_SET_META_CONTEXT, &query)
    }

    fn ask_go(&mut self) -> Vec<u8> {
        let items = [protocol::INFO_DESCRIPTION, protocol::INFO_BLOCK_SIZE];
        let query = export_query(&self.export, &items);
        self.ask(protocol::OPT_GO, &query)
    }

    fn header(&mut self, asked: u32, bytes: &[u8]) -> Result<Vec<u8>> {
        let reply = OptionReply::decode(bytes.first_chunk().expect("as long as wanted"));
        let reply = reply.filter(|reply| reply.option == asked).ok_or_else(out_of_step)?;
        self.answers += 1;
        if reply.length > NBD_OPTION_BYTES_MAX || self.answers > NBD_REPLIES_MAX {
            return Err(Error::format(format!(
                "expected at most {NBD_REPLIES_MAX} answers of {NBD_OPTION_BYTES_MAX} bytes to an \
                 NBD option, found more"
            )));
        }
        self.state = State::Body(reply);
        if reply.length == 0 { self.answer(reply, &[]) } else { Ok(Vec::new()) }
    }

    fn answer(&mut self, reply: OptionReply, body: &[u8]) -> Result<Vec<u8>> {
        let OptionReply { option, kind, .. } = reply;
        let refused = kind & protocol::REP_ERROR != 0;
        if refused && kind == protocol::REP_ERR_TLS_REQD {
            return Err(Error::usage(
                "the NBD server wants TLS: name it with nbds:// or nbds+unix://",
            ));
        }
        match (option, kind) {
            (protocol::OPT_STRUCTURED_REPLY, protocol::REP_ACK) => {
                self.agreed.structured = true;
                Ok(self.ask_contexts())
            }
            (protocol::OPT_STRUCTURED_REPLY, _) if refused => Ok(self.ask_go()),
            (protocol::OPT_SET_META_CONTEXT, protocol::REP_META_CONTEXT) => {
                let (number, name) = decode_context(body).ok_or_else(out_of_step)?;
                if name == ALLOCATION {
                    self.agreed.allocation = Some(number);
                }
                self.state = State::Header(option);
                Ok(Vec::new())
            }
            (protocol::OPT_SET_META_CONTEXT, protocol::REP_ACK) => Ok(self.ask_go()),
            (protocol::OPT_SET_META_CONTEXT, _) if refused => {
                self.agreed.allocation = None;
                Ok(self.ask_go())
            }
            (protocol::OPT_GO, protocol::REP_INFO) => {
                self.learn(body)?;
                self.state = State::Header(option);
                Ok(Vec::new())
            }
            (protocol::OPT_GO, protocol::REP_ACK) if self.described => {
                self.state = State::Done;
                Ok(Vec::new())
            }
            (protocol::OPT_GO, _) if refused => Err(self.refusal(kind, body)),
            _ => Err(out_of_step()),
        }
    }

    fn learn(&mut self, body: &[u8]) -> Result<()> {
        match Information::decode(body).ok_or_else(out_of_step)? {
            Information::Export { size, flags } => {
                if size > VOLUME_BYTES_MAX {
                    return Err(Error::format(format!(
                        "expected an export of at most {VOLUME_BYTES_MAX} bytes, found {size}"
                    )));
                }
                (self.agreed.size, self.agreed.flags) = (size, flags);
                self.described = true;
            }
            Information::Description(text) => self.agreed.description = text.to_owned(),
            Information::BlockSize { minimum, maximum } => {
                let possible = minimum.is_power_of_two()
                    && minimum <= ALIGNMENT_MAX
                    && maximum >= minimum
                    && maximum.is_multiple_of(minimum) | (maximum == u32::MAX);
                if !possible {
                    return Err(Error::format(format!(
                        "expected an NBD server whose requests are from a power of two of at most \
                         {ALIGNMENT_MAX} bytes to a multiple of it, found {minimum} to {maximum}"
                    )));
                }
                self.agreed.minimum = minimum;
                // Our own limit is a multiple of every possible minimum.
                self.agreed.maximum = maximum.min(NBD_REQUEST_BYTES_MAX);
            }
            Information::Other => {}
        }
        Ok(())
    }

    fn refusal(&self, kind: u32, body: &[u8]) -> Error {
        let words = String::from_utf8_lossy(body);
        let name = &self.export;
        match kind {
            protocol::REP_ERR_UNKNOWN => Error::usage(format!(
                "expected an export named {name:?}, the NBD server has none ({words}): \
                 `nbdinfo --list` shows those that it has"
            )),
            protocol::REP_ERR_SHUTDOWN => {
                Error::link(format!("the NBD server is being shut down ({words}): try again later"))
            }
            protocol::REP_ERR_UNSUP => Error::format(format!(
                "expected an NBD server that knows the option GO, found an older one ({words})"
            )),
            _ => Error::usage(format!(
                "the NBD server refuses the export {name:?} ({words}, {:#x})",
                kind & !protocol::REP_ERROR
            )),
        }
    }
}

fn out_of_step() -> Error {
    Error::format("expected an answer of an NBD server, found other bytes: is it one?")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;
    use crate::format::nbd::{greeting, option_reply};

    fn reply(option: u32, kind: u32, body: &[u8]) -> Vec<u8> {
        [&option_reply(option, kind, body.len() as u32)[..], body].concat()
    }

    fn export(size: u64) -> Vec<u8> {
        let body = [&0_u16.to_be_bytes()[..], &size.to_be_bytes(), &[0, 1]].concat();
        reply(protocol::OPT_GO, protocol::REP_INFO, &body)
    }

    fn block_size(minimum: u32, maximum: u32) -> Vec<u8> {
        let body = [&3_u16.to_be_bytes()[..], &minimum.to_be_bytes(), &[0; 4]].concat();
        let body = [&body[..], &maximum.to_be_bytes()].concat();
        reply(protocol::OPT_GO, protocol::REP_INFO, &body)
    }

    fn acknowledged(option: u32) -> Vec<u8> {
        reply(option, protocol::REP_ACK, &[])
    }

    /// What a server says that offers everything, up to the description of the export.
    fn beginning() -> Vec<Vec<u8>> {
        let context = [&9_u32.to_be_bytes()[..], ALLOCATION.as_bytes()].concat();
        vec![
            greeting().to_vec(),
            acknowledged(protocol::OPT_STRUCTURED_REPLY),
            reply(protocol::OPT_SET_META_CONTEXT, protocol::REP_META_CONTEXT, &context),
            acknowledged(protocol::OPT_SET_META_CONTEXT),
        ]
    }

    fn talk(said: &[Vec<u8>]) -> Result<Agreed> {
        let (mut handshake, _) = ClientHandshake::new("db", false)?;
        let mut stream = &said.concat()[..];
        while handshake.wants() > 0 {
            let Some((head, rest)) = stream.split_at_checked(handshake.wants()) else {
                return Err(Error::link("the stream ended"));
            };
            stream = rest;
            handshake.receive(head)?;
        }
        assert!(stream.is_empty(), "nothing was left");
        Ok(handshake.agreed().expect("done").clone())
    }

    #[test]
    fn everything_that_a_server_offers_is_taken() {
        let mut said = beginning();
        said.push(export(1 << 30));
        said.push(reply(protocol::OPT_GO, protocol::REP_INFO, b"\0\x02the ledger"));
        said.push(reply(protocol::OPT_GO, protocol::REP_INFO, b"\0\x01another"));
        said.push(block_size(512, u32::MAX));
        said.push(acknowledged(protocol::OPT_GO));
        let expected = Agreed {
            size: 1 << 30,
            flags: 1,
            structured: true,
            allocation: Some(9),
            minimum: 512,
            maximum: NBD_REQUEST_BYTES_MAX,
            description: "the ledger".into(),
        };
        assert_eq!(talk(&said).expect("agreed"), expected);
    }

    #[test]
    fn a_server_that_refuses_what_can_be_spared_is_taken_without_it() {
        let refused = |option| reply(option, protocol::REP_ERR_UNSUP, b"no");
        let mut said = vec![greeting().to_vec(), refused(protocol::OPT_STRUCTURED_REPLY)];
        said.push(export(512));
        said.push(acknowledged(protocol::OPT_GO));
        let agreed = talk(&said).expect("agreed");
        assert_eq!((agreed.structured, agreed.allocation, agreed.minimum), (false, None, 1));
        let mut said = beginning()[..3].to_vec();
        said.push(refused(protocol::OPT_SET_META_CONTEXT));
        said.push(export(512));
        said.push(acknowledged(protocol::OPT_GO));
        let agreed = talk(&said).expect("agreed");
        assert_eq!((agreed.structured, agreed.allocation), (true, None));
    }

    #[test]
    fn behind_tls_the_first_option_is_said_at_once() {
        let (handshake, first) = ClientHandshake::new("db", true).expect("a name");
        assert_eq!(first, option(protocol::OPT_STRUCTURED_REPLY, &[]));
        assert_eq!(handshake.wants(), OPTION_REPLY_BYTES);
    }

    #[test]
    fn a_refusal_says_what_to_do() {
        for (kind, expected, words) in [
            (protocol::REP_ERR_UNKNOWN, ErrorKind::Usage, "nbdinfo --list"),
            (protocol::REP_ERR_TLS_REQD, ErrorKind::Usage, "nbds://"),
            (protocol::REP_ERR_SHUTDOWN, ErrorKind::Link, "later"),
            (protocol::REP_ERR_UNSUP, ErrorKind::Format, "GO"),
            (protocol::REP_ERR_POLICY, ErrorKind::Usage, "not today"),
        ] {
            let mut said = beginning();
            said.push(reply(protocol::OPT_GO, kind, b"not today"));
            let error = talk(&said).expect_err("refused");
            assert_eq!(error.kind(), expected);
            assert!(error.to_string().contains(words), "{error}");
        }
    }

    #[test]
    fn what_cannot_be_is_refused_before_it_is_used() {
        let go = |last: &[Vec<u8>]| [&beginning()[..], last].concat();
        let end = acknowledged(protocol::OPT_GO);
        let cases = [
            vec![b"SSH-2.0-OpenSSH_9.2 and so on".to_vec()],
            vec![[&greeting()[..16], &[0, 0]].concat()],
            vec![greeting().to_vec(), acknowledged(protocol::OPT_GO)],
            vec![greeting().to_vec(), option_reply(8, 1 << 31, u32::MAX).to_vec()],
            go(std::slice::from_ref(&end)),
            go(&[export(VOLUME_BYTES_MAX + 512)]),
            go(&[block_size(3, 512)]),
            go(&[block_size(0, 512)]),
            go(&[block_size(4096, 512)]),
            go(&[block_size(4096, 4096 + 512)]),
            go(&[block_size(1 << 17, 1 << 20)]),
            go(&[reply(protocol::OPT_GO, protocol::REP_INFO, &[0, 0, 1])]),
            go(&vec![export(512); NBD_REPLIES_MAX as usize + 1]),
        ];
        for (number, said) in cases.iter().enumerate() {
            let error = talk(said).expect_err("refused");
            assert_eq!(error.kind(), ErrorKind::Format, "{number}: {error}");
        }
        assert!(ClientHandshake::new("a\0b", false).is_err());
        assert!(ClientHandshake::new(&"a".repeat(4097), false).is_err());
    }
}
