"""Bad maps, bundles, targets and words, each refused through the command line: nothing is touched.

Does not know: daemons (`tests/e2e/test_bad_input_daemons.py`), block devices and full disks
(`tests/e2e/test_bad_input_disks.py`).
"""

import fcntl
import json
import os
import shutil
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from dualrestore.cli import run as run_verb
from tests.golden.blake3 import blake3
from tests.golden.link_v1 import crc32c
from tests.refusal import BUSY, DIFFERENCES, FAILED, NOT_OURS, USAGE, Ended, refused

GOLDEN = Path(__file__).parent.parent / "golden"
VOLUME = "6011d3a9-0000-4000-8000-000000000001"
OTHER = "11111111-2222-4333-8444-555555555555"
SIZE = 128 << 10
GROUND = b"\xee" * SIZE
SLOT = 4096

Refuse = Callable[..., str]


class Place:
    """A map, a target and a bundle of volume VOLUME, generation 6, that fit each other."""

    def __init__(self, top: Path, ask: Callable[[Sequence[object]], Ended]) -> None:
        self.top = top
        self.ask = ask
        self.map = top / "over.map"
        self.target = top / "target.img"
        self.bundle = top / "bundle"
        self.target.write_bytes(GROUND)
        shutil.copytree(GOLDEN / "bundle-v1-bound", self.bundle)
        self.make_map("--volume", VOLUME, "--generation", "6")

    def make_map(self, *more: str, size: str = "128KiB") -> None:
        """The map anew."""
        self.map.unlink(missing_ok=True)
        assert self.ask(["map", "create", self.map, "--size", size, *more]).code == 0

    @property
    def merge(self) -> list[object]:
        """The words that merge the bundle."""
        return ["merge", self.bundle, self.target, "--map", self.map]

    @property
    def segment(self) -> Path:
        """The one segment of the bundle."""
        return self.bundle / "seg-00000000.drs"

    def refused(self, words: Sequence[object], *says: str, code: int, kind: str) -> str:
        """Nothing in the whole place may change."""
        return refused(self.ask, words, code=code, kind=kind, says=says, untouched=[self.top])

    def not_ours(self, *says: str, kind: str = "FormatError") -> str:
        """The merge is refused with exit code 5."""
        return self.refused(self.merge, *says, code=NOT_OURS, kind=kind)


@pytest.fixture
def place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Place:
    """A fresh one."""
    monkeypatch.delenv("DUALRESTORE_CONFIG", raising=False)

    def ask(words: Sequence[object]) -> Ended:
        code = run_verb([str(word) for word in words])
        captured = capsys.readouterr()
        return Ended(code, captured.out, captured.err)

    return Place(tmp_path, ask)


def patch(path: Path, offset: int, content: bytes) -> None:
    """Overwrites bytes of a file."""
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(content)


def cut(path: Path, length: int) -> None:
    """Makes a file shorter."""
    with path.open("r+b") as file:
        file.truncate(length)


def forge_header(path: Path, offset: int, content: bytes) -> None:
    """Changes a map's header in both slots and makes the checksums right again."""
    for slot in (0, SLOT):
        patch(path, slot + offset, content)
        header = path.read_bytes()[slot : slot + SLOT - 4]
        patch(path, slot + SLOT - 4, struct.pack("<I", crc32c(header)))


def seal_manifest(path: Path, old: str, new: str) -> None:
    """Changes a manifest and makes its check right again."""
    text = path.read_bytes()
    body = text[: text.rindex(b',\n  "check"')]
    assert old.encode() in body
    body = body.replace(old.encode(), new.encode(), 1)
    check = f"{crc32c(body):08x}-{blake3(body).hex()}"
    path.write_bytes(body + f',\n  "check": "{check}"\n}}\n'.encode())


def seal_header(path: Path, offset: int, content: bytes) -> None:
    """Changes a segment's header and makes its checks right again."""
    patch(path, offset, content)
    header = path.read_bytes()[:4060]
    patch(path, 4060, struct.pack("<I", crc32c(header)) + blake3(header))


def test_what_fits_is_merged_and_a_second_merge_writes_nothing(place: Place) -> None:
    first = place.ask([*place.merge, "--json"])
    assert first.code == 0, first.err
    assert json.loads(first.out)["bytes_written"] == 72 << 10
    merged = place.target.read_bytes()
    again = place.ask([*place.merge, "--json"])
    assert again.code == 0, again.err
    report = json.loads(again.out)
    assert (report["bytes_written"], report["bytes_skipped"]) == (0, 72 << 10)
    assert place.target.read_bytes() == merged


# The map of another.


def test_a_map_of_another_volume_is_refused(place: Place) -> None:
    place.make_map("--volume", OTHER, "--generation", "6")
    place.not_ours(
        f"expected volume {OTHER}",
        f"found volume {VOLUME}",
        "the bundle of this volume",
        kind="IdentityError",
    )


@pytest.mark.parametrize("generation", ["5", "7"])
def test_a_bundle_of_another_generation_is_refused(place: Place, generation: str) -> None:
    place.make_map("--volume", VOLUME, "--generation", generation)
    place.not_ours(
        f"of generation {generation}, found",
        "of generation 6",
        "a snapshot taken since the loss",
        kind="IdentityError",
    )


@pytest.mark.parametrize("size", ["124KiB", "256KiB"])
def test_a_map_of_another_size_is_refused(place: Place, size: str) -> None:
    place.make_map("--volume", VOLUME, "--generation", "6", size=size)
    cut(place.target, int(size.removesuffix("KiB")) << 10)
    place.not_ours("expected a source of", "found 131072", "of this volume", kind="IdentityError")


def test_an_unbound_map_takes_the_identity_of_the_first_bundle(place: Place) -> None:
    place.make_map()
    shown = json.loads(place.ask(["map", "show", place.map, "--json"]).out)
    assert shown["volume"] is None
    assert place.ask(place.merge).code == 0
    shown = json.loads(place.ask(["map", "show", place.map, "--json"]).out)
    assert (shown["volume"], shown["generation"]) == (VOLUME, 6)


def test_an_unbound_map_with_marks_refuses_a_bound_bundle(place: Place) -> None:
    place.make_map()
    assert place.ask(["map", "mark", place.map, "0-4KiB"]).code == 0
    place.not_ours(
        "bound to no volume",
        "4096 bytes are current",
        f"map create --volume {VOLUME} --generation 6",
        kind="IdentityError",
    )


@pytest.mark.parametrize(
    ("golden", "role"), [("changed-map-v1.bin", "Changed"), ("preserved-map-v1.bin", "Preserved")]
)
def test_a_map_of_another_role_is_refused(place: Place, golden: str, role: str) -> None:
    shutil.copyfile(GOLDEN / golden, place.map)
    place.not_ours("expected a map of role Overwrite", role, "another file", kind="IdentityError")


# The map damaged, cut off, newer, or none.


@pytest.mark.parametrize("length", [0, 1, 511, 512, 4095, 4096, 8191, 9000])
def test_a_map_that_ends_within_its_headers_or_a_slot_is_refused(place: Place, length: int) -> None:
    cut(place.map, length)
    words = ("expected a map", f"found a file of {length}", "bring the whole file back")
    place.not_ours(*words)
    place.refused(["map", "show", place.map], *words, code=NOT_OURS, kind="FormatError")
    place.refused(["map", "mark", place.map, "0-4KiB"], code=NOT_OURS, kind="FormatError")


def test_a_map_that_lacks_its_last_slot_is_refused(place: Place) -> None:
    length = place.map.stat().st_size
    cut(place.map, length - SLOT)
    place.not_ours(
        f"expected {length} bytes",
        f"found {length - SLOT}",
        "bring the whole file back",
        kind="IntegrityError",
    )


def test_a_map_with_a_torn_header_slot_still_serves(place: Place) -> None:
    patch(place.map, 700, b"torn")
    assert place.ask(place.merge).code == 0


def test_a_map_with_two_torn_header_slots_is_refused(place: Place) -> None:
    patch(place.map, 700, b"torn")
    patch(place.map, SLOT + 700, b"torn")
    place.not_ours(
        "header is damaged", "expected checksum", "bring the file back", kind="IntegrityError"
    )


def test_a_torn_page_is_never_merged_over(place: Place) -> None:
    for marked in ("0-4KiB", "64KiB-68KiB"):
        assert place.ask(["map", "mark", place.map, marked]).code == 0
    # The slot of the last commit, as power loss leaves it.
    pages = place.map.read_bytes()[2 * SLOT :]
    newest = max((0, 1), key=lambda slot: struct.unpack_from("<Q", pages, slot * SLOT + 8)[0])
    patch(place.map, 2 * SLOT + newest * SLOT + 100, b"torn")
    ended = place.ask([*place.merge, "--json"])
    assert ended.code == 3, ended.err
    report = json.loads(ended.out)
    assert report["bytes_written"] == 0
    assert report["bytes_in_doubt"] >= 64 << 10
    assert place.target.read_bytes() == GROUND


def test_a_map_with_a_wrong_magic_is_refused(place: Place) -> None:
    for slot in (0, SLOT):
        patch(place.map, slot, b"NOTAMAP!")
    place.not_ours("expected a map", "found [4e, 4f", "no map of dualrestore")


def test_an_image_given_as_a_map_is_refused(place: Place) -> None:
    place.map.write_bytes(b"text" * 8192)
    place.not_ours("expected a map", "no map of dualrestore")


@pytest.mark.parametrize(
    ("offset", "content", "says"),
    [
        (8, b"\x02", "found version 2"),
        (12, b"\x04", "feature bits 0x4"),
        (10, b"\x09", "found 9"),
        (44, b"\x01", "found 1"),
        (32, b"\x01", "impossible volume"),
        (40, b"\x01", "impossible volume"),
        (72, b"\x07", "base of each plane"),
        (90, b"\x01", "reserved bytes"),
    ],
)
def test_a_map_that_is_not_understood_is_refused(
    place: Place, offset: int, content: bytes, says: str
) -> None:
    forge_header(place.map, offset, content)
    place.not_ours(says)


def test_a_newer_programs_header_is_refused_beside_one_of_ours(place: Place) -> None:
    ours = place.map.read_bytes()[:SLOT]
    forge_header(place.map, 8, b"\x02")
    patch(place.map, 0, ours)
    place.not_ours("expected a map of version 1", "found version 2", "or a newer one")


def test_a_map_in_use_is_busy(place: Place) -> None:
    with place.map.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        place.refused(place.merge, "in use", "stop it first", code=BUSY, kind="BusyError")
        words = ["map", "mark", place.map, "0-4KiB"]
        place.refused(words, str(place.map), code=BUSY, kind="BusyError")


def test_a_map_that_a_daemon_holds_is_busy(place: Place) -> None:
    state = place.top / "state"
    state.mkdir()
    (state / "intent.log").write_bytes(bytes(2 * SLOT))
    place.map = place.map.rename(state / "overwrite.map")
    held = os.open(state, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        place.refused(place.merge, "in use", "stop it first", code=BUSY, kind="BusyError")
    finally:
        os.close(held)


def test_a_map_that_is_missing_is_named(place: Place) -> None:
    place.map.unlink()
    words = ("over.map", "no such file", "check the path")
    place.refused(place.merge, *words, code=FAILED, kind="DeviceError")
    place.refused(["map", "show", place.map], *words, code=FAILED, kind="DeviceError")


def test_a_directory_given_as_a_map_is_refused(place: Place) -> None:
    words = ["map", "show", place.bundle]
    says = ("expected a regular file or a block device", "found a directory")
    place.refused(words, *says, code=USAGE, kind="UsageError")


def test_a_map_is_never_made_over_a_file(place: Place) -> None:
    words = ["map", "create", place.map, "--size", "1MiB"]
    says = ("expected a new file", "found one", "remove it first")
    place.refused(words, *says, code=USAGE, kind="UsageError")


def test_a_map_in_a_directory_that_is_missing_is_refused(place: Place) -> None:
    words = ["map", "create", place.top / "no" / "such.map", "--size", "1MiB"]
    place.refused(words, "such.map", "No such file", code=FAILED, kind="DeviceError")


# The bundle.


@pytest.mark.parametrize("keep", [0, 1, 100, 1300])
def test_a_manifest_that_is_cut_off_is_refused(place: Place, keep: int) -> None:
    cut(place.bundle / "manifest.json", keep)
    place.not_ours("manifest.json", "damaged or cut off", "copy it", kind="IntegrityError")


def test_a_manifest_with_a_flipped_bit_is_refused(place: Place) -> None:
    manifest = place.bundle / "manifest.json"
    patch(manifest, 600, bytes([manifest.read_bytes()[600] ^ 1]))
    place.not_ours("manifest.json", "checksum", "copy it", kind="IntegrityError")


def test_an_unfinished_bundle_is_refused(place: Place) -> None:
    (place.bundle / "manifest.json").unlink()
    place.not_ours("unfinished", "no manifest.json", "make it again")


def test_a_directory_that_is_no_bundle_is_refused(place: Place) -> None:
    for manifest in place.bundle.glob("manifest*.json"):
        manifest.unlink()
    place.not_ours("expected a bundle", "without manifest.json", "name the directory")


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('"version": 1', '"version": 2', "of version 2: use the program that made it"),
        ('"features": []', '"features": ["shining"]', "does not know: shining"),
        ('"cut": 1234', '"cut": 1234, "colour": 1', "unknown field `colour`"),
        ('"format": "dualrestore bundle"', '"format": "a cake"', 'found "a cake"'),
        ('"block_size": 4096', '"block_size": 4097', "impossible volume"),
        ('"size": 131072', '"size": 131073', "impossible volume"),
        ('"name": "seg-', '"name": "../s-', "expected segment 0"),
    ],
)
def test_a_manifest_that_is_not_understood_is_refused(
    place: Place, old: str, new: str, says: str
) -> None:
    seal_manifest(place.bundle / "manifest.json", old, new)
    place.not_ours("manifest.json", says)
    show = ["bundle", "show", place.bundle]
    place.refused(show, says, code=NOT_OURS, kind="FormatError")


@pytest.mark.parametrize("length", [0, 4095, 4096, 20_000])
def test_a_segment_that_is_cut_off_is_refused(place: Place, length: int) -> None:
    whole = place.segment.stat().st_size
    cut(place.segment, length)
    says = (f"expected a segment of {whole} bytes", f"found {length}", "copy it from the medium")
    place.not_ours(*says, kind="IntegrityError")
    verify = ["bundle", "verify", place.bundle]
    place.refused(verify, *says, code=NOT_OURS, kind="IntegrityError")


def test_a_segment_that_is_missing_is_named(place: Place) -> None:
    place.segment.unlink()
    place.not_ours("seg-00000000.drs", "is not there", "copy it", kind="IntegrityError")


@pytest.mark.parametrize(("offset", "content"), [(0, b"NOTASEGM"), (200, b"damage")])
def test_a_damaged_segment_header_costs_nothing_but_is_told(
    place: Place, offset: int, content: bytes
) -> None:
    patch(place.segment, offset, content)
    verified = place.ask(["bundle", "verify", place.bundle])
    assert verified.code == DIFFERENCES
    assert "seg-00000000.drs: its header" in verified.out
    merged = place.ask([*place.merge, "--json"])
    assert merged.code == 0, merged.err
    assert json.loads(merged.out)["bytes_written"] == 72 << 10


def test_members_that_are_no_plain_files_are_refused(place: Place) -> None:
    for name in ("seg-00000000.drs", "manifest.json"):
        member = place.bundle / name
        kept = member.rename(place.bundle / "kept")
        member.symlink_to("kept")
        place.not_ours(name, "expected a plain file", "put the file there")
        member.unlink()
        os.mkfifo(member)
        assert place.ask(place.merge).code == NOT_OURS
        member.unlink()
        kept.rename(member)


@pytest.mark.parametrize(
    ("offset", "content", "says"),
    [
        (8, b"\x02", "expected a segment of version 1.0, found 2.0"),
        (10, b"\x01", "expected a segment of version 1.0, found 1.1"),
        (88, b"\x10", "features that this version does not know: 0x10"),
        (64, b"\x01", "a base cut only in an incremental bundle"),
        (140, b"\x01", "reserved bytes"),
    ],
)
def test_a_segment_that_is_not_understood_is_refused(
    place: Place, offset: int, content: bytes, says: str
) -> None:
    seal_header(place.segment, offset, content)
    place.not_ours("seg-00000000.drs", says)


@pytest.mark.parametrize(("offset", "content"), [(32, b"\xff" * 16), (48, b"\x07"), (16, b"\x01")])
def test_a_segment_of_another_bundle_volume_or_generation_is_refused(
    place: Place, offset: int, content: bytes
) -> None:
    seal_header(place.segment, offset, content)
    place.not_ours("expected segment 0 of bundle", "found segment 0", kind="IdentityError")


def test_a_damaged_chunk_is_never_written_and_the_exit_code_says_so(place: Place) -> None:
    # The first chunk's payload follows the header and one descriptor page.
    patch(place.segment, 2 * SLOT + 100, b"damage")
    ended = place.ask([*place.merge, "--json"])
    assert ended.code == 3, ended.err
    report = json.loads(ended.out)
    assert (report["chunks_damaged"], report["bytes_written"]) == (1, 64 << 10)
    assert place.target.read_bytes()[: 64 << 10] == GROUND[: 64 << 10]
    verified = place.ask(["bundle", "verify", place.bundle, "--json"])
    assert verified.code == DIFFERENCES
    assert json.loads(verified.err)["error"]["exit_code"] == DIFFERENCES
    assert "copy the bundle again" in verified.err


def test_a_bundle_that_is_missing_is_named(place: Place) -> None:
    shutil.rmtree(place.bundle)
    says = ("bundle", "expected a bundle or image", "found nothing")
    place.refused(place.merge, *says, code=USAGE, kind="UsageError")
    for verb in ("show", "verify"):
        words = ["bundle", verb, place.bundle]
        place.refused(words, "No such file", "check the path", code=FAILED, kind="DeviceError")


def test_a_bundle_is_never_made_among_files(place: Place) -> None:
    words = ["bundle", "create", place.target, "--to", place.bundle]
    says = ("expected a new or an empty directory", "found files", "another directory")
    place.refused(words, *says, code=USAGE, kind="UsageError")


# The target and the image.


def test_a_target_that_is_too_small_is_refused(place: Place) -> None:
    cut(place.target, SIZE - 4096)
    place.not_ours(
        "target.img",
        f"expected a target of at least the {SIZE} bytes",
        f"found {SIZE - 4096}",
        "that the map is of",
        kind="IdentityError",
    )


def test_a_target_that_is_missing_is_named(place: Place) -> None:
    place.target.unlink()
    says = ("target.img", "expected the file or device", "found nothing")
    place.refused(place.merge, *says, code=USAGE, kind="UsageError")


def test_a_target_in_use_is_busy(place: Place) -> None:
    with place.target.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        says = ("target.img", "in use", "stop it first")
        place.refused(place.merge, *says, code=BUSY, kind="BusyError")


def test_an_image_is_never_merged_into_itself(place: Place) -> None:
    words = ["merge", place.target, place.target, "--map", place.map]
    place.refused(words, "target.img", "in use", code=BUSY, kind="BusyError")
    words = ["merge", place.bundle, place.map, "--map", place.map]
    place.refused(words, "over.map", "in use", code=BUSY, kind="BusyError")


@pytest.mark.parametrize("length", [1000, SIZE + 1])
def test_an_image_that_ends_within_a_sector_is_refused(place: Place, length: int) -> None:
    image = place.top / "odd.img"
    image.write_bytes(bytes(length))
    says = ("odd.img", "multiple of 512", f"found {length}")
    for words in (
        ["bundle", "create", image, "--to", place.top / "new"],
        ["merge", image, place.target, "--map", place.map],
        ["merge", place.bundle, image, "--map", place.map],
    ):
        place.refused(words, *says, code=USAGE, kind="UsageError")


def test_what_is_no_file_is_refused(place: Place) -> None:
    words = ["bundle", "create", Path("/dev/null"), "--to", place.top / "new"]
    says = ("expected a regular file or a block device", "found a character device")
    place.refused(words, *says, code=USAGE, kind="UsageError")


# Sizes, blocks, ranges, names.


@pytest.mark.parametrize(
    "size",
    [
        "0",
        "1000",
        "4097",
        "nonsense",
        "-4096",
        "1MB",
        "9EiB",
        "1.0001KiB",
        "9" * 5000,
        "8388608TiB",
    ],
)
def test_a_size_that_no_volume_has_is_refused(place: Place, size: str) -> None:
    words = ["map", "create", place.top / "new.map", f"--size={size}"]
    place.refused(words, "expected", "found", code=USAGE, kind="UsageError")


@pytest.mark.parametrize("block", ["0", "256", "3000", "4097", "2MiB", "8GiB", "4KiB and a bit"])
def test_a_block_size_that_is_no_power_of_two_in_range_is_refused(place: Place, block: str) -> None:
    words = ["map", "create", place.top / "new.map", "--size=1MiB", f"--block-size={block}"]
    place.refused(words, "expected", "found", code=USAGE, kind="UsageError")


@pytest.mark.parametrize("volume", ["", "x", VOLUME + "0"])
def test_a_volume_that_is_no_uuid_is_refused(place: Place, volume: str) -> None:
    words = ["map", "create", place.top / "new.map", "--size=1MiB", f"--volume={volume}"]
    place.refused(words, "expected a UUID like", "found", code=USAGE, kind="UsageError")


@pytest.mark.parametrize("generation", ["0", "-1", "18446744073709551616", "x"])
def test_a_generation_that_is_none_is_refused(place: Place, generation: str) -> None:
    words = ["map", "create", place.top / "new.map", "--size=1MiB", f"--generation={generation}"]
    place.refused(words, "--generation", generation, code=USAGE, kind="UsageError")


OUTSIDE = ["0-256KiB", "128KiB-132KiB", "124KiB-129KiB"]
CROOKED = ["512-4096", "0-100", "4KiB-4KiB", "8KiB-4KiB", "x-y", "4KiB", "0-" + "9" * 5000]


@pytest.mark.parametrize("marked", [*OUTSIDE, *CROOKED])
def test_a_range_outside_the_map_or_across_blocks_is_refused(place: Place, marked: str) -> None:
    # The good range before it is not marked either.
    words = ["map", "mark", place.map, "0-4KiB", marked]
    place.refused(words, "expected a range", "found", code=USAGE, kind="UsageError")


@pytest.mark.parametrize("selected", [*OUTSIDE, *CROOKED])
def test_a_selection_outside_the_image_or_across_blocks_is_refused(
    place: Place, selected: str
) -> None:
    words = ["bundle", "create", place.target, "--to", place.top / "new", "--select", selected]
    place.refused(words, "expected a range", "found", code=USAGE, kind="UsageError")
