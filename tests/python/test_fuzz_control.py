"""Whatever is sent to the control API is answered: done, or refused with an error in words. Begins
from `fuzz/corpus/control`; `DUALRESTORE_FUZZ_ROUNDS` sets how much is tried. With more time:
`fuzz/control SECONDS`, which has schemathesis read the schema of `control_schema`.
"""

import asyncio
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.applications import Starlette

from dualrestore import errors
from dualrestore.config import read_configuration
from dualrestore.servers.control import Control
from dualrestore.servers.ledger import Ledger
from dualrestore.servers.node import Node
from dualrestore.transport.handing import Reception, handing_path
from tests.python.control_schema import BODIES, openapi, operations
from tests.python.live_pair import wait_until

CORPUS = Path(__file__).parents[2] / "fuzz/corpus/control"
ROUNDS = int(os.environ.get("DUALRESTORE_FUZZ_ROUNDS") or 300)
SETTINGS = settings(
    max_examples=ROUNDS, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
SECONDS = 30.0


class Answer(NamedTuple):
    """Of one request."""

    status: int
    content: bytes


class Asked:
    """A node with a primary and its backup, asked without a socket."""

    def __init__(self, place: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        self.place = place
        self.node = Node(
            read_configuration(
                f'[node]\nstate = "{place}/state"\ncontrol = "{place}/c.sock"\n'
                f'listen = "127.0.0.1:{port}"\n'
                f'[volume.v]\nrole = "primary"\ndevice = "{place}/p.img"\nsize = "1MiB"\n'
                f'backups = ["127.0.0.1:{port}/far"]\n'
                f'[volume.far]\nrole = "backup"\ndevice = "{place}/m.img"\nsize = "1MiB"\n'
            )
        )
        self.node.open()
        self.ledger = Ledger()
        self.runner = asyncio.Runner()
        self.application = self.runner.run(self._application())

    async def _application(self) -> Starlette:
        reception = Reception(handing_path(self.node.configuration.node.control))
        return Control(self.node, self.ledger, reception).application()

    def close(self) -> None:
        """Ends it."""
        self.ledger.stop(SECONDS)
        self.runner.close()
        self.node.close()

    def ask(self, method: str, path: str, body: bytes = b"", query: str = "") -> Answer:
        """One request, to its end."""
        return self.runner.run(self._ask(method, path, body, query))

    async def _ask(self, method: str, path: str, body: bytes, query: str) -> Answer:
        raw = quote(path, errors="surrogateescape").encode()
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method,
            "scheme": "http", "path": path, "raw_path": raw, "root_path": "",
            "query_string": query.encode(), "headers": [(b"host", b"x")],
            "client": None, "server": ("localhost", None),
        }  # fmt: skip
        said: list[dict[str, Any]] = [{"type": "http.request", "body": body, "more_body": False}]
        heard: list[Any] = []
        silent = asyncio.Event()

        async def receive() -> dict[str, Any]:
            if not said:
                await silent.wait()
            return said.pop(0)

        async def send(message: Any) -> None:
            heard.append(message)

        async with asyncio.timeout(SECONDS):
            await self.application(scope, receive, send)
        content = b"".join(message.get("body", b"") for message in heard[1:])
        return Answer(heard[0]["status"], content)

    def check(self, answer: Answer) -> None:
        """It was answered as the API promises, and the daemon goes on."""
        assert answer.status in {200, 307, 400, 404, 405, 409, 500}, answer
        if answer.status in {400, 409, 500} and answer.content.startswith(b"{"):
            check_error(json.loads(answer.content)["error"])
        elif answer.status == 500:
            raise AssertionError(answer)
        elif answer.content.startswith(b'{"progress"') or b'\n{"error"' in answer.content:
            last = json.loads(answer.content.splitlines()[-1])
            assert last.keys() <= {"report", "error"}, answer
            if "error" in last:
                check_error(last["error"])


def check_error(error: dict[str, Any]) -> None:
    """A kind that a client knows, and words that were written for it."""
    assert issubclass(getattr(errors, error["kind"]), errors.DualRestoreError)
    assert error["message"].strip()
    assert not error["message"].startswith("unexpected "), error


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Asked]:
    """One for all: what is sent may change it, but not break it."""
    made = Asked(tmp_path_factory.mktemp("asked"))
    yield made
    status = made.ask("GET", "/v1/status")
    assert status.status == 200
    made.close()


@pytest.fixture(scope="module")
def mirrored(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Asked]:
    """One that nothing random is sent to."""
    made = Asked(tmp_path_factory.mktemp("mirrored"))
    wait_until("mirrored", lambda: b'"mirrored":true' in made.ask("GET", "/v1/volumes/v").content)
    yield made
    made.close()


def paths_below(place: Path) -> st.SearchStrategy[str]:
    """Where a daemon that runs as root may be sent to."""
    names = st.text("abc.", min_size=1, max_size=4).filter(lambda name: name not in {".", ".."})
    odd = st.sampled_from(["relative", "", "/dev/null", "/dev/full", "/proc/self/mem", "\0", "-"])
    return names.map(lambda name: str(place / name)) | odd


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(st.text(max_size=4), inside),
    max_leaves=6,
)
RANGES = st.lists(
    st.tuples(st.integers(-1, 2**64), st.integers(-1, 2**64))
    | st.tuples(st.integers(0, 300).map(lambda n: n * 4096), st.just(4096)),
    max_size=3,
)


SHORT = ["none", "zstd", "auto", "zstd:99", "x" * 300, "\x1b[2J", "7" * 36]
KEYS: st.SearchStrategy[Any] = st.fixed_dictionaries(
    {}, optional={"key": st.text(), "manifest": st.text()}
)
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "lost": st.sampled_from(["all", "none", "some"]) | RANGES,
    "selection": st.none() | RANGES,
    "backup": st.integers(-(2**70), 2**70) | st.sampled_from([0, 1, 2**32]),
    "medium_size": st.integers(-(2**70), 2**70) | st.sampled_from([0, 1, 1 << 20]),
    "timeout_seconds": st.sampled_from([0, 0.01, -1, 1e-300, 1e300]),
    "trusts": st.none() | st.lists(st.none() | KEYS, max_size=3),
    "partitions": st.lists(st.integers(-1, 2**70), max_size=3),
    "compression": st.sampled_from(SHORT) | st.text(),
    "label": st.sampled_from(SHORT) | st.text(),
    "snapshot": st.sampled_from(SHORT) | st.text(),
    "since": st.none() | st.sampled_from(SHORT) | st.text(),
    "encryption": st.fixed_dictionaries({"key": st.text(), "wrapped_key": st.text()}),
}


def values_of(name: str, place: Path) -> st.SearchStrategy[Any]:
    """Values that a field may have, or nearly."""
    if name in {"media", "sources", "bundles"}:
        return st.lists(paths_below(place), max_size=3)
    if name == "bundle":
        return paths_below(place)
    return VALUES.get(name, st.booleans())


@st.composite
def body_of(draw: st.DrawFn, kind: type[msgspec.Struct] | None, place: Path) -> bytes:
    """What a client may send there, nearly right or anything."""
    if kind is None or draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=40) | ANY.map(lambda value: json.dumps(value).encode()))
    chosen = {}
    for name in kind.__struct_fields__:
        choice = draw(st.integers(0, 9))
        if choice == 0 and name not in {"media", "sources", "bundles", "bundle"}:
            chosen[name] = draw(ANY)
        elif choice < 7 or name in kind.__struct_fields__[:1]:
            chosen[name] = draw(values_of(name, place))
    if draw(st.integers(0, 9)) == 0:
        chosen["extra"] = 1
    return json.dumps(chosen).encode()


@given(st.data())
@SETTINGS
def test_any_request_is_done_or_refused_in_words(asked: Asked, data: st.DataObject) -> None:
    method, path, kind = data.draw(st.sampled_from(operations(asked.application)))
    odd = st.sampled_from(["", "..", "%00", "\0", "x", "v@x", "é", "a" * 300]) | st.text(max_size=6)
    name = data.draw(st.sampled_from(["v", "v", "v", "far", "far"]) | odd)
    path = path.replace("{name}", name)
    path = path.replace("{plane}", data.draw(st.sampled_from(["current", "missing"]) | odd))
    path = path.replace("{snapshot}", data.draw(odd))
    query = data.draw(st.sampled_from(["", "cells=4", "cells=0", "cells=-1", "cells=٣", "x=y"]))
    asked.check(asked.ask(method, path, data.draw(body_of(kind, asked.place)), query))


@pytest.mark.parametrize("case", sorted(CORPUS.glob("*.json")), ids=lambda path: path.stem)
def test_what_once_broke_or_is_rare_is_answered(mirrored: Asked, case: Path) -> None:
    request = json.loads(case.read_text())
    body = json.dumps(request["body"]).replace("PLACE", str(mirrored.place)).encode()
    answer = mirrored.ask(request["method"], request["path"], body)
    mirrored.check(answer)
    assert answer.status == request["status"], answer


def test_the_schema_has_every_route_and_every_body(asked: Asked) -> None:
    schema = openapi(asked.application, asked.place, ["v"])
    told = {(method, path) for path, ways in schema["paths"].items() for method in ways}
    assert told == {(method.lower(), path) for method, path, _ in operations(asked.application)}
    assert {kind.__name__ for kind in BODIES.values()} <= set(schema["components"]["schemas"])
    used = json.dumps(schema["paths"])
    assert all(f"/{kind.__name__}" in used for kind in BODIES.values())
