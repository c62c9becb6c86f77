"""Everything that a merge takes, into a volume that is being written to: several media at once, a
tar from a pipe.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.e2e.harness import MIB, PROGRAM, Pair, run, wait_until
from tests.e2e.workload import Workload, check_volume, prepared

if TYPE_CHECKING:
    from collections.abc import Iterator

SIZE = 16 * MIB


@pytest.fixture
def elsewhere() -> Iterator[Path]:
    """A place on another file system than the pair's."""
    place = Path(tempfile.mkdtemp(prefix="dr-", dir="/dev/shm"))
    yield place
    shutil.rmtree(place)


def jobs_running(pair: Pair) -> int:
    """Jobs of the primary's daemon that have not ended."""
    jobs = pair.primary.ask("/v1/status")["jobs"]
    return sum(job["state"] == "running" for job in jobs)


def test_three_media_are_merged_at_once_under_load(seed: int, elsewhere: Path) -> None:
    with Pair(SIZE) as pair:
        shadow = prepared(pair, seed)
        media = [pair.directory / "m1", elsewhere / "m2", pair.directory / "m3"]
        to = [word for medium in media for word in ("--to", str(medium))]
        source = f"v@{pair.snapshot()}"
        pair.backup.verb("bundle", "create", source, *to, "--medium-size", "7MiB")
        workload = Workload(pair, shadow)
        workload.start()
        workload.wait_for_writes(50)
        report = pair.primary.verb_json("merge", media[2], media[0], media[1], "v")
        workload.finish()
        told = [(one["source"], one["error"]) for one in report["sources"]]
        assert told == [(str(media[at]), None) for at in (2, 0, 1)]
        assert report["side_by_side"] == 2, "two are on one file system"
        assert report["bytes_written"] > 0
        check_volume(pair, shadow)
        pair.wait_mirrored()
        pair.stop_and_compare()


class Piped:
    """`cat FILE | dualrestore merge - v`, of the first bytes of the file, held up after them."""

    def __init__(self, pair: Pair, tar: Path, length: int, *options: str | Path) -> None:
        words = ["-c", pair.primary.configuration, "merge", "-", "v", "--json", *options]
        self.merge = subprocess.Popen(
            [PROGRAM, *words], stdin=-1, stdout=-1, stderr=-1, start_new_session=True
        )
        assert self.merge.stdin is not None
        self.pipe = self.merge.stdin
        # Whoever refuses it does not read on.
        with contextlib.suppress(BrokenPipeError):
            self.pipe.write(tar.read_bytes()[:length])
            self.pipe.flush()

    def end(self) -> tuple[int, str, str]:
        """Exit code, and what was said."""
        said, complained = self.merge.communicate(timeout=60)
        return self.merge.returncode, said.decode(), complained.decode()

    def is_let_go(self) -> bool:
        """Whether nobody reads the pipe any more."""
        try:
            os.write(self.pipe.fileno(), b"\0")
        except BrokenPipeError:
            return True
        return False


def test_an_encrypted_tar_from_a_pipe_is_merged_under_load_whatever_interrupts_it(
    seed: int,
) -> None:
    with Pair(SIZE) as pair:
        shadow = prepared(pair, seed)
        identities = [pair.directory / "right.txt", pair.directory / "wrong.txt"]
        for identity in identities:
            run(["age-keygen", "-o", identity])
        right, wrong = (("--identity", identity) for identity in identities)
        recipient = run(["age-keygen", "-y", identities[0]]).stdout.strip()
        tar = pair.directory / "v.tar"
        source = f"v@{pair.snapshot()}"
        pair.backup.verb("bundle", "create", source, "--to", tar, "--recipient", recipient)
        whole, half = tar.stat().st_size, tar.stat().st_size // 2
        workload = Workload(pair, shadow)
        workload.start()
        for options, reason in ((wrong, "identity does not open it"), ((), "encrypted")):
            code, _, complained = Piped(pair, tar, MIB, *options).end()
            assert (code, reason in complained) == (5, True), complained
        for sent, code in ((signal.SIGKILL, -9), (signal.SIGINT, 130)):
            piped = Piped(pair, tar, half, *right)
            wait_until("it is being merged", lambda: jobs_running(pair) == 1)
            piped.merge.send_signal(sent)
            assert piped.merge.wait(60) == code
            wait_until("the daemon has let go of it", piped.is_let_go)
            wait_until("its job has ended", lambda: jobs_running(pair) == 0)
            piped.merge.communicate()
        code, said, complained = Piped(pair, tar, whole, *right).end()
        assert code == 0, complained
        report = json.loads(said)
        assert report["sources"][0]["source"] == "standard input"
        assert pair.primary.status()["missing_bytes"] == 0
        workload.finish()
        check_volume(pair, shadow)
        pair.wait_mirrored()
        pair.stop_and_compare()


def test_a_pipe_into_a_daemon_that_dies_or_is_not_there_ends_with_code_7(pair: Pair) -> None:
    tar = pair.directory / "v.tar"
    image = pair.directory / "image"
    image.write_bytes(os.urandom(pair.size))
    run([PROGRAM, "bundle", "create", image, "--to", tar])
    refused = Piped(pair, tar, tar.stat().st_size)
    code, _, complained = refused.end()
    assert (code, "names none" in complained) == (5, True), "of no volume"
    waiting = Piped(pair, tar, 4096)
    wait_until("it waits for the pipe", lambda: jobs_running(pair) == 1)
    pair.primary.kill()
    code, _, complained = waiting.end()
    assert (code, "Traceback" in complained) == (7, False), complained
    absent = Piped(pair, tar, 4096)
    code, _, complained = absent.end()
    assert (code, "standard input" in complained) == (7, True), complained
