"""The control API: HTTP and JSON over a Unix socket, with a read-only page and metrics.

| method, path | body | answer |
|---|---|---|
| GET `/v1/status` | | `NodeStatus` |
| GET `/v1/volumes/NAME` | | status of a volume |
| POST `/v1/volumes/NAME/restore` | `Restore` | `RestoreReport` |
| POST `/v1/volumes/NAME/hydrate` | `Hydrate` | `{}` |
| POST `/v1/volumes/NAME/snapshot` | `Snapshot` | `SnapshotReport` |
| GET `/v1/volumes/NAME/snapshots` | | `[SnapshotReport, ..]` |
| DELETE `/v1/volumes/NAME/snapshots/ID` | | `{}` |
| POST `/v1/volumes/NAME/merge` | `Merge` | lines |
| POST `/v1/volumes/NAME/attach` | `Attach` | `AttachReport` |
| POST `/v1/volumes/NAME/detach` | `Detach` | `AttachReport` |
| POST `/v1/volumes/NAME/verify` | `Verify` | lines |
| POST `/v1/volumes/NAME/bundle` | `MakeBundle` | lines |
| GET `/v1/volumes/NAME/map/PLANE` | | `[[offset, length], ..]` |
| GET `/v1/volumes/NAME/picture?cells=N` | | `[bytes, ..]` |
| GET `/`, `/page.js`, `/page.css`, `/events` | | the status page; as `warning` what is new |
| GET `/metrics` | | Prometheus |

*Lines* are JSON documents, one a line: any number of `{"progress": {..}}`, at the end `{"report":
{..}}` or `{"error": {"kind", "message", "errno", "report"}}`, the report of a merge of several
sources that some of them failed. A client that goes away ends its job, which may be asked for
again. Errors of the other calls: `{"error": ..}` with status 400, 404, 409 or 500.

Guarantees: bodies are limited and unknown keys refused. Whoever can open the socket may do
everything; its file mode is the protection. Does not know: how volumes work.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from dualrestore.core import BundleKey, Trust
from dualrestore.errors import (
    BusyError,
    DualRestoreError,
    FormatError,
    IdentityError,
    LockedError,
    UsageError,
    error_document,
)
from dualrestore.jobs.attach import attach, detach
from dualrestore.jobs.bundle import BundleOptions, create_bundle
from dualrestore.jobs.merge import Source, merge_live
from dualrestore.jobs.restore import restore
from dualrestore.jobs.snapshot import (
    SnapshotOptions,
    snapshot_at_backup,
    snapshot_through_primary,
)
from dualrestore.jobs.verify import verify_volume
from dualrestore.model import Record, SnapshotReport, Stream, read
from dualrestore.servers.alarms import warnings_in
from dualrestore.servers.ledger import Job, Ledger, Work
from dualrestore.servers.metrics import CONTENT_TYPE, metrics_text
from dualrestore.servers.node import Node
from dualrestore.servers.page import PAGE_CSS, PAGE_HTML, PAGE_JS
from dualrestore.transport.handing import HandedStream, Reception
from dualrestore.transport.nbd_uri import is_nbd_uri, parse_nbd_uri

log = logging.getLogger("dualrestore")

BODY_BYTES_MAX = 4 * 2**20
CELLS_MAX = 65536
LINE_SECONDS = 1.0
"""A quiet job still says something this often, so that a dead client is noticed."""
EVENT_SECONDS = 1.0

_PAGE_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}


Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
Range = tuple[Count, Count]
"""(offset, length)"""
Seconds = Annotated[float, msgspec.Meta(ge=0, le=86_400)]


class _Body(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What a client may say."""


class Restore(_Body):
    """`lost`: `all`, `none`, or ranges as (offset, length)."""

    lost: Literal["all", "none"] | list[Range]
    wire: bool = False


class Hydrate(_Body):
    """Whether missing blocks are fetched in the background."""

    enabled: bool


class Snapshot(_Body):
    """See `jobs.snapshot.SnapshotOptions`."""

    label: str = ""
    selection: list[Range] | None = None
    backup: Count = 0
    timeout_seconds: Seconds = 60.0


class Trusted(_Body):
    """`key`: the line that `key.age` wraps; `manifest`: SHA-256 of the signed one, hexadecimal;
    `ask`: whoever handed the stream over opens its `key.age`.
    """

    key: str | None = None
    manifest: str | None = None
    ask: bool = False

    def trust(self, handed: HandedStream | None = None) -> Trust:
        """As the core takes it."""
        if self.ask and handed is not None:
            return Trust(unlock=lambda wrapped: BundleKey.parse(handed.unlock(wrapped)))
        try:
            manifest = None if self.manifest is None else bytes.fromhex(self.manifest)
        except ValueError:
            raise UsageError("expected a SHA-256 in hexadecimal digits") from None
        key = None if self.key is None else BundleKey.parse(self.key.encode())
        return Trust(key, manifest)


class Encrypted(_Body):
    """`key`: the line that `wrapped_key`, in base64, wraps."""

    key: str
    wrapped_key: bytes


class HandedOver(_Body):
    """The token of a stream that the client handed over (`transport.handing`)."""

    stream: str


class Merge(_Body):
    """Paths on the daemon's host, NBD URIs as seen from there, or streams, and what each is held
    to.
    """

    sources: list[str | HandedOver]
    trusts: list[Trusted | None] | None = None


class Attach(_Body):
    """Paths on the daemon's host, and the keys of encrypted ones."""

    bundles: list[str]
    trusts: list[Trusted | None] | None = None


class Detach(_Body):
    """A path as it was attached."""

    bundle: str


class Verify(_Body):
    """Which of the backups, and whether to send again what differs."""

    backup: Count = 0
    repair: bool = False


class MakeBundle(_Body):
    """`media`: paths on the daemon's host, in order. See `jobs.bundle.BundleOptions`."""

    snapshot: str
    media: list[str]
    selection: list[Range] | None = None
    compression: str = "none"
    encryption: Encrypted | None = None
    medium_size: Count | None = None
    partitions: list[Count] = []
    allocated: bool = False
    since: str | None = None
    proceed: bool = False
    force: bool = False
    release: Literal["auto", "always", "never"] = "auto"


BodyType = TypeVar("BodyType", bound=_Body)
Endpoint = Callable[[Request], Awaitable[Response]]


def _json(document: object, status: int = 200) -> Response:
    return Response(msgspec.json.encode(document), status, media_type="application/json")


def _status_of(problem: DualRestoreError) -> int:
    if isinstance(problem, UsageError):
        return 400
    if isinstance(problem, BusyError | IdentityError | FormatError | LockedError):
        return 409
    return 500


async def _body(request: Request, kind: type[BodyType]) -> BodyType:
    received = bytearray()
    async for piece in request.stream():
        received += piece
        if len(received) > BODY_BYTES_MAX:
            raise UsageError(f"expected a request of at most {BODY_BYTES_MAX} bytes")
    try:
        return msgspec.json.decode(bytes(received), type=kind)
    except (msgspec.ValidationError, msgspec.DecodeError) as problem:
        raise UsageError(f"expected a {kind.__name__} request, found: {problem}") from problem


def _trusts(
    given: list[Trusted | None] | None, handed: Sequence[HandedStream | None]
) -> list[Trust | None]:
    """`handed`: for each bundle, the stream that it is."""
    count = len(handed)
    if given is not None and len(given) != count:
        raise UsageError(f"expected {count} trusts, one for each bundle, found {len(given)}")
    pairs = zip(given or [None] * count, handed, strict=True)
    return [None if trust is None else trust.trust(stream) for trust, stream in pairs]


def _path(text: str) -> Path:
    if not text.startswith("/") or "\0" in text:
        raise UsageError(f"expected an absolute path, found {text!r}")
    return Path(text)


def _source(source: str | HandedOver, stream: HandedStream | None) -> Source:
    if isinstance(source, str):
        return parse_nbd_uri(source) if is_nbd_uri(source) else _path(source)
    assert stream is not None, "it was claimed"
    return Stream(stream.descriptor, "standard input")


def _paths(texts: list[str]) -> list[Path]:
    if not texts:
        raise UsageError("expected at least one path, found none")
    return [_path(text) for text in texts]


def _guarded(endpoint: Endpoint) -> Endpoint:
    async def answer(request: Request) -> Response:
        try:
            return await endpoint(request)
        except DualRestoreError as problem:
            return _json({"error": error_document(problem)}, _status_of(problem))
        except Exception as problem:
            log.exception("%s %s: unexpected", request.method, request.url.path)
            return _json({"error": error_document(problem)}, 500)

    return answer


class Control:
    """The endpoints, over one node and one ledger."""

    def __init__(self, node: Node, ledger: Ledger, reception: Reception) -> None:
        self._node = node
        self._ledger = ledger
        self._reception = reception
        self.stopping = asyncio.Event()

    def document(self) -> dict[str, Any]:
        """As `model.NodeStatus`. Waits for locks of volumes: not for the event loop."""
        jobs = [status.document() for status in self._ledger.statuses()]
        return {**self._node.status(), "jobs": jobs}

    async def status(self, _: Request) -> Response:
        return _json(await asyncio.to_thread(self.document))

    async def volume(self, request: Request) -> Response:
        name = request.path_params["name"]
        document = await asyncio.to_thread(self.document)
        for volume in document["volumes"]:
            if volume["name"] == name:
                return _json(volume)
        known = ", ".join(one["name"] for one in document["volumes"]) or "none"
        raise UsageError(f"expected a volume of this daemon ({known}), found {name!r}")

    async def restore(self, request: Request) -> Response:
        body = await _body(request, Restore)
        name = request.path_params["name"]
        volume = self._node.primary(name)
        # A waiting volume may have to hear from its backup first, a restored one has new words.
        await asyncio.to_thread(self._node.hurry, volume)
        report = await asyncio.to_thread(restore, volume, body.lost)
        await asyncio.to_thread(self._node.hydrate, name, enabled=body.wire)
        await asyncio.to_thread(self._node.hurry, volume)
        return _json(report)

    async def hydrate(self, request: Request) -> Response:
        body = await _body(request, Hydrate)
        name = request.path_params["name"]
        await asyncio.to_thread(self._node.hydrate, name, enabled=body.enabled)
        return _json({})

    async def snapshot(self, request: Request) -> Response:
        body = await _body(request, Snapshot)
        name = request.path_params["name"]
        options = SnapshotOptions(body.label, body.selection, body.backup, body.timeout_seconds)
        report: SnapshotReport
        if name in self._node.primaries:
            with self._node.explaining_link(name):
                report = await asyncio.to_thread(
                    snapshot_through_primary, self._node.primary(name), options
                )
        else:
            report = await asyncio.to_thread(snapshot_at_backup, self._node.backup(name), options)
        return _json(report)

    async def snapshots(self, request: Request) -> Response:
        volume = self._node.backup(request.path_params["name"])
        found = await asyncio.to_thread(volume.snapshots)
        return _json([read(SnapshotReport, document) for document in found])

    async def delete_snapshot(self, request: Request) -> Response:
        name = request.path_params["name"]
        await asyncio.to_thread(self._node.delete_snapshot, name, request.path_params["snapshot"])
        return _json({})

    async def merge(self, request: Request) -> Response:
        body = await _body(request, Merge)
        name = request.path_params["name"]
        volume = self._node.primary(name)
        if not body.sources:
            raise UsageError("expected at least one source, found none")
        held, tls = contextlib.ExitStack(), self._node.client_tls

        def work(report: Callable[[dict[str, int]], None]) -> Record:
            with held:
                return merge_live(sources, volume, report, trusts=trusts, tls=tls)

        try:
            handed = [self._claimed(one, held) for one in body.sources]
            trusts = _trusts(body.trusts, handed)
            sources = [
                _source(one, stream) for one, stream in zip(body.sources, handed, strict=True)
            ]
            return self._lines("merge", name, work)
        except BaseException:
            held.close()
            raise

    def _claimed(self, source: str | HandedOver, held: contextlib.ExitStack) -> HandedStream | None:
        if isinstance(source, str):
            return None
        stream = self._reception.claim(source.stream)
        held.callback(stream.close)
        return stream

    async def attach(self, request: Request) -> Response:
        body = await _body(request, Attach)
        volume = self._node.primary(request.path_params["name"])
        bundles = _paths(body.bundles)
        trusts = _trusts(body.trusts, [None] * len(bundles))
        keys = [None if trust is None else trust.key for trust in trusts]
        return _json(await asyncio.to_thread(attach, bundles, volume, keys))

    async def detach(self, request: Request) -> Response:
        body = await _body(request, Detach)
        volume = self._node.primary(request.path_params["name"])
        [bundle] = _paths([body.bundle])
        return _json(await asyncio.to_thread(detach, bundle, volume))

    async def verify(self, request: Request) -> Response:
        body = await _body(request, Verify)
        name = request.path_params["name"]
        volume = self._node.primary(name)

        def work(report: Callable[[dict[str, int]], None]) -> Record:
            with self._node.explaining_link(name):
                return verify_volume(
                    volume, backup=body.backup, repair=body.repair, progress=report
                )

        return self._lines("verify", name, work)

    async def bundle(self, request: Request) -> Response:
        body = await _body(request, MakeBundle)
        name = request.path_params["name"]
        volume = self._node.backup(name)
        media = _paths(body.media)
        encryption = None
        if body.encryption is not None:
            key = BundleKey.parse(body.encryption.key.encode())
            encryption = (key, body.encryption.wrapped_key)
        options = BundleOptions(
            body.selection,
            body.compression,
            medium_size=body.medium_size,
            partitions=body.partitions,
            allocated=body.allocated,
            since=body.since,
            proceed=body.proceed,
            state=self._node.configuration.node.state / name / "bundles",
            encryption=encryption,
            force=body.force,
        )

        def work(report: Callable[[dict[str, int]], None]) -> Record:
            source = volume.source(body.snapshot, release=body.release)
            return create_bundle(source, media, options, report)

        return self._lines("bundle", name, work)

    async def extents(self, request: Request) -> Response:
        volume = self._node.primary(request.path_params["name"])
        plane = request.path_params["plane"]
        if plane not in {"current", "missing", "unsent", "link_only"}:
            raise UsageError(f"expected current, missing, unsent or link_only, found {plane!r}")
        return _json(await asyncio.to_thread(volume.map_extents, plane))

    async def picture(self, request: Request) -> Response:
        volume = self._node.primary(request.path_params["name"])
        cells = request.query_params.get("cells", "256")
        if not (cells.isascii() and cells.isdigit() and 0 < int(cells) <= CELLS_MAX):
            raise UsageError(f"cells: expected a number from 1 to {CELLS_MAX}, found {cells!r}")
        return _json(await asyncio.to_thread(volume.picture, int(cells)))

    def _lines(self, verb: str, volume: str, work: Work) -> Response:
        loop = asyncio.get_running_loop()
        changed = asyncio.Event()
        job = self._ledger.start(verb, volume, work)
        job.watch(lambda: _wake(loop, changed))
        return StreamingResponse(_job_lines(job, changed), media_type="application/x-ndjson")

    async def metrics(self, _: Request) -> Response:
        document = await asyncio.to_thread(self.document)
        return Response(metrics_text(document), headers={"content-type": CONTENT_TYPE})

    async def events(self, _: Request) -> Response:
        return StreamingResponse(
            self._events(), media_type="text/event-stream", headers=_PAGE_HEADERS
        )

    async def _events(self) -> AsyncIterator[bytes]:
        told: set[tuple[str, str]] = set()
        while not self.stopping.is_set():
            document = await asyncio.to_thread(self.document)
            yield b"data: " + msgspec.json.encode(document) + b"\n\n"
            held = warnings_in(document)
            for name, words in sorted(held - told):
                warning = msgspec.json.encode({"volume": name, "warning": words})
                yield b"event: warning\ndata: " + warning + b"\n\n"
            told = held
            try:
                async with asyncio.timeout(EVENT_SECONDS):
                    await self.stopping.wait()
            except TimeoutError:
                continue

    def application(self) -> Starlette:
        """All of it, as an ASGI application."""
        one = "/v1/volumes/{name}"
        routes = [
            ("GET", "/v1/status", self.status),
            ("GET", one, self.volume),
            ("POST", one + "/restore", self.restore),
            ("POST", one + "/hydrate", self.hydrate),
            ("POST", one + "/snapshot", self.snapshot),
            ("GET", one + "/snapshots", self.snapshots),
            ("DELETE", one + "/snapshots/{snapshot}", self.delete_snapshot),
            ("POST", one + "/merge", self.merge),
            ("POST", one + "/attach", self.attach),
            ("POST", one + "/detach", self.detach),
            ("POST", one + "/verify", self.verify),
            ("POST", one + "/bundle", self.bundle),
            ("GET", one + "/map/{plane}", self.extents),
            ("GET", one + "/picture", self.picture),
            ("GET", "/metrics", self.metrics),
            ("GET", "/events", self.events),
            ("GET", "/", _static(PAGE_HTML, "text/html")),
            ("GET", "/page.js", _static(PAGE_JS, "text/javascript")),
            ("GET", "/page.css", _static(PAGE_CSS, "text/css")),
        ]
        return Starlette(
            routes=[
                Route(path, _guarded(endpoint), methods=[method])
                for method, path, endpoint in routes
            ]
        )


def _static(text: str, kind: str) -> Endpoint:
    async def answer(_: Request) -> Response:
        return Response(text, media_type=kind, headers=_PAGE_HEADERS)

    return answer


def _wake(loop: asyncio.AbstractEventLoop, changed: asyncio.Event) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(changed.set)


async def _job_lines(job: Job, changed: asyncio.Event) -> AsyncIterator[bytes]:
    try:
        while job.state == "running":
            try:
                async with asyncio.timeout(LINE_SECONDS):
                    await changed.wait()
            except TimeoutError:
                pass
            changed.clear()
            if job.state == "running":
                yield msgspec.json.encode({"progress": job.progress}) + b"\n"
        last = {"report": job.report} if job.state == "done" else {"error": job.error}
        yield msgspec.json.encode(last) + b"\n"
    finally:
        job.cancel()
