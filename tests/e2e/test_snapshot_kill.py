"""kill -9 of the backup while snapshots are cut, deleted in any order, bundled and read, under
writes: every snapshot that was acknowledged reads exactly as at its cut, by NBD and by bundle.

DUALRESTORE_KILLS sets how often it is killed:
`DUALRESTORE_KILLS=200 pytest tests/e2e/test_snapshot_kill.py`.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import shutil
import socket
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from tests.e2e.harness import MIB, VOLUME, Pair, run
from tests.e2e.history import Cut, Writer
from tests.e2e.nbd_client import NbdClient

if TYPE_CHECKING:
    from pathlib import Path

SIZE = 8 * MIB
HELD_MAX = 6
PATH = f"/v1/volumes/{VOLUME}"


class RefusedError(Exception):
    """A daemon said no, or died before it said anything."""


def ask(control: Path, method: str, path: str, body: object | None = None) -> list[Any]:
    """The lines of an answer of the control API."""
    connection = http.client.HTTPConnection("localhost", timeout=60)
    connection.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with contextlib.closing(connection):
        try:
            connection.sock.settimeout(60)
            connection.sock.connect(str(control))
            connection.request(method, path, json.dumps(body))
            response = connection.getresponse()
            lines = [json.loads(line) for line in response.read().splitlines()]
        except (OSError, http.client.HTTPException, ValueError) as problem:
            raise RefusedError(str(problem)) from problem
    last = lines[-1]
    if response.status >= 400 or (isinstance(last, dict) and ("error" in last)):
        raise RefusedError(str(last))
    return lines


class Story:
    """What was asked of the backup, what it acknowledged, and what must hold therefore."""

    def __init__(self, pair: Pair, writer: Writer, seed: int) -> None:
        self.pair = pair
        self.writer = writer
        self.random = random.Random(seed)
        self.cuts = 0
        self.held: dict[str, Cut] = {}
        """Acknowledged, and nobody asked for their deletion."""
        self.leaving: dict[str, Cut] = {}
        """Their deletion was asked for and not acknowledged."""
        self.gone: set[str] = set()
        self.asked: dict[str, Cut] = {}
        """By label: cuts that were asked for and not acknowledged."""
        self.dead = threading.Event()
        self.fresh = threading.Event()
        """A snapshot was cut."""
        self.problem: BaseException | None = None
        self.done = dict.fromkeys(("cut", "delete", "read", "bundle"), 0)

    def cut(self) -> None:
        self.cuts += 1
        label, begun = f"cut {self.cuts}", self.writer.begin_cut()
        try:
            body = {"label": label, "timeout_seconds": 10.0}
            [told] = ask(self.pair.primary.control, "POST", f"{PATH}/snapshot", body)
        except RefusedError:
            # The backup may come to it later, or may have.
            self.asked[label] = self.writer.end_cut(begun)
            raise
        self.held[told["snapshot"]] = self.writer.end_cut(begun)
        self.fresh.set()

    def delete(self) -> None:
        snapshot = self.random.choice(list(self.held))
        self.leaving[snapshot] = self.held.pop(snapshot)
        ask(self.pair.backup.control, "DELETE", f"{PATH}/snapshots/{snapshot}")
        del self.leaving[snapshot]
        self.gone.add(snapshot)

    def read(self) -> None:
        snapshot = self.random.choice(list(self.held))
        try:
            with NbdClient(self.pair.backup_socket, f"{VOLUME}@{snapshot}") as client:
                image = b"".join(client.read(at, MIB) for at in range(0, SIZE, MIB))
        except ConnectionError as problem:
            raise RefusedError(str(problem)) from problem
        self.held[snapshot].check(image, f"snapshot {snapshot}, read by NBD,")

    def bundle(self) -> None:
        snapshot = self.random.choice(list(self.held))
        medium, image = self.pair.directory / "medium", self.pair.directory / "restored"
        shutil.rmtree(medium, ignore_errors=True)
        image.unlink(missing_ok=True)
        body = {"snapshot": snapshot, "media": [str(medium)]}
        ask(self.pair.backup.control, "POST", f"{PATH}/bundle", body)
        run(["python3", "-I", medium / "recover.py", medium, image])
        self.held[snapshot].check(image.read_bytes(), f"snapshot {snapshot}, bundled,")

    def step(self) -> None:
        steps = {"cut": 4 if len(self.held) < HELD_MAX else 0}
        if self.held:
            steps |= {"read": 3, "bundle": 1, "delete": 3 if len(self.held) > 1 else 0}
        name = self.random.choices(list(steps), list(steps.values()))[0]
        getattr(self, name)()
        self.done[name] += 1

    def live(self) -> None:
        """Until the backup is dead."""
        try:
            while not self.dead.is_set():
                try:
                    self.step()
                except RefusedError as refusal:
                    # The primary finds its backup again within a moment.
                    linked = "LinkError" not in str(refusal)
                    if not self.dead.wait(10 if linked else 0.05) and linked:
                        raise
        except BaseException as problem:
            self.problem = problem

    def check_all(self) -> None:
        """Everything that was acknowledged is as it must be; of the rest, what is there."""
        [listed] = ask(self.pair.backup.control, "GET", f"{PATH}/snapshots")
        found = {one["snapshot"]: one for one in listed}
        lost = self.held.keys() - found.keys()
        assert not lost, f"snapshots that were acknowledged are not there: {lost}"
        back = self.gone & found.keys()
        assert not back, f"snapshots that were deleted are back: {back}"
        for snapshot in self.leaving.keys() - found.keys():
            del self.leaving[snapshot]
            self.gone.add(snapshot)
        for snapshot, one in found.items():
            if snapshot in self.leaving and one["broken"] == "it is being deleted":
                continue
            assert one["broken"] is None, f"{snapshot} broke: {one}"
            if snapshot in self.leaving:
                # Its deletion had not begun.
                self.held[snapshot] = self.leaving.pop(snapshot)
            elif snapshot not in self.held:
                self.held[snapshot] = self.asked.pop(one["label"])
        for snapshot in self.held:
            with NbdClient(self.pair.backup_socket, f"{VOLUME}@{snapshot}") as client:
                image = b"".join(client.read(at, MIB) for at in range(0, SIZE, MIB))
            self.held[snapshot].check(image, f"snapshot {snapshot}, read after the kill,")


@pytest.mark.timeout(0)
def test_every_acknowledged_snapshot_survives_the_backup_killed_at_any_moment(seed: int) -> None:
    kills = int(os.environ.get("DUALRESTORE_KILLS") or 4)
    with Pair(SIZE) as pair:
        writer = Writer(pair.socket, SIZE, seed)
        writer.start()
        writer.wait_for(50)
        story = Story(pair, writer, seed)
        for number in range(kills):
            story.dead.clear()
            living = threading.Thread(target=story.live, daemon=True)
            living.start()
            if story.random.random() < 0.7:
                # Else it dies again before the primary has caught up with it.
                story.fresh.clear()
                assert story.fresh.wait(30), f"no snapshot was cut: {story.problem}"
            time.sleep(story.random.uniform(0.02, 1.2))
            pair.backup.kill()
            story.dead.set()
            living.join(60)
            assert not living.is_alive(), "a request was not answered"
            if story.problem is not None:
                raise story.problem
            writer.wait_for(20)
            pair.backup.start()
            story.check_all()
            print(f"kill {number + 1}: {story.done}, {len(story.held)} held")
        if story.held:
            story.bundle()
        writer.finish()
        pair.wait_mirrored()
        pair.stop_and_compare()
