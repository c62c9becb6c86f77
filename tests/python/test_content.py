"""The demo's volume before the loss."""

from pathlib import Path

import numpy
import pytest

from dualrestore.jobs.demo import image
from dualrestore.jobs.demo.image import data_runs, make_content, overwrite_with_garbage
from dualrestore.jobs.demo.stamps import Findings, examine

SIZE = 64 << 20


@pytest.mark.parametrize("has_mkfs", [True, False])
def test_the_content_is_a_filesystem_and_stamped_sectors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_mkfs: bool
) -> None:
    if not has_mkfs or image.find_tool("mkfs.ext4") is None:
        monkeypatch.setattr(image, "find_tool", lambda _: None)
    monkeypatch.setattr(image, "FILES_MAX", 200)
    content = make_content(tmp_path, SIZE)
    assert content.image.stat().st_size == SIZE
    assert content.files > 100
    assert (content.filesystem == "ext4") == (image.find_tool("mkfs.ext4") is not None)
    with content.image.open("rb") as file:
        file.seek(content.filesystem_bytes)
        stamped = file.read()
    ones = numpy.ones(len(stamped) // 512, dtype=numpy.uint64)
    assert examine(stamped, content.filesystem_bytes // 512, ones) == Findings()
    assert not (tmp_path / "files").exists()


def test_garbage_leaves_no_block_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    before = bytes(range(256)) * 16 * 300
    path.write_bytes(before)
    overwrite_with_garbage(path, len(before))
    after = path.read_bytes()
    assert len(after) == len(before)
    blocks = {after[at : at + 4096] for at in range(0, len(after), 4096)}
    assert len(blocks) == 300
    assert before[:4096] not in blocks


def test_the_runs_of_data_cover_all_that_is_not_zero(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(8 << 20)
        file.seek(3 << 20)
        file.write(b"x" * 4096)
    runs = list(data_runs(path))
    assert any(start <= 3 << 20 < start + length for start, length in runs)
    assert sum(length for _, length in runs) < 8 << 20
