//! Situations in which systems of this kind lose data, by name. A set of lives that never comes
//! into one of them says nothing about it, so that all must be reached.
//!
//! Does not know: how they come about.

/// Declares the states with their names and what each means.
macro_rules! rare_states {
    ($($(#[$meaning:meta])* $state:ident = $name:literal,)*) => {
        /// See the module.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(usize)]
        pub enum RareState {
            $($(#[$meaning])* $state,)*
        }

        impl RareState {
            pub const ALL: &'static [Self] = &[$(Self::$state,)*];

            #[must_use]
            pub fn name(self) -> &'static str {
                match self {
                    $(Self::$state => $name,)*
                }
            }
        }
    };
}

rare_states! {
    /// A read of a missing block was not answered by its deadline.
    MissingReadTimedOut = "missing_read_timed_out",
    /// A write to a missing block ended before the fetch of that block was answered.
    FetchOvertakenByWrite = "fetch_overtaken_by_write",
    /// A bundle had blocks that are missing and that it may not supply (law 5).
    MergeSkippedLinkOnly = "merge_skipped_link_only",
    /// A claim of a merge was open when the primary lost power.
    CrashDuringMerge = "crash_during_merge",
    /// Bytes of a session that was over reached the primary after the next had begun.
    LateAcknowledgement = "late_acknowledgement",
    /// Bytes of a session that was over reached the backup after the next had begun (R11).
    SessionFenced = "session_fenced",
    /// A session began at the backup while the one before was open there.
    SessionSuperseded = "session_superseded",
    /// A byte was changed on the wire, and the session ended.
    WireDamageCaught = "wire_damage_caught",
    /// The primary's power went out while pages of its map were written or flushed.
    CrashDuringCommit = "crash_during_commit",
    /// The same while its intent log was.
    CrashDuringIntent = "crash_during_intent",
    /// The same of either side while it was opened after a crash.
    CrashDuringRecovery = "crash_during_recovery",
    /// A page of the primary's map was found torn or rotten.
    DamagedMapPage = "damaged_map_page",
    /// A volume was refused because of rot, instead of being guessed at.
    RefusedAfterRot = "refused_after_rot",
    /// A block that was missing in a hot extent became link-only after a crash (R4).
    IntentMadeLinkOnly = "intent_made_link_only",
    /// A block that was current in a hot extent became unsent after a crash (R12).
    IntentMadeUnsent = "intent_made_unsent",
    /// A flush began while unsent blocks were being sent again (R10).
    ResyncPendingFlush = "resync_pending_flush",
    /// A flush that both sides were to make durable lost the link (R9).
    FlushLostTheLink = "flush_lost_the_link",
    /// A snapshot was asked for while writes were under way.
    SnapshotCutInFlight = "snapshot_cut_in_flight",
    /// A snapshot was read after a crash of the backup.
    SnapshotSurvivedCrash = "snapshot_survived_crash",
    /// A snapshot broke because its old bytes found no room, and the writes went on (law 6).
    SnapshotBrokenByFullStore = "snapshot_broken_by_full_store",
    /// The backup's power went out while old bytes were being kept (R13).
    CrashDuringPreservation = "crash_during_preservation",
    /// A crash of the backup took writes that it had applied and not flushed (R12).
    BackupLostUnflushedTail = "backup_lost_unflushed_tail",
    /// A disk of the backup failed, and it takes nothing any more (law 11).
    BackupStopped = "backup_stopped",
    /// A flush or commit of the primary failed, and it takes no writes any more (law 11).
    PrimaryPoisoned = "primary_poisoned",
    /// A write failed on the primary's disk alone.
    LocalWriteFailed = "local_write_failed",
    /// A block that could not be read here came from the backup.
    ReadHealed = "read_healed",
    /// A loss was declared while blocks were missing of the loss before.
    LossDuringRestore = "loss_during_restore",
    /// A loss of some blocks was declared while the others stayed.
    PartialLoss = "partial_loss",
    /// The primary's machine was lost with its map, and another took its place.
    MachineReplaced = "machine_replaced",
    /// A bundle from before the loss supplied what the backup vouched for (law 7).
    OldBundleVouched = "old_bundle_vouched",
    /// A bundle from before the loss was refused.
    OldBundleRefused = "old_bundle_refused",
    /// A damaged chunk of a bundle was found, and nothing of it written (law 9).
    DamagedChunkRefused = "damaged_chunk_refused",
}

/// How often each was reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Counts {
    counts: Vec<u64>,
}

impl Default for Counts {
    fn default() -> Self {
        Self { counts: vec![0; RareState::ALL.len()] }
    }
}

impl Counts {
    pub fn note(&mut self, state: RareState) {
        self.counts[state as usize] += 1;
    }

    pub fn add(&mut self, others: &Self) {
        for (count, other) in self.counts.iter_mut().zip(&others.counts) {
            *count += other;
        }
    }

    #[must_use]
    pub fn of(&self, state: RareState) -> u64 {
        self.counts[state as usize]
    }

    /// Each state's name with its count.
    pub fn iter(&self) -> impl Iterator<Item = (&'static str, u64)> + '_ {
        RareState::ALL.iter().map(|state| (state.name(), self.of(*state)))
    }

    /// The names of those that were never reached.
    #[must_use]
    pub fn missed(&self) -> Vec<&'static str> {
        self.iter().filter(|(_, count)| *count == 0).map(|(name, _)| name).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_state_has_a_name_of_its_own_and_a_count() {
        let mut counts = Counts::default();
        assert_eq!(counts.missed().len(), RareState::ALL.len());
        counts.note(RareState::LateAcknowledgement);
        let mut sum = counts.clone();
        sum.add(&counts);
        assert_eq!(sum.of(RareState::LateAcknowledgement), 2);
        assert_eq!(sum.missed().len(), RareState::ALL.len() - 1);
        let names: std::collections::BTreeSet<_> = sum.iter().map(|(name, _)| name).collect();
        assert_eq!(names.len(), RareState::ALL.len());
    }
}
