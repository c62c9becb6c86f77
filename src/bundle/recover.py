#!/usr/bin/env python3
"""Restores a raw image from a dualrestore bundle, with Python's standard library alone.

    python3 -I recover.py DIRECTORY OUT.img     write a sparse raw image, verifying all of it
    python3 -I recover.py DIRECTORY             verify only

Every page and chunk is checked by CRC32C, and by BLAKE3 if the package "blake3" is installed.
Chunks compressed with zstd need Python 3.14, the package "zstandard", or the program "zstd".
Bytes that are damaged, or that the bundle does not include, read as zeros in the image; damaged
ones are listed. Exit code 0: all there and whole. 1: failed. 3: something is damaged.

This file knows the format of docs/formats-bundle.md by itself and shares no code with dualrestore.
"""

import json
import os
import shutil
import struct
import subprocess
import sys

PAGE = 4096
SEGMENT_MAX = 1 << 30
CHUNK_MAX = 1 << 20
MANIFEST_MAX = 128 << 20
DATA, ZSTD, ZERO, UNREADABLE = 1, 2, 3, 4

try:
    from blake3 import blake3
except ImportError:
    blake3 = None


class Damaged(Exception):
    """Bytes are not what they should be."""


# --- CRC32C -------------------------------------------------------------------------------------
# Python has no CRC32C. Long inputs are cut into lanes of LANE bytes that advance side by side:
# one step takes a byte of every lane and does its table look-ups with bytes.translate and its
# exclusive-ors on long integers, both of which run at the speed of C.

POLYNOMIAL = 0x82F63B78
LANE = 256


def _make_table():
    table = []
    for value in range(256):
        for _ in range(8):
            value = (value >> 1) ^ (POLYNOMIAL if value & 1 else 0)
        table.append(value)
    return table


TABLE = _make_table()
TABLE_BYTES = [bytes((entry >> shift) & 255 for entry in TABLE) for shift in (0, 8, 16, 24)]


def _advance(crc, data):
    for byte in data:
        crc = (crc >> 8) ^ TABLE[(crc ^ byte) & 255]
    return crc


def _make_shift():
    """Tables that advance a CRC over LANE zero bytes, a byte of the CRC at a time."""
    zeros = bytes(LANE)
    single = [_advance(1 << bit, zeros) for bit in range(32)]
    tables = []
    for start in (0, 8, 16, 24):
        table = [0] * 256
        for value in range(256):
            for bit in range(8):
                if value >> bit & 1:
                    table[value] ^= single[start + bit]
        tables.append(table)
    return tables


SHIFT = _make_shift()


def crc32c(data):
    """CRC-32C (Castagnoli) of bytes."""
    count = len(data) // LANE
    crc = 0xFFFFFFFF
    if count >= 16:
        planes = [0, 0, 0, 0]
        for step in range(LANE):
            column = int.from_bytes(data[step : count * LANE : LANE], "little")
            index = (column ^ planes[0]).to_bytes(count, "little")
            looked_up = [int.from_bytes(index.translate(part), "little") for part in TABLE_BYTES]
            planes = [
                planes[1] ^ looked_up[0],
                planes[2] ^ looked_up[1],
                planes[3] ^ looked_up[2],
                looked_up[3],
            ]
        lanes = zip(*(plane.to_bytes(count, "little") for plane in planes))
        zero, one, two, three = SHIFT
        for a, b, c, d in lanes:
            crc = (
                zero[crc & 255] ^ one[crc >> 8 & 255] ^ two[crc >> 16 & 255] ^ three[crc >> 24]
            ) ^ (a | b << 8 | c << 16 | d << 24)
        data = data[count * LANE :]
    return _advance(crc, data) ^ 0xFFFFFFFF


# --- zstd ---------------------------------------------------------------------------------------


def _zstd_program(stored, length):
    program = shutil.which("zstd")
    if program is None:
        raise SystemExit(
            "recover.py: this bundle is compressed and nothing here can unpack zstd: "
            "run `pip install zstandard`, use Python 3.14, or install the program zstd"
        )
    done = subprocess.run(
        [program, "-d", "-c", "-q"], input=stored, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    if done.returncode != 0:
        raise Damaged("it does not decompress")
    return done.stdout


def _make_unpack():
    try:
        from compression import zstd

        return lambda stored, length: zstd.ZstdDecompressor().decompress(stored, length + 1)
    except ImportError:
        pass
    try:
        import zstandard

        return lambda stored, length: zstandard.ZstdDecompressor().decompress(
            stored, max_output_size=length
        )
    except ImportError:
        return _zstd_program


_unpack = _make_unpack()


def unpack(stored, length):
    try:
        plain = _unpack(stored, length)
    except (Damaged, SystemExit):
        raise
    except Exception as error:
        raise Damaged("it does not decompress: %s" % error)
    if len(plain) != length:
        raise Damaged("it decompresses to another length")
    return plain


# --- pages and manifests ------------------------------------------------------------------------


def check_page(page, at, context):
    """A page has a CRC32C and a BLAKE3 of the rest of it at byte `at`."""
    body = page[:at] + page[at + 36 :]
    if struct.unpack_from("<I", page, at)[0] != crc32c(body):
        raise Damaged("a page does not match its CRC32C")
    if blake3 is not None and page[at + 4 : at + 36] != blake3(context + body).digest():
        raise Damaged("a page does not match its BLAKE3")


def read_manifest(directory):
    path = os.path.join(directory, "manifest.json")
    try:
        with open(path, "rb") as file:
            text = file.read(MANIFEST_MAX + 1)
    except FileNotFoundError:
        raise SystemExit("recover.py: %s is missing: not a bundle, or an unfinished one" % path)
    start, end = b',\n  "check": "', b'"\n}\n'
    body = text[: -(len(start) + 73 + len(end))]
    check = text[-(73 + len(end)) : -len(end)].decode("ascii", "replace")
    whole = (
        len(text) <= MANIFEST_MAX
        and text.endswith(end)
        and text[len(body) :].startswith(start)
        and check[:8] == "%08x" % crc32c(body)
        and (blake3 is None or check[9:] == blake3(body).hexdigest())
    )
    if not whole:
        raise SystemExit("recover.py: %s is damaged or cut off" % path)
    manifest = json.loads((body + b"\n}").decode())
    if (manifest.get("format"), manifest.get("version")) != ("dualrestore bundle", 1):
        raise SystemExit("recover.py: expected a bundle of version 1")
    if manifest["begin"]["features"]:
        raise SystemExit("recover.py: unknown features: %s" % manifest["begin"]["features"])
    return manifest


class Segment:
    """One segment file."""

    def __init__(self, directory, manifest, entry):
        if entry["name"] != "seg-%08d.drs" % entry["number"]:
            raise SystemExit("recover.py: an impossible segment name: %r" % entry["name"])
        self.size = manifest["begin"]["size"]
        self.number = entry["number"]
        self.context = bytes.fromhex(entry["header_hash"])
        self.file = open(os.path.join(directory, entry["name"]), "rb")
        self.length = min(os.fstat(self.file.fileno()).st_size, SEGMENT_MAX)

    def read(self, position, length):
        self.file.seek(position)
        data = self.file.read(length)
        if len(data) != length:
            raise Damaged("the segment ends too early")
        return data

    def check_header(self, manifest):
        page = self.read(0, PAGE)
        if page[:8] != b"\x89DRS\r\n\x1a\n" or struct.unpack_from("<HH", page, 8) != (1, 0):
            raise Damaged("the header is not one of version 1.0")
        check_page(page, 4060, b"")
        if page[4064:] != self.context:
            raise Damaged("the header is of another segment")
        if page[16:32].hex() != manifest["begin"]["bundle"].replace("-", ""):
            raise SystemExit("recover.py: segment %d is of another bundle" % self.number)

    def batches(self):
        """All whole batches: their descriptors, and where their payload begins."""
        at = PAGE
        while at + PAGE <= self.length:
            try:
                yield self.batch(at)
                at = self.next
            except Damaged:
                at += PAGE

    def batch(self, at):
        first = self.read(at, PAGE)
        head = self.head(first)
        number, page, pages, count, payload = head
        if page != 0 or not 1 <= pages <= 64 or not 1 <= count <= pages * 63:
            raise Damaged("not the first page of a batch")
        descriptors = []
        for index in range(pages):
            one = first if index == 0 else self.read(at + index * PAGE, PAGE)
            if self.head(one) != (number, index, pages, count, payload):
                raise Damaged("the pages of a batch disagree")
            for slot in range(min(63, count - len(descriptors))):
                descriptors.append(struct.unpack_from("<QQB3xIII32s", one, 64 + slot * 64))
        self.next = at + (pages + payload) * PAGE
        return descriptors, at + pages * PAGE

    def head(self, page):
        magic, segment, number, index, pages, count, payload = struct.unpack_from("<4sIIHHII", page)
        if magic != b"DRBT" or segment != self.number:
            raise Damaged("not a descriptor page of this segment")
        check_page(page, 28, self.context)
        return number, index, pages, count, payload

    def chunk(self, descriptor, payload):
        """The verified bytes of a stored chunk."""
        offset, length, kind, stored_bytes, page, crc, digest = descriptor
        if length > CHUNK_MAX or stored_bytes > length:
            raise Damaged("a chunk of an impossible length")
        stored = self.read(payload + page * PAGE, stored_bytes)
        if crc32c(stored) != crc:
            raise Damaged("it does not match its CRC32C")
        plain = unpack(stored, length) if kind == ZSTD else stored
        if len(plain) != length:
            raise Damaged("it has another length")
        if blake3 is not None and blake3(plain).digest() != digest:
            raise Damaged("it does not match its BLAKE3")
        return plain


# --- the whole ----------------------------------------------------------------------------------


def gaps(coverage, found):
    """The parts of the runs `coverage` that lie in none of the runs `found`."""
    found = sorted(found)
    index = 0
    for start, end in coverage:
        while index < len(found) and found[index][1] <= start:
            index += 1
        at, look = start, index
        while look < len(found) and found[look][0] < end:
            if found[look][0] > at:
                yield at, found[look][0]
            at = max(at, found[look][1])
            look += 1
        if at < end:
            yield at, end


def recover(directory, out):
    """Goes through the bundle, writing to the file `out` if it is not None; the damaged runs."""
    manifest = read_manifest(directory)
    size = manifest["begin"]["size"]
    damaged = []
    if out is not None:
        out.truncate(size)
    for entry in manifest["segments"]:
        found = []
        try:
            segment = Segment(directory, manifest, entry)
            segment.check_header(manifest)
        except (OSError, Damaged) as error:
            print("segment %d: %s" % (entry["number"], error), file=sys.stderr)
            if isinstance(error, OSError):
                damaged += [(start, end, "its segment cannot be read") for start, end in entry["coverage"]]
                continue
        for descriptors, payload in segment.batches():
            for descriptor in descriptors:
                offset, length, kind = descriptor[:3]
                if offset + length > size:
                    continue
                found.append((offset, offset + length))
                try:
                    if kind in (DATA, ZSTD):
                        plain = segment.chunk(descriptor, payload)
                        if out is not None:
                            out.seek(offset)
                            out.write(plain)
                    elif kind != ZERO:
                        raise Damaged("its source could not be read")
                except (OSError, Damaged) as error:
                    if isinstance(error, OSError) and out is not None and error.errno == 28:
                        raise
                    damaged.append((offset, offset + length, str(error)))
        segment.file.close()
        for start, end in gaps(entry["coverage"], found):
            damaged.append((start, end, "the page that describes it is damaged"))
    return manifest, damaged


def main(arguments):
    if len(arguments) not in (1, 2) or arguments[0].startswith("-"):
        print(__doc__, file=sys.stderr)
        return 2
    directory = arguments[0]
    if len(arguments) == 2:
        # A new file, so that what is not written is a hole that reads as zeros.
        with open(arguments[1], "xb") as out:
            manifest, damaged = recover(directory, out)
            out.flush()
            os.fsync(out.fileno())
    else:
        manifest, damaged = recover(directory, None)
    for start, end, why in sorted(damaged):
        print("damaged: bytes %d to %d: %s" % (start, end, why), file=sys.stderr)
    selected = sum(end - start for start, end in manifest["begin"]["selection"])
    print(
        "%d of %d selected bytes of a volume of %d bytes, checked by %s"
        % (
            selected - sum(end - start for start, end, _ in damaged),
            selected,
            manifest["begin"]["size"],
            "CRC32C and BLAKE3" if blake3 is not None else "CRC32C (install blake3 for its hashes)",
        )
    )
    return 3 if damaged else 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except OSError as error:
        sys.exit("recover.py: %s" % error)
