//! Every limit of the core in one place, each with its reason.

/// Largest volume: 2^63 - 512 bytes, so that every offset and end fits a signed 64-bit `off_t`.
pub const VOLUME_BYTES_MAX: u64 = (1 << 63) - 512;

/// Largest payload of one NBD read or write, advertised as the maximum block size. The NBD
/// specification's own default for clients that do not ask.
pub const NBD_REQUEST_BYTES_MAX: u32 = 32 << 20;

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

/// Largest payload of a link frame. Small, so that a demand read never waits long behind one:
/// 128 KiB take 5 ms at 200 Mbit/s.
pub const LINK_PAYLOAD_BYTES_MAX: u32 = 128 << 10;
/// Bytes of mirrored writes sent and not yet applied by the backup; further writes wait.
pub const MIRROR_WINDOW_BYTES: u64 = 16 << 20;
/// Demand fetches on the wire at a time; further ones wait.
pub const FETCH_IN_FLIGHT_MAX: usize = 256;
/// Resync pushes and hydration fetches on the wire at a time.
pub const BULK_IN_FLIGHT_MAX: usize = 32;
/// Silence on a link connection after which it is dead, and how often we speak (a dead peer is
/// noticed within 10 s).
pub const LINK_SILENCE_MS: u64 = 8_000;
pub const LINK_HEARTBEAT_MS: u64 = 2_000;

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
/// Bytes moved to an older snapshot between two chances for mirrored writes to go on.
pub const MOVE_STEP_BYTES: u64 = 8 << 20;
/// Room that preservation leaves on its file system, so that maps can still grow (at most a
/// sixteenth of the file system).
pub const STORE_RESERVE_BYTES: u64 = 64 << 20;
/// Preservation warns when less than this part of its file system is free.
pub const STORE_LOW_PERCENT: u64 = 10;

/// Threads that do device operations, for all volumes of the process together.
pub const DEVICE_THREADS: usize = 8;
