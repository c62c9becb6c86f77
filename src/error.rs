//! One error for the whole core: a small stable kind, what was being done to what, and the words.
//!
//! Guarantees: the message says what was expected and what was found; the errno of a failed
//! system call is kept. Python raises one exception class per kind (`python/errors.rs`).
//! Does not know: exit codes, languages, how it will be shown.

use std::fmt;
use std::path::{Path, PathBuf};

pub type Result<T> = std::result::Result<T, Error>;

/// What sort of failure; stable, callers may match on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// A value given by the caller is outside what is allowed.
    Usage,
    /// Bytes are not in a format (magic, version, feature bit, length) that is understood.
    Format,
    /// Bytes are in the right format but damaged: a checksum or digest does not match.
    Integrity,
    /// Another volume, geometry, generation or role than was expected.
    Identity,
    /// Encrypted, and nothing that was given opens it; or the reverse.
    Locked,
    /// A storage system call failed; `errno` says how.
    Device,
    /// The link is down, was lost, or the peer broke the protocol.
    Link,
    /// Another medium of a bundle is needed.
    NextMedium,
    /// In use by another process, or by another operation that excludes this one.
    Busy,
    /// A flush failed earlier: the object refuses writes (law 11).
    Poisoned,
    /// A deadline passed.
    Timeout,
    /// Interrupted on request; may be resumed.
    Interrupted,
}

/// An error with its context. Cheap to clone: one failed device operation may fail many requests.
#[derive(Clone)]
pub struct Error {
    inner: std::sync::Arc<Inner>,
}

#[derive(Clone)]
struct Inner {
    kind: ErrorKind,
    message: String,
    operation: Option<&'static str>,
    path: Option<PathBuf>,
    offset: Option<u64>,
    errno: Option<i32>,
}

impl Error {
    #[must_use]
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self {
            inner: std::sync::Arc::new(Inner {
                kind,
                message: message.into(),
                operation: None,
                path: None,
                offset: None,
                errno: None,
            }),
        }
    }

    /// A failed system call, e.g. `Error::device("read", &io_error)`.
    #[must_use]
    pub fn device(operation: &'static str, source: &std::io::Error) -> Self {
        let errno = source.raw_os_error();
        let words = match errno.and_then(advice) {
            Some(advice) => format!("{source}: {advice}"),
            None => source.to_string(),
        };
        let mut error = Self::new(ErrorKind::Device, words);
        let inner = error.inner_mut();
        inner.operation = Some(operation);
        inner.errno = errno.or(Some(5));
        error
    }

    #[must_use]
    pub fn usage(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Usage, message)
    }

    #[must_use]
    pub fn format(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Format, message)
    }

    #[must_use]
    pub fn integrity(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Integrity, message)
    }

    #[must_use]
    pub fn identity(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Identity, message)
    }

    #[must_use]
    pub fn link(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Link, message)
    }

    #[must_use]
    pub fn busy(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Busy, message)
    }

    fn inner_mut(&mut self) -> &mut Inner {
        std::sync::Arc::make_mut(&mut self.inner)
    }

    #[must_use]
    pub fn at_path(mut self, path: &Path) -> Self {
        self.inner_mut().path = Some(path.to_path_buf());
        self
    }

    /// With the place that it happened in, where it names none of its own.
    #[must_use]
    pub fn within(self, place: &Path) -> Self {
        if self.inner.path.is_some() { self } else { self.at_path(place) }
    }

    #[must_use]
    pub fn at_offset(mut self, offset: u64) -> Self {
        self.inner_mut().offset = Some(offset);
        self
    }

    /// The errno that an application should see, where the words are ours.
    #[must_use]
    pub fn with_errno(mut self, errno: i32) -> Self {
        self.inner_mut().errno = Some(errno);
        self
    }

    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        self.inner.kind
    }

    /// The errno of the failed system call, if one failed.
    #[must_use]
    pub fn errno(&self) -> Option<i32> {
        self.inner.errno
    }

    /// Whether it says that there is no medium any more, and not only that a place of it is bad.
    #[must_use]
    pub fn says_gone(&self) -> bool {
        const ENOENT: i32 = 2;
        const ENXIO: i32 = 6;
        const ENODEV: i32 = 19;
        const ENOTDIR: i32 = 20;
        const ENOMEDIUM: i32 = 123;
        const ESTALE: i32 = 116;
        const ENOTCONN: i32 = 107;
        let gone = [ENOENT, ENXIO, ENODEV, ENOTDIR, ENOMEDIUM, ESTALE, ENOTCONN];
        self.kind() == ErrorKind::Device && self.errno().is_some_and(|errno| gone.contains(&errno))
    }

    #[must_use]
    pub fn path(&self) -> Option<&Path> {
        self.inner.path.as_deref()
    }

    #[must_use]
    pub fn offset(&self) -> Option<u64> {
        self.inner.offset
    }
}

/// What a person can do about a failed system call, where that is known. The numbers are those of
/// Linux, the same on every architecture we build for.
fn advice(errno: i32) -> Option<&'static str> {
    const EPERM: i32 = 1;
    const ENOENT: i32 = 2;
    const EACCES: i32 = 13;
    const ENFILE: i32 = 23;
    const EMFILE: i32 = 24;
    const ENOSPC: i32 = 28;
    const EROFS: i32 = 30;
    const EDQUOT: i32 = 122;
    match errno {
        ENOSPC | EDQUOT => Some("make room there, then try again"),
        EROFS => Some("make it writable (remount), or name another place"),
        EACCES | EPERM => Some("run as its owner, or change its permissions"),
        ENOENT => Some("check the path"),
        EMFILE | ENFILE => Some("raise the limit of open files"),
        _ => None,
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let inner = &self.inner;
        if let Some(path) = &inner.path {
            write!(f, "{}: ", path.display())?;
        }
        if let Some(operation) = inner.operation {
            write!(f, "{operation}: ")?;
        }
        f.write_str(&inner.message)?;
        if let Some(offset) = inner.offset {
            write!(f, " (at byte {offset})")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {self}", self.inner.kind)
    }
}

impl std::error::Error for Error {}
