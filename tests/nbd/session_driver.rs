//! A driver of sessions without sockets or threads.

use std::sync::Arc;

use dualrestore::nbd::{Event, ExportTable, Session, Ticket, Tls};
use dualrestore::volume::service::{BlockService, Command};

use crate::ram_service::{Pace, RamService};

pub struct Driver {
    pub exports: Arc<ExportTable>,
    pub service: Arc<RamService>,
    pub session: Session,
    /// Everything the session wanted sent.
    pub sent: Vec<u8>,
    pub tls_began: bool,
    /// While true, nothing that is outgoing is taken.
    pub stalled: bool,
    /// While true, requests are kept unanswered.
    pub keep: bool,
    pub kept: Vec<(Ticket, Command)>,
}

impl Driver {
    /// A session of a table with the one export `db` of 1 MiB.
    pub fn new(tls: Tls) -> Self {
        Self::with(RamService::new(1 << 20, Pace::AtOnce), tls)
    }

    pub fn with(service: RamService, tls: Tls) -> Self {
        let service = Arc::new(service);
        let exports = Arc::new(ExportTable::new());
        exports.insert("db", "the ledger", service.clone()).expect("a new name");
        let session = Session::new(exports.clone(), tls);
        let mut driver = Self {
            exports,
            service,
            session,
            sent: Vec::new(),
            tls_began: false,
            stalled: false,
            keep: false,
            kept: Vec::new(),
        };
        driver.turn();
        driver
    }

    /// Gives the session bytes until it takes no more; returns how many it took.
    pub fn feed(&mut self, bytes: &[u8]) -> usize {
        let mut at = 0;
        loop {
            let space = self.session.space();
            let count = space.len().min(bytes.len() - at);
            space[..count].copy_from_slice(&bytes[at..at + count]);
            self.session.received(count);
            at += count;
            self.turn();
            if count == 0 {
                return at;
            }
        }
    }

    /// Does what the session asks, as long as it asks.
    pub fn turn(&mut self) {
        loop {
            let mut any = false;
            while let Some(event) = self.session.next_event() {
                any = true;
                self.event(event);
            }
            if !self.stalled && self.session.pending() > 0 {
                let before = self.sent.len();
                for slice in self.session.outgoing(3) {
                    self.sent.extend_from_slice(&slice);
                }
                self.session.sent(self.sent.len() - before);
                any = true;
            }
            if !any {
                return;
            }
        }
    }

    fn event(&mut self, event: Event) {
        match event {
            Event::Request { ticket, command } if self.keep => self.kept.push((ticket, command)),
            Event::Request { ticket, command } => self.perform(ticket, command),
            Event::Status { ticket, contexts, range, limit } => {
                let list = |context| Ok((context, self.service.status(context, range, limit)?));
                let statuses = contexts.into_iter().map(list).collect();
                self.session.answer_status(ticket, statuses);
            }
            Event::StartTls => self.tls_began = true,
        }
    }

    fn perform(&mut self, ticket: Ticket, command: Command) {
        let service = self.service.clone();
        let waiting = match command {
            Command::Read { range } => self.session.answer_in_place(ticket, |buffer| {
                matches!(service.read_now(range, buffer), Some(Ok(())))
            }),
            _ => Some(ticket),
        };
        let Some(ticket) = waiting else { return };
        let (answer, answered) = std::sync::mpsc::sync_channel(1);
        service.submit(command, Box::new(move |outcome| answer.send(outcome).expect("waiting")));
        self.session.answer(ticket, answered.recv().expect("answered at once"));
    }

    /// Answers everything that was kept.
    pub fn answer_kept(&mut self) {
        for (ticket, command) in std::mem::take(&mut self.kept) {
            self.perform(ticket, command);
        }
        self.turn();
    }
}
