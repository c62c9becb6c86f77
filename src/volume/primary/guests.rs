//! How a guest's requests reach the machine, or pass it by.
//!
//! | request | way |
//! |---|---|
//! | read of what is wholly current, needs no disk | done by who asks, no lock |
//! | read of what is wholly current, needs a disk | beside this thread, or by a device thread |
//! | anything else | the machine, all that came together under one lock |
//!
//! Guarantees: law 1 for reads past the machine: bits of the map are set after the bytes are there
//! (law 2) and only the machine clears them, before it lets anything else be written.
//! Does not know: NBD, how the machine's actions are carried out.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::driver::{Caller, Driver, State};
use super::event::{Action, Event};
use crate::device::{AlignedBuffer, read_here, write_here};
use crate::error::Result;
use crate::extent::ByteRange;
use crate::volume::content::Content;
use crate::volume::service::{Command, Completion};

impl Driver {
    /// Reads at once if the range is wholly current and that needs no wait for a disk.
    pub fn read_now(&self, range: ByteRange, buffer: &mut [u8]) -> Option<Result<()>> {
        if !self.may_read_fast(range) {
            return None;
        }
        let read = self.device.read_now(range.offset, buffer)?;
        self.count_fast_read(range);
        Some(read)
    }

    fn may_read_fast(&self, range: ByteRange) -> bool {
        !self.refused.load(Ordering::Acquire)
            && self.map.current().all_equal(self.map.geometry().touched(range), true)
    }

    fn count_fast_read(&self, range: ByteRange) {
        self.fast_reads.fetch_add(1, Ordering::Relaxed);
        self.fast_read_bytes.fetch_add(range.length, Ordering::Relaxed);
    }

    pub fn submit(&self, command: Command, completion: Completion) {
        match command {
            Command::Read { range } if self.may_read_fast(range) => {
                self.read_from_device(range, completion);
            }
            command => self.request(command, completion),
        }
    }

    /// As `submit` for each, in their order, but the machine is told of all of them at once.
    pub fn submit_all(&self, requests: &mut Vec<(Command, Completion)>) {
        let slow = |(command, _): &(Command, Completion)| match command {
            Command::Read { range } => !self.may_read_fast(*range),
            _ => true,
        };
        if requests.len() == 1 || !requests.iter().all(slow) {
            requests.drain(..).for_each(|(command, completion)| self.submit(command, completion));
            return;
        }
        let mut state = self.lock();
        if let Some(error) = state.closed.clone() {
            drop(state);
            requests.drain(..).for_each(|(_, completion)| completion(Err(error.clone())));
            return;
        }
        let take = |(command, completion)| state.take(command, completion);
        let events = requests.drain(..).map(take).collect();
        self.run_all(state, events, Caller::Guest);
    }

    /// A wholly current range that one must wait for: past the machine, unless the read fails.
    fn read_from_device(&self, range: ByteRange, completion: Completion) {
        let driver = self.own();
        let after = Box::new(move |read: Result<AlignedBuffer>| match read {
            Ok(buffer) => {
                driver.count_fast_read(range);
                completion(Ok(Some(buffer)));
            }
            Err(_) => driver.request(Command::Read { range }, completion),
        });
        let length = range.length as usize;
        if let Err(after) = read_here(&self.device, range.offset, length, after) {
            let device = Arc::clone(&self.device);
            self.engine.spawn(move || {
                let mut buffer = AlignedBuffer::used(length);
                after(device.read_at(range.offset, &mut buffer).map(|()| buffer));
            });
        }
    }

    fn request(&self, command: Command, completion: Completion) {
        let mut state = self.lock();
        if let Some(error) = &state.closed {
            let error = error.clone();
            drop(state);
            completion(Err(error));
            return;
        }
        let event = state.take(command, completion);
        self.run(state, event, Caller::Guest);
    }

    /// Whether the action is a write that the ring of this thread took.
    pub(super) fn write_beside(&self, action: &Action) -> bool {
        let Action::WriteLocal { token, offset, content: Content::Bytes(payload) } = action else {
            return false;
        };
        let (driver, token) = (self.own(), *token);
        let after = Box::new(move |result| {
            driver.event(Event::WriteDone { token, result }, Caller::Guest);
        });
        write_here(&self.device, *offset, payload, after).is_ok()
    }
}

impl State {
    /// The event that a request is to the machine.
    fn take(&mut self, command: Command, completion: Completion) -> Event {
        self.next_id += 1;
        self.completions.insert(self.next_id, completion);
        Event::Request { id: self.next_id, command }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;
    use std::sync::Mutex;

    use super::super::event::{MirrorPolicy, Options};
    use super::super::volume::PrimaryVolume;
    use super::*;
    use crate::device::{Device, FileDevice, FileDirectory, OpenOptions, Payload, ThreadRing};
    use crate::error::Error;
    use crate::units::{BlockSize, Geometry};
    use crate::volume::engine::Engine;
    use crate::volume::service::{BlockService, Outcome};

    const MIB: u64 = 1 << 20;

    fn volume(home: &tempfile::TempDir, direct: bool) -> Arc<PrimaryVolume> {
        let made = OpenOptions { direct, create_size: Some(MIB), ..OpenOptions::default() };
        let device: Arc<dyn Device> =
            Arc::new(FileDevice::open(home.path().join("disk"), made).expect("made"));
        let options = Options {
            policy: MirrorPolicy::Flush,
            backup: false,
            strict: false,
            missing_deadline_ms: 1000,
        };
        let directory = FileDirectory::open(home.path().join("state"), true).expect("opened");
        let geometry = Geometry::new(MIB, BlockSize::DEFAULT).expect("valid");
        let engine = Engine::new().expect("started");
        PrimaryVolume::open("v", Arc::new(directory), device, true, geometry, options, engine)
            .expect("opened")
    }

    fn ring() -> (ThreadRing, OwnedFd) {
        let bell = rustix::event::eventfd(0, rustix::event::EventfdFlags::NONBLOCK);
        let bell = bell.expect("a descriptor");
        (ThreadRing::new(bell.try_clone().expect("a descriptor")), bell)
    }

    /// Answers in the order in which they came.
    type Answers = Arc<Mutex<Vec<(u64, Outcome)>>>;

    fn keep(answers: &Answers, id: u64) -> Completion {
        let answers = Arc::clone(answers);
        Box::new(move |outcome| answers.lock().expect("no panics").push((id, outcome)))
    }

    fn write(at: u64) -> Command {
        let data = Payload::copy_of(&[at as u8 + 1; 4096]);
        Command::Write { offset: at * 4096, data, force_unit_access: false }
    }

    fn wait(ring: &mut ThreadRing, answers: &Answers, count: usize) {
        while answers.lock().expect("no panics").len() < count {
            ring.turn();
            std::thread::yield_now();
        }
    }

    #[test]
    fn requests_that_came_together_are_each_done_and_answered_once() {
        for direct in [false, true] {
            let home = tempfile::tempdir().expect("a temporary directory");
            let volume = volume(&home, direct);
            let (mut ring, _bell) = ring();
            let answers = Answers::default();
            let mut batch: Vec<_> = (0..64).map(|at| (write(at), keep(&answers, at))).collect();
            volume.submit_all(&mut batch);
            assert!(batch.is_empty());
            wait(&mut ring, &answers, 64);
            let mut batch: Vec<_> = (0..64)
                .map(|at| {
                    let range = ByteRange::new(at * 4096, 4096);
                    (Command::Read { range }, keep(&answers, 100 + at))
                })
                .collect();
            batch.insert(7, (Command::Flush, keep(&answers, 999)));
            volume.submit_all(&mut batch);
            wait(&mut ring, &answers, 64 + 65);
            let mut ids = Vec::new();
            for (id, outcome) in answers.lock().expect("no panics").drain(..) {
                ids.push(id);
                let bytes = outcome.expect("done");
                if (100..164).contains(&id) {
                    assert_eq!(bytes.expect("read")[..], [(id - 100) as u8 + 1; 4096]);
                }
            }
            ids.sort_unstable();
            let expected: Vec<_> = (0..64).chain(100..164).chain([999]).collect();
            assert_eq!(ids, expected);
            drop(ring);
            volume.close().expect("nothing is under way");
        }
    }

    #[test]
    fn writes_of_one_block_that_came_together_are_done_in_their_order() {
        for direct in [false, true] {
            let home = tempfile::tempdir().expect("a temporary directory");
            let volume = volume(&home, direct);
            let (mut ring, _bell) = ring();
            let answers = Answers::default();
            let same = |value: u64| {
                let data = Payload::copy_of(&[value as u8; 4096]);
                Command::Write { offset: 0, data, force_unit_access: false }
            };
            let mut batch: Vec<_> = (0..32).map(|at| (same(at), keep(&answers, at))).collect();
            volume.submit_all(&mut batch);
            wait(&mut ring, &answers, 32);
            let mut bytes = [0; 4096];
            volume.device.read_at(0, &mut bytes).expect("read");
            assert_eq!(bytes, [31; 4096]);
        }
    }

    #[test]
    fn while_a_volume_is_closed_all_that_comes_together_is_refused() {
        let home = tempfile::tempdir().expect("a temporary directory");
        let volume = volume(&home, false);
        let driver = volume.live().expect("made empty by us");
        let patience = std::time::Duration::from_secs(10);
        driver.quiesce(Error::busy("declared lost"), patience).expect("quiet");
        let answers = Answers::default();
        let mut batch: Vec<_> = (0..3).map(|at| (write(at), keep(&answers, at))).collect();
        driver.submit_all(&mut batch);
        let refused = answers.lock().expect("no panics");
        assert!(refused.len() == 3 && refused.iter().all(|(_, outcome)| outcome.is_err()));
    }
}
