//! What a served volume offers to whoever speaks for an application (the NBD room, tests).
//!
//! Guarantees: a request is answered exactly once, through its completion, from any thread.
//! Does not know: NBD, sockets, maps.

use crate::device::{AlignedBuffer, Payload};
use crate::error::Result;
use crate::extent::ByteRange;

/// One request of an application. Ranges lie inside the volume, are not empty and are multiples
/// of `BlockService::sector_size`; the server of the protocol checks that first.
#[derive(Clone, Debug)]
pub enum Command {
    Read {
        range: ByteRange,
    },
    /// `force_unit_access`: durable as if a flush followed.
    Write {
        offset: u64,
        data: Payload,
        force_unit_access: bool,
    },
    /// `may_deallocate` is a hint only: the range reads as zeros either way.
    WriteZeroes {
        range: ByteRange,
        may_deallocate: bool,
        force_unit_access: bool,
    },
    /// Whole blocks read as zeros afterwards, partial edges are left as they are.
    Trim {
        range: ByteRange,
        force_unit_access: bool,
    },
    /// Bring missing blocks of the range; nothing is returned.
    Cache {
        range: ByteRange,
    },
    Flush,
}

/// The answer: the bytes of a read, nothing of the others.
pub type Outcome = Result<Option<AlignedBuffer>>;

/// Called once with the answer, from any thread; must not block.
pub type Completion = Box<dyn FnOnce(Outcome) + Send>;

/// A named set of facts about the blocks, told as block status.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum StatusContext {
    /// Which ranges hold data, which are holes that read as zeros (`base:allocation`).
    Allocation,
    /// Which blocks the primary still lacks (`qemu:dirty-bitmap:missing`).
    Missing,
    /// Which blocks the backup lacks (`qemu:dirty-bitmap:unsent`).
    Unsent,
    /// Which blocks of a snapshot changed since the cut before (`qemu:dirty-bitmap:changed`).
    Changed,
}

/// A run of one status. For `Allocation`, `hole` and `zero` speak; for the others `marked`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StatusExtent {
    pub length: u64,
    pub hole: bool,
    pub zero: bool,
    pub marked: bool,
}

/// A volume, or a snapshot of one, open for requests.
pub trait BlockService: Send + Sync {
    /// Bytes; a multiple of `sector_size`.
    fn size(&self) -> u64;
    /// Smallest unit of a request, 512 or 4096.
    fn sector_size(&self) -> u32;
    /// The unit in which requests are cheapest, e.g. the block size.
    fn preferred_size(&self) -> u32;
    fn read_only(&self) -> bool;
    /// The contexts that `status` answers.
    fn contexts(&self) -> Vec<StatusContext>;

    /// Reads at once if that needs neither the link nor a wait: `None` means "submit it".
    /// On `Some(Err)` the caller submits as well (the read may heal from the backup).
    fn read_now(&self, range: ByteRange, buffer: &mut [u8]) -> Option<Result<()>>;

    /// Whether zeroing the range would take less than writing it: no block of it must be fetched
    /// first, and the device makes zeros without writing them.
    fn zeroes_fast(&self, range: ByteRange) -> bool {
        let _nothing_is_known_of = range;
        false
    }

    /// Takes a request; the completion may run before this returns.
    fn submit(&self, command: Command, completion: Completion);

    /// Takes all of these, in their order, and leaves the list empty; completions may run before
    /// this returns.
    fn submit_all(&self, requests: &mut Vec<(Command, Completion)>) {
        requests.drain(..).for_each(|(command, completion)| self.submit(command, completion));
    }

    /// Consecutive runs from `range.offset`, at least one, at most `limit`; together they cover
    /// the range or a beginning of it.
    fn status(
        &self,
        context: StatusContext,
        range: ByteRange,
        limit: usize,
    ) -> Result<Vec<StatusExtent>>;
}
