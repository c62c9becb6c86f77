"""The volume's content before the loss: a real filesystem with real files, then stamped sectors.

Guarantees: says what it made. With mkfs.ext4 on this machine it is an ext4 filesystem filled with
some thousand files of this machine; without, files laid one after the other.
"""

import itertools
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy

from dualrestore.errors import DualRestoreError
from dualrestore.jobs.demo.stamps import SECTOR_BYTES, stamp

FILES_MAX = 4000
FILE_BYTES_MAX = 4 * 2**20
STAMP_BYTES = 4 * 2**20
BLOCK_BYTES = 4096


@dataclass(frozen=True)
class Content:
    """`filesystem_bytes` of filesystem first, then stamped sectors (sequence 1) to the end."""

    image: Path
    filesystem: str
    filesystem_bytes: int
    files: int
    size: int


def find_tool(name: str) -> str | None:
    """A program, also where only administrators have it in their path."""
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")


def _real_files(budget: int) -> Iterator[Path]:
    places = (sysconfig.get_path("stdlib"), "/usr/share/doc", "/usr/include", "/etc")
    used = count = 0
    for directory, names, files in itertools.chain.from_iterable(map(os.walk, places)):
        names.sort()
        for name in sorted(files):
            path = Path(directory, name)
            try:
                if not path.is_file() or path.is_symlink():
                    continue
                size = path.stat().st_size
            except OSError:
                continue
            if used > budget * 9 // 10:
                return
            if size > FILE_BYTES_MAX or used + size > budget or not os.access(path, os.R_OK):
                continue
            used, count = used + size, count + 1
            yield path
            if count == FILES_MAX:
                return


def _copy_tree(tree: Path, budget: int) -> int:
    count = 0
    for number, source in enumerate(_real_files(budget)):
        target = tree / f"{number // 100:03}" / f"{number:05}-{source.name}"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
        count += 1
    return count


def _lay_out(tree: Path, image: Path, size: int) -> None:
    with image.open("wb") as out:
        for path in sorted(tree.rglob("*")):
            if path.is_file() and out.tell() + path.stat().st_size <= size:
                out.write(path.read_bytes())
                out.seek(-out.tell() % BLOCK_BYTES, os.SEEK_CUR)
        out.truncate(size)


def make_content(place: Path, size: int) -> Content:
    """Makes the image in `place`. Three quarters are filesystem."""
    filesystem_bytes = size // 4 * 3 // 2**20 * 2**20
    tree, image = place / "files", place / "before.img"
    tree.mkdir()
    files = _copy_tree(tree, filesystem_bytes * 2 // 5)
    mkfs = find_tool("mkfs.ext4")
    if mkfs is None:
        _lay_out(tree, image, filesystem_bytes)
        name = "generated (mkfs.ext4 not found)"
    else:
        # Small files need many inodes: one for each 8 KiB holds them at any size.
        words = [mkfs, "-q", "-F", "-b", str(BLOCK_BYTES), "-i", "8192", "-d", str(tree)]
        made = subprocess.run(
            [*words, str(image), f"{filesystem_bytes // 1024}k"],
            capture_output=True,
            text=True,
            check=False,
        )
        if made.returncode:
            raise DualRestoreError(f"{mkfs} failed: {made.stderr.strip()}")
        name = "ext4"
    shutil.rmtree(tree)
    with image.open("r+b") as out:
        out.truncate(size)
        out.seek(filesystem_bytes)
        for at in range(filesystem_bytes, size, STAMP_BYTES):
            count = min(STAMP_BYTES, size - at) // SECTOR_BYTES
            first = at // SECTOR_BYTES
            sectors = numpy.arange(first, first + count, dtype=numpy.uint64)
            out.write(stamp(sectors, numpy.ones(count, dtype=numpy.uint64)).tobytes())
    return Content(image, name, filesystem_bytes, files, size)


def data_runs(path: Path) -> Iterator[tuple[int, int]]:
    """(offset, length) of what is not a hole."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        end = os.fstat(descriptor).st_size
        at = 0
        while at < end:
            try:
                start = os.lseek(descriptor, at, os.SEEK_DATA)
            except OSError:
                return
            at = os.lseek(descriptor, start, os.SEEK_HOLE)
            yield start, at - start
    finally:
        os.close(descriptor)


def overwrite_with_garbage(path: Path, size: int) -> None:
    """Destroys a disk: every block gets bytes that no block had."""
    piece = numpy.frombuffer(os.urandom(2**20), dtype=numpy.uint64).copy()
    with path.open("r+b", buffering=0) as out:
        for _ in range(0, size, 2**20):
            out.write(piece.data.cast("B")[: size - out.tell()])
            piece += numpy.uint64(0x9E3779B97F4A7C15)
        os.fsync(out.fileno())


def check_filesystem(path: Path) -> bool | None:
    """Whether e2fsck finds the filesystem clean; None without e2fsck."""
    e2fsck = find_tool("e2fsck")
    if e2fsck is None:
        return None
    checked = subprocess.run([e2fsck, "-f", "-n", str(path)], capture_output=True, check=False)
    return checked.returncode == 0
