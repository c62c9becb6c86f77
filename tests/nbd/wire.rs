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

/// One reply to an option: the option, the kind, the body.
pub type OptionReply = (u32, u32, Vec<u8>);

/// One message of the transmission phase.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    Simple { cookie: u64, error: u32, bytes: Vec<u8> },
    Chunk { cookie: u64, done: bool, kind: u16, body: Vec<u8> },
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
        if self.number(4) as u32 == protocol::SIMPLE_REPLY_MAGIC {
            let (error, cookie) = (self.number(4) as u32, self.number(8));
            let bytes = self.take(if error == 0 { data } else { 0 }).to_vec();
            return Reply::Simple { cookie, error, bytes };
        }
        let (flags, kind) = (self.number(2), self.number(2) as u16);
        let (cookie, length) = (self.number(8), self.number(4) as usize);
        Reply::Chunk { cookie, done: flags & 1 == 1, kind, body: self.take(length).to_vec() }
    }
}

impl Reply {
    /// The protocol's error, zero for success.
    pub fn error(&self) -> u32 {
        match self {
            Self::Simple { error, .. } => *error,
            Self::Chunk { kind: protocol::REPLY_ERROR, body, .. } => {
                u32::from_be_bytes(body[..4].try_into().expect("four bytes"))
            }
            Self::Chunk { .. } => 0,
        }
    }

    pub fn cookie(&self) -> u64 {
        match self {
            Self::Simple { cookie, .. } | Self::Chunk { cookie, .. } => *cookie,
        }
    }
}
