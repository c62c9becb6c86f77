//! What a client says, and what it makes of the answers: written from the specification, sharing
//! nothing with the server but the constants.

use dualrestore::format::nbd as protocol;

/// A client's flags: fixed newstyle, no zeroes.
pub fn flags() -> Vec<u8> {
    vec![0, 0, 0, 3]
}

pub fn option(option: u32, payload: &[u8]) -> Vec<u8> {
    option_claiming(option, payload.len() as u32, payload)
}

/// An option whose header claims another length than it has.
pub fn option_claiming(option: u32, length: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = protocol::OPTION_MAGIC.to_be_bytes().to_vec();
    bytes.extend_from_slice(&option.to_be_bytes());
    bytes.extend_from_slice(&length.to_be_bytes());
    bytes.extend_from_slice(payload);
    bytes
}

/// Payload of `INFO` and `GO`.
pub fn query(name: &[u8], items: &[u16]) -> Vec<u8> {
    let mut bytes = string(name);
    bytes.extend_from_slice(&(items.len() as u16).to_be_bytes());
    items.iter().for_each(|item| bytes.extend_from_slice(&item.to_be_bytes()));
    bytes
}

/// Payload of the options about metadata contexts.
pub fn meta(export: &[u8], queries: &[&str]) -> Vec<u8> {
    let mut bytes = string(export);
    bytes.extend_from_slice(&(queries.len() as u32).to_be_bytes());
    queries.iter().for_each(|query| bytes.extend_from_slice(&string(query.as_bytes())));
    bytes
}

fn string(text: &[u8]) -> Vec<u8> {
    [&(text.len() as u32).to_be_bytes()[..], text].concat()
}

/// Flags and `GO`, with structured replies or without.
pub fn enter(name: &[u8], structured: bool) -> Vec<u8> {
    let mut bytes = flags();
    if structured {
        bytes.extend(option(protocol::OPT_STRUCTURED_REPLY, &[]));
    }
    bytes.extend(option(protocol::OPT_GO, &query(name, &[])));
    bytes
}

pub fn request(flags: u16, command: u16, cookie: u64, offset: u64, length: u32) -> Vec<u8> {
    let mut bytes = protocol::REQUEST_MAGIC.to_be_bytes().to_vec();
    bytes.extend_from_slice(&flags.to_be_bytes());
    bytes.extend_from_slice(&command.to_be_bytes());
    bytes.extend_from_slice(&cookie.to_be_bytes());
    bytes.extend_from_slice(&offset.to_be_bytes());
    bytes.extend_from_slice(&length.to_be_bytes());
    bytes
}

pub fn write(flags: u16, cookie: u64, offset: u64, payload: &[u8]) -> Vec<u8> {
    let mut bytes = request(flags, protocol::CMD_WRITE, cookie, offset, payload.len() as u32);
    bytes.extend_from_slice(payload);
    bytes
}

/// A request of extended style.
pub fn extended(flags: u16, command: u16, cookie: u64, offset: u64, length: u64) -> Vec<u8> {
    let mut bytes = protocol::EXTENDED_REQUEST_MAGIC.to_be_bytes().to_vec();
    bytes.extend_from_slice(&flags.to_be_bytes());
    bytes.extend_from_slice(&command.to_be_bytes());
    bytes.extend_from_slice(&cookie.to_be_bytes());
    bytes.extend_from_slice(&offset.to_be_bytes());
    bytes.extend_from_slice(&length.to_be_bytes());
    bytes
}

/// The same with a payload.
pub fn loaded(flags: u16, command: u16, cookie: u64, offset: u64, payload: &[u8]) -> Vec<u8> {
    let flags = flags | protocol::CMD_FLAG_PAYLOAD_LEN;
    let mut bytes = extended(flags, command, cookie, offset, payload.len() as u64);
    bytes.extend_from_slice(payload);
    bytes
}

/// Payload of a block status that names the contexts it asks for.
pub fn filter(length: u64, contexts: &[u32]) -> Vec<u8> {
    let mut bytes = length.to_be_bytes().to_vec();
    contexts.iter().for_each(|context| bytes.extend_from_slice(&context.to_be_bytes()));
    bytes
}

/// Flags and `GO` in extended style, with these contexts.
pub fn enter_extended(name: &[u8], contexts: &[&str]) -> Vec<u8> {
    let mut bytes = flags();
    bytes.extend(option(protocol::OPT_EXTENDED_HEADERS, &[]));
    bytes.extend(option(protocol::OPT_SET_META_CONTEXT, &meta(name, contexts)));
    bytes.extend(option(protocol::OPT_GO, &query(name, &[])));
    bytes
}

/// One reply to an option: the option, the kind, the body.
pub type OptionReply = (u32, u32, Vec<u8>);

/// One message of the transmission phase.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    Simple { cookie: u64, error: u32, bytes: Vec<u8> },
    Chunk { cookie: u64, done: bool, kind: u16, body: Vec<u8> },
    Wide { cookie: u64, offset: u64, done: bool, kind: u16, body: Vec<u8> },
}

/// Reads a server's bytes from the front.
pub struct Reader<'a>(pub &'a [u8]);

impl Reader<'_> {
    pub fn take(&mut self, count: usize) -> &[u8] {
        let (head, rest) = self.0.split_at(count);
        self.0 = rest;
        head
    }

    pub fn number(&mut self, bytes: usize) -> u64 {
        self.take(bytes).iter().fold(0, |number, byte| number << 8 | u64::from(*byte))
    }

    pub fn greeting(&mut self) {
        assert_eq!(self.take(16), b"NBDMAGICIHAVEOPT");
        assert_eq!(self.number(2), 3);
    }

    pub fn option_reply(&mut self) -> OptionReply {
        assert_eq!(self.number(8), protocol::OPTION_REPLY_MAGIC);
        let (option, kind) = (self.number(4) as u32, self.number(4) as u32);
        let length = self.number(4) as usize;
        (option, kind, self.take(length).to_vec())
    }

    /// All replies to options that are left.
    pub fn option_replies(&mut self) -> Vec<OptionReply> {
        let mut replies = Vec::new();
        while !self.0.is_empty() {
            replies.push(self.option_reply());
        }
        replies
    }

    /// Everything up to the acknowledgement of `GO`.
    pub fn entered(&mut self) {
        self.greeting();
        while self.option_reply().0 != protocol::OPT_GO {}
        while self.option_reply().1 != protocol::REP_ACK {}
    }

    /// One message; a simple reply without error carries `data` bytes.
    pub fn reply(&mut self, data: usize) -> Reply {
        let magic = self.number(4) as u32;
        if magic == protocol::SIMPLE_REPLY_MAGIC {
            let (error, cookie) = (self.number(4) as u32, self.number(8));
            let bytes = self.take(if error == 0 { data } else { 0 }).to_vec();
            return Reply::Simple { cookie, error, bytes };
        }
        let (flags, kind) = (self.number(2), self.number(2) as u16);
        let (cookie, done) = (self.number(8), flags & 1 == 1);
        if magic == protocol::EXTENDED_REPLY_MAGIC {
            let (offset, length) = (self.number(8), self.number(8) as usize);
            return Reply::Wide { cookie, offset, done, kind, body: self.take(length).to_vec() };
        }
        assert_eq!(magic, protocol::STRUCTURED_REPLY_MAGIC);
        let length = self.number(4) as usize;
        Reply::Chunk { cookie, done, kind, body: self.take(length).to_vec() }
    }
}

impl Reply {
    /// The protocol's error, zero for success.
    pub fn error(&self) -> u32 {
        match self {
            Self::Simple { error, .. } => *error,
            Self::Chunk { kind: protocol::REPLY_ERROR, body, .. }
            | Self::Wide { kind: protocol::REPLY_ERROR, body, .. } => {
                u32::from_be_bytes(body[..4].try_into().expect("four bytes"))
            }
            Self::Chunk { .. } | Self::Wide { .. } => 0,
        }
    }

    pub fn cookie(&self) -> u64 {
        match self {
            Self::Simple { cookie, .. }
            | Self::Chunk { cookie, .. }
            | Self::Wide { cookie, .. } => *cookie,
        }
    }
}
