//! Every limit of the core in one place, each with its reason.

/// Largest volume: 2^63 - 512 bytes, so that every offset and end fits a signed 64-bit `off_t`.
pub const VOLUME_BYTES_MAX: u64 = (1 << 63) - 512;

/// Largest payload of one NBD read or write that is advertised, as the maximum block size: the NBD
/// specification's own default for clients that do not ask.
pub const NBD_BLOCK_BYTES_MAX: u32 = 32 << 20;
/// Largest that is taken: clients that ask for no block sizes send more (nbd-tester-client does).
pub const NBD_REQUEST_BYTES_MAX: u32 = 64 << 20;

/// Longest export name and longest option payload accepted while parsing a handshake.
pub const NBD_NAME_BYTES_MAX: u32 = 4096;
pub const NBD_OPTION_BYTES_MAX: u32 = 8192;
/// Options one client may send before it must have chosen an export.
pub const NBD_OPTIONS_MAX: u32 = 64;
/// Requests of one connection that are being worked on at a time; further ones wait in the socket.
pub const NBD_IN_FLIGHT_MAX: usize = 128;
/// Bytes of payload of one connection that are held at a time.
pub const NBD_IN_FLIGHT_BYTES_MAX: usize = 64 << 20;
/// Extents in one block-status reply; a client asks again from where it ended.
pub const NBD_STATUS_EXTENTS_MAX: usize = 4096;
/// A handshake that is not finished by then is ended (the default of QEMU).
pub const NBD_HANDSHAKE_MS: u64 = 10_000;
/// Connections of one listener at a time.
pub const NBD_CONNECTIONS_MAX: usize = 100;
/// Bytes of a whole handshake; several times what the longest sensible one takes.
pub const NBD_HANDSHAKE_BYTES_MAX: u64 = 64 << 10;
/// Longest name an export can be given (the longest name of a file; clients cope with it).
pub const NBD_EXPORT_NAME_BYTES_MAX: usize = 255;
/// Longest description of an export.
pub const NBD_DESCRIPTION_BYTES_MAX: usize = 1024;
/// Longest name of a certificate that an export is for.
pub const NBD_ALLOWED_BYTES_MAX: usize = 255;
/// Exports of one table; a `LIST` answers with all of them.
pub const NBD_EXPORTS_MAX: usize = 4096;
/// Longest payload of a refused write that is read and thrown away to keep the stream in step; a
/// longer one ends the connection.
pub const NBD_DRAIN_BYTES_MAX: u32 = 64 << 20;
/// What is read from a socket at once: a queue of 32 writes of 4 KiB fits.
pub const NBD_INCOMING_BYTES: usize = 256 << 10;
/// Replies held for a client that reads slowly, before its requests wait: small enough to stay in
/// the cache between the copy in and the copy to the socket.
pub const NBD_OUTGOING_BYTES: usize = 512 << 10;
/// All connections of a server have ended this long after `shutdown`.
pub const NBD_SHUTDOWN_MS: u64 = 5_000;
/// How much of that is left to requests in flight.
pub const NBD_SHUTDOWN_GRACE_MS: u64 = 3_000;

/// As a client: answers to one option, chunks of one reply (a sector each), bytes of block status
/// and of an error in one chunk, what of an export one block status is asked of, and the longest
/// silence of a server that owes a reply.
pub const NBD_REPLIES_MAX: u32 = 64;
pub const NBD_CHUNKS_MAX: u32 = 64 << 10;
pub const NBD_STATUS_BYTES_MAX: usize = 4 + (64 << 10) * 8;
pub const NBD_ERROR_BYTES_MAX: usize = 14 + 4096;
pub const NBD_STATUS_RANGE_BYTES: u64 = 1 << 30;
pub const NBD_SILENCE_MS: u64 = 60_000;

/// Largest payload of a link frame: the largest block.
pub const LINK_PAYLOAD_BYTES_MAX: u32 = 1 << 20;
/// What is sent in one frame where blocks are not larger. Small, so that nothing waits long behind
/// one: 128 KiB take 5 ms at 200 Mbit/s.
pub const LINK_PIECE_BYTES: u64 = 128 << 10;
/// Bytes of mirrored writes sent and not yet applied by the backup; further writes wait.
pub const MIRROR_WINDOW_BYTES: u64 = 16 << 20;
/// How far the backup may lag under the policy `async` unless the configuration says otherwise: a
/// minute's worth of a 10 Mbit/s link, and what an operator calls a few seconds.
pub const ASYNC_BYTES: u64 = 64 << 20;
pub const ASYNC_MS: u64 = 5_000;
/// Demand fetches on the wire at a time; further ones wait.
pub const FETCH_IN_FLIGHT_MAX: usize = 256;
/// Resync pushes and hydration fetches on the wire at a time.
pub const BULK_IN_FLIGHT_MAX: usize = 32;
/// Comparisons of unsent blocks with the backup under way at a time, those of them that read here,
/// and the smallest part that is compared by itself: a digest and its answer take 112 bytes.
pub const COMPARISONS_MAX: usize = 64;
pub const COMPARISON_READS_MAX: usize = 2;
pub const COMPARISON_PART_BYTES: u64 = 4 << 10;
/// Runs that are known to differ and wait to be sent; while there are more, nothing is compared.
pub const DIFFERENT_RUNS_MAX: usize = 256;
/// Silence on a link connection after which it is dead, and how often we speak (a dead peer is
/// noticed within 10 s).
pub const LINK_SILENCE_MS: u64 = 8_000;
pub const LINK_HEARTBEAT_MS: u64 = 2_000;
/// A link handshake that is not finished by then is ended.
pub const LINK_HANDSHAKE_MS: u64 = 10_000;
/// Longest name of a volume in a Hello, in bytes of UTF-8.
pub const LINK_NAME_BYTES_MAX: usize = 255;
/// Longest text of a refusal, failure or goodbye. With it, every answer is shorter than
/// `LINK_ANSWER_BYTES`.
pub const LINK_TEXT_BYTES_MAX: usize = 400;
/// What an unanswered request counts beside its payload: room for its answer.
pub const LINK_ANSWER_BYTES: u64 = 512;
/// Bytes of requests of one connection (payloads sent or asked for, and `LINK_ANSWER_BYTES` each)
/// without an answer: the mirror's window and one whole NBD request, with room for small ones. It
/// bounds what a peer can make us hold.
pub const LINK_UNANSWERED_BYTES_MAX: u64 = 64 << 20;
/// Fetches and digests of one connection without an answer: four times what we ask ourselves.
pub const LINK_REQUESTS_MAX: usize = 1024;
/// Bytes queued on one connection and not yet taken by the transport. More than all answers to
/// `LINK_UNANSWERED_BYTES_MAX`, so only a fault of ours reaches it.
pub const LINK_OUTGOING_BYTES_MAX: usize = 80 << 20;
/// Longest range of one digest: a disk reads it in some ten milliseconds.
pub const LINK_DIGEST_BYTES_MAX: u32 = 16 << 20;
/// Runs or bits in one answer of which blocks changed since a cut: it takes no longer than a piece.
pub const LINK_CHANGES_BYTES_MAX: usize = 64 << 10;
/// Ranges that one cut may select: they fit one frame.
pub const LINK_CUT_RANGES_MAX: usize = 4096;
/// A busy link that takes fewer bytes a second gets blocks compressed: a processor compresses about
/// three times as many, and more is 500 Mbit/s.
pub const LINK_PACK_BELOW: u64 = 64_000_000;
/// First and longest delay before connecting again.
pub const LINK_RECONNECT_MS_MIN: u64 = 100;
pub const LINK_RECONNECT_MS_MAX: u64 = 10_000;

/// Bytes of one hot extent of the write-intent log.
pub const HOT_EXTENT_BYTES: u64 = 1 << 20;
/// Hot extents at a time: what one 4 KiB page of the log holds. Bounds the resend after a crash of
/// the primary to about 1 GiB.
pub const HOT_EXTENTS_MAX: usize = 1000;

/// Pages written by one map commit; the rest waits for the next (bounds the memory of a commit).
pub const COMMIT_PAGES_MAX: usize = 8192;
/// A map commit begins this long after the first bit that it would make durable was set.
pub const COMMIT_INTERVAL_MS: u64 = 1_000;

/// Snapshots of one backup volume at a time.
pub const SNAPSHOTS_MAX: usize = 64;
/// Cuts of one backup volume that are remembered, with or without their snapshot, so that a bundle
/// from an earlier cut can be vouched for; the oldest are forgotten first.
pub const CUTS_KEPT_MAX: usize = 128;
/// Longest label of a snapshot.
pub const LABEL_BYTES_MAX: usize = 255;
/// Ranges in the selection of one snapshot.
pub const SELECTION_RANGES_MAX: usize = 4096;
/// Largest catalogue of a backup volume: its cuts with their selections in text, and as much again.
pub const CATALOGUE_BYTES_MAX: u64 = 64 << 20;
/// Bytes copied at a time when blocks are preserved, moved or digested.
pub const COPY_BYTES: u64 = 1 << 20;
/// Threads that keep old bytes of one volume at a time: half of those for devices, so that the
/// other half serves demand reads meanwhile.
pub const PRESERVING_THREADS: usize = DEVICE_THREADS / 2;
/// Mirrored writes whose blocks are preserved as one group while the group before is applied: half
/// of the window, so that there is a next one.
pub const STRETCH_BYTES: u64 = 8 << 20;
/// One half of the journal of preservation: what a crash replays at most is two. An eighth of the
/// volume, within these bounds.
pub const JOURNAL_HALF_BYTES_MAX: u64 = 32 << 20;
pub const JOURNAL_HALF_BYTES_MIN: u64 = 32 << 10;
/// Old bytes of runs that are shorter on average go through the journal: longer ones cost less
/// when they are written once and flushed.
pub const JOURNAL_RUN_BYTES_MAX: u64 = 64 << 10;
/// Bytes moved to an older snapshot between two chances for mirrored writes to go on.
pub const MOVE_STEP_BYTES: u64 = 8 << 20;
/// Bytes given back at a time where a bundle holds them and the store is full: writes wait for it.
pub const RELEASE_STEP_BYTES: u64 = 64 << 20;
/// Room that preservation leaves on its file system, so that maps can still grow (at most a
/// sixteenth of the file system).
pub const STORE_RESERVE_BYTES: u64 = 64 << 20;
/// Preservation warns when less than this part of its file system is free.
pub const STORE_LOW_PERCENT: u64 = 10;

/// Requests that one ring takes before it is handed to the kernel, and those under way at a time:
/// runs of 64 KiB in all the memory of a merge, several times over.
pub const RING_ENTRIES: u32 = 256;
pub const RING_UNDER_WAY_MAX: usize = 1024;

/// Threads that do device operations, for all volumes of the process together.
pub const DEVICE_THREADS: usize = 8;

/// Largest segment file of a bundle: under the 4 GiB of FAT, and the most that a crash of the
/// writer costs. The least still takes one chunk that does not shrink.
pub const BUNDLE_SEGMENT_BYTES_MAX: u64 = 1 << 30;
pub const BUNDLE_SEGMENT_BYTES_MIN: u64 = 2 << 20;
/// Segments of one bundle: 16 EiB of full ones.
pub const BUNDLE_SEGMENTS_MAX: u32 = 1 << 24;
/// Bytes of the entries of a partition table, and logical partitions of one disk.
pub const PARTITION_ARRAY_BYTES_MAX: u64 = 1 << 20;
pub const PARTITIONS_MAX: usize = 1024;
/// Segments that the source is told of only when their medium is finished: some may have to be
/// taken from it again to make room for its manifest.
pub const BUNDLE_SEGMENTS_HELD_BACK: usize = 2;
/// Media of one bundle: more than anybody carries.
pub const BUNDLE_MEDIA_MAX: u32 = 1 << 16;
/// Left free at the end of a medium whose file system says how much it takes: a part of it, within
/// bounds. File systems need room for their own records, and are never exact.
pub const MEDIUM_SLACK_PART: u64 = 512;
pub const MEDIUM_SLACK_BYTES_MIN: u64 = 1 << 20;
pub const MEDIUM_SLACK_BYTES_MAX: u64 = 64 << 20;
/// Bundles on their way over several media, or stopped, that a host remembers; the oldest are
/// forgotten first.
pub const BUNDLES_UNFINISHED_MAX: usize = 64;
/// Bytes of the volume in one stored chunk: the unit of verification and of a request.
pub const BUNDLE_CHUNK_BYTES_MAX: u64 = 1 << 20;
/// Payload and descriptor pages of one batch: what a writer holds before it knows the pages, and
/// what one damaged page costs. 64 pages describe 16 MiB of isolated 4 KiB blocks.
pub const BUNDLE_BATCH_BYTES_MAX: u32 = 16 << 20;
pub const BUNDLE_BATCH_PAGES_MAX: u16 = 64;
/// Zeros inside a chunk are told apart in runs of this many bytes (a sparse file's usual grain).
pub const BUNDLE_ZERO_GRAIN_BYTES: u64 = 64 << 10;
/// Runs in the selection of a bundle, and bytes of its manifest: what a reader parses in memory.
pub const BUNDLE_SELECTION_RUNS_MAX: usize = 1 << 20;
pub const BUNDLE_MANIFEST_BYTES_MAX: u64 = 128 << 20;
/// Largest `key.age` that is read: room for hundreds of recipients.
pub const BUNDLE_KEY_FILE_BYTES_MAX: u64 = 1 << 20;
/// Opening brackets in the text of a manifest, one for each run: counted before it is parsed, for a
/// run takes three times the memory that it takes as text. Selection, coverage, and some.
pub const BUNDLE_MANIFEST_LISTS_MAX: usize = 3 << 20;
/// Bytes of a name in a manifest, and names of features.
pub const BUNDLE_NAME_BYTES_MAX: usize = 255;
pub const BUNDLE_FEATURES_MAX: usize = 64;
/// Chunks read ahead of the threads that encode them; 2 MiB of memory each.
pub const BUNDLE_CHUNKS_AHEAD: usize = 16;
/// Jobs of a merge or a verification under way at a time, of 2 MiB of memory each; threads that
/// wait for a disk; parts of one job (runs of a scattered map).
pub const JOBS_UNDER_WAY: usize = 16;
/// The same of all sources that are merged side by side: 64 MiB. Sources that are read at a time:
/// more disks than a machine has slots for, each with jobs enough to be kept busy.
pub const JOBS_TOGETHER: usize = 32;
pub const MERGE_LANES_MAX: usize = 8;
/// Sources of one merge: the media of a bundle on a shelf.
pub const MERGE_SOURCES_MAX: usize = 256;
pub const JOB_THREADS: usize = 8;
pub const JOB_PARTS_MAX: usize = 128;
/// Bytes of an image in a job that only copies from memory to memory: they fit the cache of one
/// processor.
pub const JOB_CACHED_BYTES: usize = 256 << 10;
/// Jobs that have ended and whose news waits for the caller, who may be waiting for a flush.
pub const JOB_NEWS_MAX: usize = 1024;
/// Threads that encode or verify chunks, however many processors there are: eight of them hash
/// faster than any medium reads.
pub const BUNDLE_THREADS_MAX: usize = 8;
/// Longest run of zeros, or of lost bytes, handed on at a time, so that progress and stopping stay
/// fine-grained.
pub const BUNDLE_ZERO_STEP_BYTES: u64 = 64 << 20;

/// Largest segment in the tar form: one is held whole until its header, which states its length, is
/// out.
pub const TAR_SEGMENT_BYTES_MAX: u64 = 64 << 20;
/// Largest member of a tar that is written: the largest manifest.
pub const TAR_MEMBER_BYTES_MAX: u64 = BUNDLE_MANIFEST_BYTES_MAX;
/// Headers of a tar that is read: 16 TiB in segments of 64 MiB, three headers each, and as much
/// again.
pub const TAR_MEMBERS_MAX: u64 = 1 << 20;
/// Largest extended header or long name of a tar: ours have 3 KiB, those with many attributes more.
pub const TAR_EXTENDED_BYTES_MAX: u64 = 1 << 20;
/// Padding after the end of an archive that is read so that its writer can end in peace.
pub const TAR_TRAILING_BYTES_MAX: u64 = 1 << 20;

/// Tables of a qcow2 image: the largest that QEMU opens. They map 2 PiB, and count as
/// much of the file.
pub const QCOW2_L1_BYTES_MAX: u64 = 32 << 20;
pub const QCOW2_REFCOUNT_TABLE_BYTES_MAX: u64 = 8 << 20;
/// Small pieces of an image that is written as a stream are sent together, so many bytes at least.
pub const IMAGE_STREAM_BYTES: usize = 256 << 10;
/// Bytes that Python may ask of a bundle at a time: they are all in memory.
pub const BUNDLE_READ_BYTES_MAX: u64 = 1 << 30;

/// Of an attached medium: indexes and descriptors kept in memory (those of a hundred full segments
/// and of all that is read now), and verified chunks (what a few sequential readers are at).
pub const MEDIUM_INDEX_BYTES: usize = 16 << 20;
pub const MEDIUM_CHUNK_BYTES: usize = 16 << 20;
/// Threads that read one attached medium, and reads of it at a time; further ones wait.
pub const MEDIUM_THREADS: usize = 4;
pub const MEDIUM_IN_FLIGHT_MAX: usize = 16;
/// A read of a medium that is not answered by then goes over the link, and the medium counts as
/// gone. A disk that had to spin up first is quicker.
pub const MEDIUM_STALL_MS: u64 = 15_000;
/// Reads in a row that fail before a medium counts as gone.
pub const MEDIUM_FAILURES_MAX: u32 = 3;
/// Damaged stretches of one attached medium that are remembered; with more of them it is no use.
pub const MEDIUM_DAMAGED_MAX: usize = 4096;
/// Media attached to one volume at a time.
pub const MEDIA_MAX: usize = 64;

/// What a merge filled becomes durable after so many bytes or milliseconds: what a crash redoes.
pub const MERGE_COMMIT_BYTES: u64 = 256 << 20;
pub const MERGE_COMMIT_MS: u64 = 2_000;
/// Chunks in a row that the medium fails to read before it counts as gone.
pub const MERGE_READ_FAILURES_MAX: u32 = 8;
/// Blocks at a time that are put together from pieces smaller than the block.
pub const MERGE_SEAMS_MAX: usize = 16;
/// Runs that a report lists one by one; further ones are only counted.
pub const REPORT_RUNS_MAX: usize = 10_000;
/// Callers of long operations hear of progress, and may stop them, about this often.
pub const PROGRESS_INTERVAL_MS: u64 = 100;
