"""Everything that can go wrong, as exceptions, and the exit code of each.

```
DualRestoreError
├── UsageError(ValueError)          a value is outside what is allowed                  2
│   └── ConfigurationError          the configuration file says something impossible    2
├── FormatError                     not our format, or a version or feature not known   5
├── IdentityError                   another volume, geometry, generation or role        5
├── IntegrityError                  our format, but damaged                             5
├── LockedError                     encrypted, and nothing that was given opens it      5
├── SignatureError                  not signed, or by nobody who is trusted             5
├── DeviceError(OSError)            a storage system call failed                        1
│   └── PoisonedError               a flush failed earlier: no more writes (law 11)     1
├── LinkError(ConnectionError)      link down, lost, or the peer broke the protocol     7
├── DeadlineError(TimeoutError)     a deadline passed; trying again is safe             7
├── NextMediumError                 the media are full: another one is needed           6
├── BusyError                       in use by another process or operation             11
└── InterruptedJobError             ended on request; may be resumed                  130
```

The core raises these classes too. A message says what was expected, what was found and what to
do. Does not know: how errors are shown.
"""

from enum import IntEnum
from typing import Any


class ExitCode(IntEnum):
    """Exit codes of the command line. Codes not listed here are failures."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    DAMAGED_CHUNKS = 3
    DIFFERENCES = 4
    NOT_OURS = 5
    NEXT_MEDIUM = 6
    LINK_DOWN = 7
    BUSY = 11
    INTERRUPTED = 130
    TERMINATED = 143


class DualRestoreError(Exception):
    """The parent of every error of this package."""

    exit_code: ExitCode = ExitCode.FAILED
    report: dict[str, Any] | None = None
    """Of a merge some of whose sources failed: what it did, the document of a `MergeReport`."""


class UsageError(DualRestoreError, ValueError):
    """A value given by the caller is outside what is allowed."""

    exit_code = ExitCode.USAGE


class ConfigurationError(UsageError):
    """The configuration file is missing, unreadable, or says something impossible."""


class FormatError(DualRestoreError):
    """Bytes are not in a format (magic, version, feature bit, length) that is understood."""

    exit_code = ExitCode.NOT_OURS


class IdentityError(DualRestoreError):
    """Another volume, geometry, generation or role than was expected."""

    exit_code = ExitCode.NOT_OURS


class IntegrityError(DualRestoreError):
    """Bytes are in the right format but damaged: a checksum or digest does not match."""

    exit_code = ExitCode.NOT_OURS


class LockedError(DualRestoreError):
    """Encrypted, and no key was given or another one (a wrong passphrase or identity); or a key was
    given and the bundle is not encrypted, so that it may have been exchanged.
    """

    exit_code = ExitCode.NOT_OURS


class SignatureError(DualRestoreError):
    """Not signed, by nobody who is trusted, or changed since."""

    exit_code = ExitCode.NOT_OURS


class DeviceError(DualRestoreError, OSError):
    """A storage system call failed; `errno` says how, the text says where."""

    def __str__(self) -> str:
        return str(self.args[-1]) if self.args else ""


class PoisonedError(DeviceError):
    """A flush failed earlier: the object refuses writes until it is opened again (law 11)."""


class LinkError(DualRestoreError, ConnectionError):
    """The link or the daemon cannot be reached, was lost, or the peer broke the protocol."""

    exit_code = ExitCode.LINK_DOWN

    def __str__(self) -> str:
        return str(self.args[-1]) if self.args else ""


class DeadlineError(DualRestoreError, TimeoutError):
    """A deadline passed; trying again is safe."""

    exit_code = ExitCode.LINK_DOWN

    def __str__(self) -> str:
        return str(self.args[-1]) if self.args else ""


class NextMediumError(DualRestoreError):
    """The media that were given are full; the bundle may be gone on with on another one."""

    exit_code = ExitCode.NEXT_MEDIUM


class BusyError(DualRestoreError):
    """In use by another process, or by another operation that excludes this one."""

    exit_code = ExitCode.BUSY


class InterruptedJobError(DualRestoreError):
    """The job was ended on request; it may be resumed."""

    exit_code = ExitCode.INTERRUPTED


_BY_NAME: dict[str, type[DualRestoreError]] = {
    error.__name__: error
    for error in (
        DualRestoreError,
        UsageError,
        ConfigurationError,
        FormatError,
        IdentityError,
        IntegrityError,
        LockedError,
        SignatureError,
        DeviceError,
        PoisonedError,
        LinkError,
        DeadlineError,
        NextMediumError,
        BusyError,
        InterruptedJobError,
    )
}


def error_document(problem: BaseException) -> dict[str, Any]:
    """An error as `{kind, message, errno, report}`, the last two if it has them: what another
    process needs to raise it.
    """
    if not isinstance(problem, DualRestoreError):
        text = f"unexpected {type(problem).__name__}: {problem}; the daemon's log has more"
        return {"kind": "DualRestoreError", "message": text}
    told: dict[str, Any] = {"kind": type(problem).__name__, "message": str(problem)}
    if isinstance(problem, OSError) and problem.errno is not None:
        told["errno"] = problem.errno
    if problem.report is not None:
        told["report"] = problem.report
    return told


def error_by_name(name: str, message: str, errno: int | None = None) -> DualRestoreError:
    """The error that another process told by its class name; an unknown name is a plain failure."""
    kind = _BY_NAME.get(name, DualRestoreError)
    if issubclass(kind, DeviceError):
        return kind(errno or 5, message)
    return kind(message)


def error_from(document: dict[str, Any]) -> DualRestoreError:
    """The error that `error_document` told of."""
    problem = error_by_name(document["kind"], document["message"], document.get("errno"))
    problem.report = document.get("report")
    return problem


def exit_code_of(error: BaseException) -> ExitCode:
    """The exit code that an error means for the process that it ends."""
    if isinstance(error, DualRestoreError):
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return ExitCode.INTERRUPTED
    return ExitCode.FAILED
