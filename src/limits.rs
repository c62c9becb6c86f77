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
/// Bytes of a whole handshake; several times what the longest sensible one takes.
pub const NBD_HANDSHAKE_BYTES_MAX: u64 = 64 << 10;
/// Longest name an export can be given (the longest name of a file; clients cope with it).
pub const NBD_EXPORT_NAME_BYTES_MAX: usize = 255;
/// Longest description of an export.
pub const NBD_DESCRIPTION_BYTES_MAX: usize = 1024;
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

/// Threads that do device operations, for all volumes of the process together.
pub const DEVICE_THREADS: usize = 8;
