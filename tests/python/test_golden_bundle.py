"""The golden bundles once more, read from the documents alone (`tests/golden/bundle_v1.py`).

The core wrote what is compared here; how it does that has no part in it.
"""

import itertools
import tarfile
from pathlib import Path

from tests.golden.bundle_v1 import Medium, Piece

GOLDEN = Path(__file__).parent.parent / "golden"
SIZE = (3 << 20) + 512
CHUNK = 64 << 10


def _runs(pieces: list[Piece]) -> list[tuple[int, int, bool]]:
    return [(piece.start, piece.end, piece.content is not None) for piece in pieces]


def test_a_part_of_a_volume_is_bundled_as_the_document_says() -> None:
    medium = Medium(GOLDEN / "bundle-v1-bound")
    assert medium.begin["selection"] == [[0, 8192], [CHUNK, 2 * CHUNK]]
    assert "medium" not in medium.manifest
    assert _runs(medium.pieces) == [(0, 8192, True), (CHUNK, 2 * CHUNK, False)]


def test_a_bundle_over_two_media_is_as_the_document_says() -> None:
    first, second = (Medium(GOLDEN / "bundle-v1-media" / number) for number in "12")
    assert first.begin_bytes == second.begin_bytes
    assert first.begin["selection"] == [[0, SIZE]]
    assert first.manifest["medium"] == {"number": 1, "last": False}
    assert second.manifest["medium"] == {"number": 2, "last": True}
    assert [segment.number for segment in first.segments + second.segments] == [0, 1]
    # Together everything, each byte once; the chunk that did not fit leads the second medium.
    pieces = first.pieces + second.pieces
    assert (pieces[0].start, pieces[-1].end) == (0, SIZE)
    assert all(one.end == other.start for one, other in itertools.pairwise(pieces))
    stored = [(piece.start, piece.end) for piece in pieces if piece.content is not None]
    assert stored == [(0, CHUNK), (2 << 20, (2 << 20) + CHUNK), (3 << 20, SIZE)]
    assert second.pieces[0].start == 2 << 20


def test_an_incremental_bundle_is_as_the_document_says() -> None:
    medium = Medium(GOLDEN / "bundle-v1-incremental")
    begin = medium.begin
    assert (begin["features"], begin["generation"], begin["cut"]) == (["incremental"], 6, 1300)
    assert begin["base"] == {
        "generation": 6,
        "cut": 1234,
        "scope": [[0, 1 << 20], [2 << 20, SIZE]],
    }
    assert begin["selection"] == [[8192, 16384], [CHUNK, 2 * CHUNK], [3 << 20, SIZE]]
    # What became zero since the base is said to be zero, not left out.
    assert _runs(medium.pieces) == [
        (8192, 16384, True),
        (CHUNK, 2 * CHUNK, False),
        (3 << 20, SIZE, True),
    ]


def test_the_tar_form_is_as_the_document_says() -> None:
    path = GOLDEN / "bundle-v1-bound.tar"
    assert path.stat().st_size % 4096 == 0
    with tarfile.open(path) as archive:
        members = archive.getmembers()
        names = [member.name for member in members]
        assert names == ["manifest.begin.json", "seg-00000000.drs", "manifest.json"]
        for member in members:
            assert member.offset_data % 4096 == 0
            assert set(member.pax_headers) == {"comment"}
            held = archive.extractfile(member)
            assert held is not None
            assert held.read() == (GOLDEN / "bundle-v1-bound" / member.name).read_bytes()
