"""Sources beside each other, and an export beside its peers, in one run:
`python -m benches.bulk.sources [--brief]`.

| row | what |
|---|---|
| one after the other, at once | three thirds, each held to a rate, by three commands and by one |
| an export | `merge nbd+unix:..` beside nbdcopy and qemu-img of the same export into a file |

Medians of interleaved repetitions; memory is the peak of the whole process, start and map counted.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from tests.e2e.harness import DIES_WITH_US, MIB, PROGRAM, run, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable

PARTS = 3
UUID = "00000000-0000-4000-8000-000000000001"


def serve(
    held: ExitStack, top: Path, image: Path, part: tuple[int, int] | None = None, rate: int = 0
) -> str:
    """Serves the image with nbdkit, as a snapshot that includes a part, at most so many bytes a
    second; its URI."""
    place = top / f"socket{part[0] if part else ''}"
    words: list[str | Path] = [*DIES_WITH_US, "nbdkit", "-f", "-U", place]
    if part is None:
        words += ["file", image]
    else:
        cut = f"dualrestore-cut 1 volume={UUID} generation=1 sequence=1 snapshot={UUID} block=4096"
        words += ["--filter=rate", "--filter=exportname", "file", image, f"rate={8 * rate}"]
        words += [f"exportdesc=fixed:{cut} included={part[0]}-{part[1]}"]
    held.callback(subprocess.Popen(words).kill)
    wait_until("it listens", place.exists)
    return f"nbd+unix:///?socket={place}"


class Target:
    """A file, and a map in which all is missing."""

    def __init__(self, top: Path, size: int) -> None:
        self.size = size
        self.path, self.map = top / "target", top / "map"
        with self.path.open("wb") as file:
            file.truncate(size)

    def lose(self) -> None:
        """A new map."""
        self.map.unlink(missing_ok=True)
        known = ["--volume", UUID, "--generation", "1"]
        run([PROGRAM, "map", "create", self.map, "--size", str(self.size), *known])

    def merge(self, *sources: str | Path) -> float:
        """Merges; the seconds that the report tells."""
        words = [PROGRAM, "merge", *sources, self.path, "--map", self.map, "--json"]
        return float(json.loads(run(words, seconds=3600).stdout)["seconds"])


def timed(words: list[str | Path]) -> float:
    """Seconds of a whole command."""
    begun = time.monotonic()
    run(words, seconds=3600)
    return time.monotonic() - begun


def noise(path: Path, size: int) -> None:
    """A file of random bytes."""
    with path.open("wb") as file:
        for _ in range(size // MIB):
            file.write(os.urandom(MIB))


def side_by_side(top: Path, size: int, rate: int, rounds: int) -> None:
    """Three media, each with its third of a volume."""
    image, step = top / "image", size // PARTS
    noise(image, size)
    target = Target(top, size)
    after, together = [], []
    with ExitStack() as held:
        parts = [(step * number, step * (number + 1)) for number in range(PARTS)]
        uris = [serve(held, top, image, part, rate) for part in parts]
        for _ in range(rounds):
            target.lose()
            after.append(sum(target.merge(uri) for uri in uris))
            target.lose()
            together.append(target.merge(*uris))
            run(["cmp", image, target.path])
    one, all_of_them = statistics.median(after), statistics.median(together)
    print(
        f"one after the other {one:.2f} s, at once {all_of_them:.2f} s: {one / all_of_them:.2f} x"
    )


def an_export(top: Path, size: int, rounds: int) -> None:
    """The same export by several readers."""
    image = top / "export.img"
    noise(image, size)
    target = Target(top, size)
    copy = top / "copy"
    with ExitStack() as held:
        uri = serve(held, top, image)
        readers: dict[str, Callable[[], float]] = {
            "merge": lambda: target.merge(uri),
            "nbdcopy": lambda: timed(["nbdcopy", "--connections=1", uri, copy]),
            "qemu-img": lambda: timed(["qemu-img", "convert", "-f", "raw", "-O", "raw", uri, copy]),
        }
        seconds: dict[str, list[float]] = {name: [] for name in readers}
        for turn in range(rounds):
            names = list(readers)
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                target.lose()
                copy.unlink(missing_ok=True)
                seconds[name].append(readers[name]())
    for name, times in seconds.items():
        print(f"{name:8} {size / statistics.median(times) / 1e9:.2f} GB/s")


def main() -> None:
    """Prints both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--brief", action="store_true", help="small, to see that it runs")
    parser.add_argument("--place", default="/dev/shm", help="where images and targets are")
    options = parser.parse_args()
    top = Path(tempfile.mkdtemp(prefix="dr-", dir=options.place))
    rounds = 1 if options.brief else 5
    try:
        side_by_side(top, 24 * MIB if options.brief else 384 * MIB, 32 * MIB, rounds)
        an_export(top, 32 * MIB if options.brief else 1024 * MIB, rounds)
    finally:
        shutil.rmtree(top)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    print(f"largest process {peak / 1024:.0f} MiB", file=sys.stderr)


if __name__ == "__main__":
    main()
