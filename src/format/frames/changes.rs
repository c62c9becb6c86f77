//! Which blocks of a range changed since a cut: the payloads of Changes and ChangesReply.
//!
//! Guarantees: a reply that was read speaks of at least one block; its runs ascend, are not empty,
//! do not overlap and lie within the blocks that it speaks of; bits beyond those are zero. It
//! takes at most `LINK_CHANGES_BYTES_MAX`, however many blocks changed.
//! Does not know: the volume, which blocks were asked for (`link`).

use uuid::Uuid;
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::bitmap::Bitmap;
use crate::error::{Error, Result};
use crate::extent::BlockRange;
use crate::limits::LINK_CHANGES_BYTES_MAX;

/// A cut, by all the names that it has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CutName {
    /// Of its snapshot, which may have been deleted since.
    pub snapshot: Uuid,
    pub generation: u64,
    pub sequence: u64,
}

/// The answer for the first blocks of the range that was asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChangedBlocks {
    /// How many blocks it speaks of.
    pub blocks: u32,
    pub form: ChangedForm,
}

/// Whichever says more in a frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ChangedForm {
    /// First block, counted from the first that was asked for, and number of blocks.
    Runs(Vec<(u32, u32)>),
    /// One bit a block, lowest first; 1: it changed.
    Bits(Vec<u8>),
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RequestLayout {
    length: U64,
    snapshot: [u8; 16],
    generation: U64,
    sequence: U64,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct ReplyLayout {
    blocks: U32,
    runs: U32,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RunLayout {
    first: U32,
    blocks: U32,
}

pub(super) const REQUEST_BYTES: usize = size_of::<RequestLayout>();
pub(super) const REPLY_BYTES_MIN: usize = size_of::<ReplyLayout>();
pub(super) const REPLY_BYTES_MAX: usize = REPLY_BYTES_MIN + LINK_CHANGES_BYTES_MAX;
/// In place of the number of runs: bits follow.
const BITS: u32 = u32::MAX;
const RUNS_MAX: usize = LINK_CHANGES_BYTES_MAX / size_of::<RunLayout>();
const BITS_MAX: u32 = LINK_CHANGES_BYTES_MAX as u32 * 8;
/// So that the end of every run fits its field.
const BLOCKS_MAX: u64 = 1 << 31;

impl ChangedBlocks {
    /// What the map says of the first of these blocks, as many as fit.
    #[must_use]
    pub fn of(changed: &Bitmap, asked: BlockRange) -> Self {
        assert!(!asked.is_empty(), "something was asked for");
        let end = asked.end.min(asked.start + BLOCKS_MAX);
        let relative = |block: u64| u32::try_from(block - asked.start).expect("within the limit");
        let mut runs = Vec::new();
        let mut found = changed.runs(BlockRange::new(asked.start, end), true);
        for run in found.by_ref().take(RUNS_MAX) {
            runs.push((relative(run.start), u32::try_from(run.count()).expect("within")));
        }
        let spoken_of = found.next().map_or(relative(end), |next| relative(next.start));
        if spoken_of >= BITS_MAX || spoken_of == relative(end) {
            return Self { blocks: spoken_of, form: ChangedForm::Runs(runs) };
        }
        let blocks = BITS_MAX.min(relative(end));
        let mut bits = vec![0; blocks.div_ceil(8) as usize];
        let within = BlockRange::new(asked.start, asked.start + u64::from(blocks));
        for run in changed.runs(within, true) {
            for at in relative(run.start)..relative(run.start) + run.count() as u32 {
                bits[at as usize / 8] |= 1 << (at % 8);
            }
        }
        Self { blocks, form: ChangedForm::Bits(bits) }
    }

    /// The blocks that it speaks of, where the first that was asked for is `first`.
    #[must_use]
    pub fn spoken_of(&self, first: u64) -> BlockRange {
        BlockRange::new(first, first + u64::from(self.blocks))
    }

    /// Those of them that changed, ascending.
    #[must_use]
    pub fn changed(&self, first: u64) -> Vec<BlockRange> {
        match &self.form {
            ChangedForm::Runs(runs) => runs
                .iter()
                .map(|(start, blocks)| {
                    let start = first + u64::from(*start);
                    BlockRange::new(start, start + u64::from(*blocks))
                })
                .collect(),
            ChangedForm::Bits(bits) => {
                let is_set = |at: &u32| bits[*at as usize / 8] >> (at % 8) & 1 == 1;
                let mut runs: Vec<BlockRange> = Vec::new();
                for at in (0..self.blocks).filter(is_set) {
                    let block = first + u64::from(at);
                    match runs.last_mut() {
                        Some(last) if last.end == block => last.end += 1,
                        _ => runs.push(BlockRange::one(block)),
                    }
                }
                runs
            }
        }
    }

    pub(super) fn payload_length(&self) -> usize {
        REPLY_BYTES_MIN
            + match &self.form {
                ChangedForm::Runs(runs) => size_of::<RunLayout>() * runs.len(),
                ChangedForm::Bits(bits) => bits.len(),
            }
    }

    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        let runs = match &self.form {
            ChangedForm::Runs(runs) => u32::try_from(runs.len()).expect("runs are limited"),
            ChangedForm::Bits(_) => BITS,
        };
        let layout = ReplyLayout { blocks: self.blocks.into(), runs: runs.into() };
        out.extend_from_slice(layout.as_bytes());
        match &self.form {
            ChangedForm::Runs(runs) => {
                for (first, blocks) in runs {
                    let layout = RunLayout { first: (*first).into(), blocks: (*blocks).into() };
                    out.extend_from_slice(layout.as_bytes());
                }
            }
            ChangedForm::Bits(bits) => out.extend_from_slice(bits),
        }
    }

    pub(super) fn decode(payload: &[u8]) -> Result<Self> {
        let (layout, rest) = ReplyLayout::ref_from_prefix(payload)
            .map_err(|_| wrong("a payload as long as its fields say"))?;
        let form = if layout.runs.get() == BITS {
            ChangedForm::Bits(rest.to_vec())
        } else {
            let runs = <[RunLayout]>::ref_from_bytes(rest)
                .ok()
                .filter(|runs| runs.len() as u64 == u64::from(layout.runs.get()))
                .ok_or_else(|| wrong("a payload as long as its fields say"))?;
            ChangedForm::Runs(runs.iter().map(|run| (run.first.get(), run.blocks.get())).collect())
        };
        Ok(Self { blocks: layout.blocks.get(), form })
    }

    pub(super) fn check(&self) -> Result<()> {
        if self.blocks == 0 || u64::from(self.blocks) > BLOCKS_MAX {
            return Err(wrong("1 to 2^31 blocks that it speaks of"));
        }
        match &self.form {
            ChangedForm::Runs(runs) => {
                let mut at = 0;
                let ascend = runs.iter().all(|(first, blocks)| {
                    let sound = u64::from(*first) >= at && *blocks > 0;
                    at = u64::from(*first) + u64::from(*blocks);
                    sound
                });
                if !ascend || at > u64::from(self.blocks) || runs.len() > RUNS_MAX {
                    return Err(wrong("ascending runs within the blocks that it speaks of"));
                }
            }
            ChangedForm::Bits(bits) => {
                let length = self.blocks.div_ceil(8) as usize;
                let used = self.blocks % 8;
                let clean = used == 0 || bits.last().is_none_or(|last| last >> used == 0);
                if bits.len() != length || self.blocks > BITS_MAX || !clean {
                    return Err(wrong("one bit for each block that it speaks of"));
                }
            }
        }
        Ok(())
    }
}

fn wrong(expected: &str) -> Error {
    Error::format(format!("link ChangesReply: expected {expected}, found another"))
}

pub(super) fn encode_request(length: u64, cut: &CutName, out: &mut Vec<u8>) {
    let layout = RequestLayout {
        length: length.into(),
        snapshot: cut.snapshot.into_bytes(),
        generation: cut.generation.into(),
        sequence: cut.sequence.into(),
    };
    out.extend_from_slice(layout.as_bytes());
}

pub(super) fn decode_request(payload: &[u8]) -> Result<(u64, CutName)> {
    let layout = RequestLayout::ref_from_bytes(payload)
        .map_err(|_| Error::format("link Changes: expected a payload as long as its fields say"))?;
    let cut = CutName {
        snapshot: Uuid::from_bytes(layout.snapshot),
        generation: layout.generation.get(),
        sequence: layout.sequence.get(),
    };
    if cut.snapshot.is_nil() {
        return Err(Error::format("link Changes: expected the UUID of a snapshot, found none"));
    }
    Ok((layout.length.get(), cut))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::header::Header;
    use super::super::{Frame, HEADER_BYTES, Message};
    use super::*;
    use crate::extent::ByteRange;

    const GOLDEN: &[u8] = include_bytes!("../../../tests/golden/link-v1-changes.bin");

    type Bytes = Vec<u8>;

    fn golden() -> Vec<Message<Bytes>> {
        let cut = CutName {
            snapshot: Uuid::from_bytes(std::array::from_fn(|index| 0x40 + index as u8)),
            generation: 3,
            sequence: 12345,
        };
        let runs = ChangedForm::Runs(vec![(0, 1), (7, 2), (262_143, 1)]);
        vec![
            Message::Changes { tag: 104, range: ByteRange::new(1 << 20, 8 << 30), cut },
            Message::ChangesReply {
                tag: 104,
                offset: 1 << 20,
                changed: ChangedBlocks { blocks: 262_144, form: runs },
            },
            Message::ChangesReply {
                tag: 105,
                offset: 0,
                changed: ChangedBlocks { blocks: 13, form: ChangedForm::Bits(vec![0xa5, 0x11]) },
            },
        ]
    }

    fn read(bytes: &[u8], count: u8) -> Result<Frame<Bytes>> {
        let (head, payload) =
            bytes.split_first_chunk::<HEADER_BYTES>().ok_or_else(|| Error::link("too short"))?;
        let header = Header::decode(head, count)?;
        Frame::decode(&header, payload)
    }

    #[test]
    fn the_golden_file_is_written_and_read_as_the_frames_it_was_made_of() {
        let mut stream = Vec::new();
        let mut rest = GOLDEN;
        for (count, message) in (0..).zip(golden()) {
            let frame = Frame::Message(message);
            frame.encode(count, &mut stream);
            let (bytes, after) = rest.split_at(frame.encoded_length());
            assert_eq!(read(bytes, count).expect("golden"), frame);
            rest = after;
        }
        assert!(rest.is_empty() && stream == GOLDEN);
    }

    #[test]
    fn every_flipped_bit_is_noticed() {
        for message in golden() {
            let mut bytes = Vec::new();
            Frame::Message(message).encode(9, &mut bytes);
            for bit in 0..bytes.len() * 8 {
                bytes[bit / 8] ^= 1 << (bit % 8);
                assert!(read(&bytes, 9).is_err(), "bit {bit}");
                bytes[bit / 8] ^= 1 << (bit % 8);
            }
            read(&bytes, 9).expect("whole again");
        }
    }

    #[test]
    fn replies_that_contradict_themselves_are_refused() {
        let runs = |blocks, runs: &[(u32, u32)]| ChangedBlocks {
            blocks,
            form: ChangedForm::Runs(runs.to_vec()),
        };
        let bits =
            |blocks, bits: &[u8]| ChangedBlocks { blocks, form: ChangedForm::Bits(bits.to_vec()) };
        for wrong in [
            runs(0, &[]),
            runs(u32::MAX, &[]),
            runs(8, &[(0, 0)]),
            runs(8, &[(7, 2)]),
            runs(8, &[(4, 2), (5, 1)]),
            runs(8, &[(u32::MAX, u32::MAX)]),
            bits(0, &[]),
            bits(8, &[0, 0]),
            bits(9, &[0]),
            bits(9, &[0, 2]),
            bits(BITS_MAX + 1, &[0; LINK_CHANGES_BYTES_MAX + 1]),
        ] {
            assert!(wrong.check().is_err(), "{:?} blocks", wrong.blocks);
        }
        for payload in [&[1, 0, 0][..], &[8, 0, 0, 0, 1, 0, 0, 0, 1, 2, 3, 4]] {
            ChangedBlocks::decode(payload).expect_err("cut off");
        }
        let mut request = Vec::new();
        let cut = CutName { snapshot: Uuid::nil(), generation: 0, sequence: 0 };
        encode_request(512, &cut, &mut request);
        decode_request(&request).expect_err("no snapshot is named");
    }

    #[test]
    fn a_frame_is_bounded_and_speaks_of_as_much_as_it_can() {
        let blocks = 600_000;
        let changed = Bitmap::new(blocks, false);
        let all = BlockRange::new(0, blocks);
        assert_eq!(ChangedBlocks::of(&changed, all).spoken_of(0), all);
        for block in (0..blocks).step_by(2) {
            changed.fill(BlockRange::one(block), true);
        }
        let dense = ChangedBlocks::of(&changed, all);
        assert!(matches!(dense.form, ChangedForm::Bits(_)));
        assert_eq!(u64::from(dense.blocks), 8 * LINK_CHANGES_BYTES_MAX as u64);
        let sparse = Bitmap::new(1 << 21, false);
        for block in (0..1 << 21).step_by(150) {
            sparse.fill(BlockRange::one(block), true);
        }
        let told = ChangedBlocks::of(&sparse, BlockRange::new(0, 1 << 21));
        assert!(matches!(told.form, ChangedForm::Runs(_)));
        assert!(u64::from(told.blocks) > 8 * LINK_CHANGES_BYTES_MAX as u64);
        assert!(told.payload_length() <= REPLY_BYTES_MAX);
    }

    proptest! {
        // The limits of a frame make a case large.
        #![proptest_config(ProptestConfig::with_cases(6))]
        #[test]
        fn asked_until_all_is_told_it_is_the_map(
            runs in proptest::collection::vec((0u64..700_000, 1u64..50), 0..60),
            dense in proptest::option::of((0u64..500_000, 2usize..9)),
        ) {
            const BLOCKS: u64 = 700_100;
            let changed = Bitmap::new(BLOCKS, false);
            for (start, count) in runs {
                changed.fill(BlockRange::new(start, start + count), true);
            }
            if let Some((start, step)) = dense {
                for block in (start..start + 150_000).step_by(step) {
                    changed.fill(BlockRange::one(block), true);
                }
            }
            let told = Bitmap::new(BLOCKS, false);
            let mut at = 17;
            while at < BLOCKS {
                let reply = ChangedBlocks::of(&changed, BlockRange::new(at, BLOCKS));
                reply.check().expect("sound");
                let mut bytes = Vec::new();
                reply.encode(&mut bytes);
                prop_assert_eq!(bytes.len(), reply.payload_length());
                prop_assert_eq!(&ChangedBlocks::decode(&bytes).expect("ours"), &reply);
                for run in reply.changed(at) {
                    told.fill(run, true);
                }
                at = reply.spoken_of(at).end;
            }
            let all = BlockRange::new(17, BLOCKS);
            prop_assert!(told.runs(all, true).eq(changed.runs(all, true)));
        }
    }
}
