#!/usr/bin/env python3
"""Restores a raw image from a dualrestore bundle, with Python's standard library alone.

    python3 -I recover.py DIRECTORY.. OUT.img   write a sparse raw image, verifying all of it
    python3 -I recover.py DIRECTORY..           verify only

    python3 -I recover.py --key KEYFILE ..      the same of an encrypted bundle (key.age is there)

Several directories are media of one bundle, and of incremental bundles that go on from it, in any
order. What they lack is said.

For KEYFILE unwrap key.age with age (https://age-encryption.org), into memory if you can:

    (umask 077; age -d -i IDENTITY.txt key.age > /dev/shm/bundle.key)     of recipients
    (umask 077; age -d key.age > /dev/shm/bundle.key)                     of a passphrase

Encrypted bundles need the package "cryptography" (pip install cryptography).

Python 3.8 or later. Every page and chunk is checked by CRC32C, and by BLAKE3 if the package
"blake3" is installed. Chunks compressed with zstd need Python 3.14, the package "zstandard", or
the program "zstd". Bytes that are damaged, or absent, or that the bundle does not include, read as
zeros in the image; damaged and absent ones are listed.

Exit code 0: whole. 1: failed. 2: wrong arguments. 3: something is damaged, or the image lacks what
is on a medium that was not given.

This file knows the format (docs/formats.md of dualrestore) by itself and shares no code
with dualrestore.
"""

import bisect
import errno
import hashlib
import hmac
import json
import os
import shutil
import stat
import struct
import subprocess
import sys
import threading
from pathlib import Path

PAGE = 4096
CHECKS = 36
SEGMENT_MAX = 1 << 30
CHUNK_MAX = 1 << 20
MANIFEST_MAX = 128 << 20
PAGES_MAX = 64
DESCRIPTORS_PER_PAGE = 63
DATA, ZSTD, ZERO = 1, 2, 3

try:
    from blake3 import blake3
except ImportError:
    blake3 = None


class DamageError(Exception):
    """Bytes are not what they should be."""


class RefusedError(Exception):
    """This is nothing that can be restored; nothing was."""


# The key ---------------------------------------------------------------------------------------


def derive(key, salt, info, length):
    """HKDF-SHA256 of RFC 5869."""
    extracted = hmac.new(salt, key, hashlib.sha256).digest()
    out = part = b""
    while len(out) < length:
        count = bytes([len(out) // 32 + 1])
        part = hmac.new(extracted, part + info + count, hashlib.sha256).digest()
        out += part
    return out[:length]


class Key:
    """The key of an encrypted bundle."""

    def __init__(self, path):
        try:
            from cryptography.hazmat.primitives.ciphers.aead import AESGCM
        except ImportError:
            raise RefusedError(
                "this bundle is encrypted, and opening it needs the Python package cryptography: "
                "run `pip install cryptography` and try again"
            ) from None
        self.cipher = AESGCM
        text = Path(path).read_bytes()[:1024].split()
        try:
            start, bundle, digits = (word.decode("ascii") for word in text)
            self.bundle = bytes.fromhex(bundle.replace("-", ""))
            self.key = bytes.fromhex(digits)
        except ValueError:
            start = ""
        if start != "DUALRESTORE-BUNDLE-KEY-1" or len(self.key) != 32 or len(self.bundle) != 16:
            raise RefusedError(
                f"{path}: expected the key of a bundle, found something else: it is what "
                "`age -d key.age` prints"
            )

    def check(self, manifest, text):
        """Refuses the key of another bundle, and a manifest changed by somebody without the key."""
        begin = manifest["begin"]
        if self.bundle != bytes.fromhex(begin["bundle"].replace("-", "")):
            raise RefusedError("the key is of another bundle: unwrap key.age of this one")
        found = derive(self.key, self.bundle, b"dualrestore 1 key check", 32)
        if found.hex() != begin["encryption"]["key_check"]:
            raise RefusedError("the key is not the one of this bundle: unwrap its own key.age")
        sealed, _, mac = text.rpartition(b',\n  "mac": "')
        key = derive(self.key, self.bundle, b"dualrestore 1 manifest", 32)
        expected = hmac.new(key, sealed, hashlib.sha256).hexdigest() + '"'
        if not hmac.compare_digest(mac, expected.encode()):
            raise RefusedError("manifest.json was changed by somebody who does not have the key")

    def of_segment(self, salt, number):
        """Cipher and page key of a segment."""
        info = b"dualrestore 1 segment" + self.bundle + struct.pack("<I", number)
        keys = derive(self.key, salt, info, 96)
        return self.cipher(keys[:32]), keys[32:64]


# CRC32C ----------------------------------------------------------------------------------------
# Python has none. Long inputs are cut into lanes of LANE bytes that advance side by side: one step
# takes a byte of every lane and does its table look-ups with bytes.translate and its exclusive-ors
# on long integers, both of which run at the speed of C.

POLYNOMIAL = 0x82F63B78
LANE = 256
LANES_WORTH_IT = 16


def _table_entry(value):
    for _ in range(8):
        value = (value >> 1) ^ (POLYNOMIAL if value & 1 else 0)
    return value


TABLE = [_table_entry(value) for value in range(256)]
TABLE_PLANES = [bytes(entry >> shift & 255 for entry in TABLE) for shift in (0, 8, 16, 24)]


def _advance(crc, data):
    for byte in data:
        crc = (crc >> 8) ^ TABLE[(crc ^ byte) & 255]
    return crc


def _make_shift():
    """Tables that advance a CRC over LANE zero bytes, a byte of the CRC at a time."""
    zeros = bytes(LANE)
    bits = [_advance(1 << bit, zeros) for bit in range(32)]
    tables = []
    for start in (0, 8, 16, 24):
        table = [0] * 256
        for value in range(256):
            for bit in range(8):
                if value >> bit & 1:
                    table[value] ^= bits[start + bit]
        tables.append(table)
    return tables


SHIFT = _make_shift()


def crc32c(data):
    """CRC-32C (Castagnoli) of bytes."""
    count = len(data) // LANE
    crc = 0xFFFFFFFF
    if count >= LANES_WORTH_IT:
        planes = [0, 0, 0, 0]
        for step in range(LANE):
            column = int.from_bytes(data[step : count * LANE : LANE], "little")
            index = (column ^ planes[0]).to_bytes(count, "little")
            found = [int.from_bytes(index.translate(part), "little") for part in TABLE_PLANES]
            planes = [planes[at + 1] ^ found[at] for at in range(3)] + [found[3]]
        first, second, third, fourth = SHIFT
        for a, b, c, d in zip(*(plane.to_bytes(count, "little") for plane in planes)):
            crc = (
                first[crc & 255]
                ^ second[crc >> 8 & 255]
                ^ third[crc >> 16 & 255]
                ^ fourth[crc >> 24]
                ^ (a | b << 8 | c << 16 | d << 24)
            )
        data = data[count * LANE :]
    return _advance(crc, data) ^ 0xFFFFFFFF


# zstd ------------------------------------------------------------------------------------------
# Each way stops after `limit` bytes, whatever the stored bytes ask for.


def _unpack_by_program(stored, limit):
    program = shutil.which("zstd")
    if program is None:
        raise RefusedError(
            "this bundle is compressed and nothing here can unpack zstd: run "
            "`pip install zstandard`, use Python 3.14, or install the program zstd"
        )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([program, "-d", "-c", "-q"], **pipes) as process:

        def feed():
            try:
                process.stdin.write(stored)
                process.stdin.close()
            except OSError:
                pass  # It ended early; its output says the rest.

        feeder = threading.Thread(target=feed)
        feeder.start()
        plain = process.stdout.read(limit)
        process.kill()
        feeder.join()
    return plain


def _find_unpack():
    try:
        from compression import zstd
    except ImportError:
        pass
    else:
        return lambda stored, limit: zstd.ZstdDecompressor().decompress(stored, limit)
    try:
        import zstandard
    except ImportError:
        return _unpack_by_program
    return lambda stored, limit: zstandard.ZstdDecompressor().stream_reader(stored).read(limit)


_unpack = _find_unpack()


def unpack(stored, length):
    """The bytes of a zstd frame that must give exactly so many."""
    try:
        plain = _unpack(stored, length + 1)
    except RefusedError:
        raise
    except Exception as error:
        raise DamageError(f"it does not decompress: {error}") from error
    if len(plain) != length:
        raise DamageError("it does not decompress to its length")
    return plain


# Files -----------------------------------------------------------------------------------------


def open_member(path):
    """A plain file, open: nothing that leads elsewhere, waits for somebody, or never ends."""
    flags = os.O_RDONLY | getattr(os, "O_BINARY", 0)
    flags |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        number = os.open(path, flags)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise RefusedError(f"{path} is a link: put a plain file there") from None
        raise
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise RefusedError(f"{path} is no plain file: put one there")
    return os.fdopen(number, "rb")


# Pages and manifest ----------------------------------------------------------------------------


def check_page(page, at, context, key=None):
    """Checks the CRC32C and BLAKE3 (or HMAC) that a page has at byte `at`, of the rest of it."""
    body = page[:at] + page[at + CHECKS :]
    if struct.unpack_from("<I", page, at)[0] != crc32c(body):
        raise DamageError("a page does not match its CRC32C")
    if key is not None:
        found = hmac.new(key, context + body, hashlib.sha256).digest()
        if not hmac.compare_digest(found, page[at + 4 : at + CHECKS]):
            raise DamageError("a page was changed by somebody without the key")
    elif blake3 is not None and page[at + 4 : at + CHECKS] != blake3(context + body).digest():
        raise DamageError("a page does not match its BLAKE3")


def read_manifest(directory, keys):
    """The manifest of a finished medium, checked, and the key of its bundle, if it has one."""
    path = Path(directory) / "manifest.json"
    try:
        with open_member(path) as file:
            text = file.read(MANIFEST_MAX)
    except FileNotFoundError:
        raise RefusedError(f"{path} is missing: not a bundle, or an unfinished one") from None
    start, digits, end = b',\n  "check": "', 8 + 1 + 64, b'"\n}\n'
    body = text[: -(len(start) + digits + len(end))]
    check = text[-(digits + len(end)) : -len(end)].decode("ascii", "replace")
    crc, _, digest = check.partition("-")
    whole = (
        text.endswith(end)
        and text[len(body) :].startswith(start)
        and crc == f"{crc32c(body):08x}"
        and (blake3 is None or digest == blake3(body).hexdigest())
    )
    if not whole:
        raise RefusedError(f"{path} is damaged or cut off")
    manifest = json.loads((body + b"\n}").decode())
    if (manifest.get("format"), manifest.get("version")) != ("dualrestore bundle", 1):
        raise RefusedError("expected a bundle of version 1")
    features = manifest["begin"]["features"]
    unknown = [name for name in features if name not in ("encrypted", "incremental")]
    if unknown:
        raise RefusedError(f"unknown features: {', '.join(unknown)}")
    if "encrypted" not in features:
        if keys:
            raise RefusedError(
                "expected an encrypted bundle, found one that is not: it may have been exchanged; "
                "leave --key out if you trust it"
            )
        return manifest, None
    if not keys:
        raise RefusedError(
            "this bundle is encrypted: unwrap key.age with age and name the result with --key\n"
            "(run recover.py without arguments to see how)"
        )
    bundle = bytes.fromhex(manifest["begin"]["bundle"].replace("-", ""))
    key = next((key for key in keys if key.bundle == bundle), keys[0])
    key.check(manifest, body)
    return manifest, key


class Segment:
    """One segment file, open."""

    def __init__(self, directory, manifest, entry, key):
        self.number = entry["number"]
        if entry["name"] != f"seg-{self.number:08d}.drs":
            raise RefusedError(f"an impossible segment name: {entry['name']!r}")
        self.size = manifest["begin"]["size"]
        self.bundle = bytes.fromhex(manifest["begin"]["bundle"].replace("-", ""))
        self.context = bytes.fromhex(entry["header_hash"])
        self.file = open_member(Path(directory) / entry["name"])
        self.length = min(os.fstat(self.file.fileno()).st_size, SEGMENT_MAX)
        self.cipher = self.page_key = None
        if key is not None:
            self.file.seek(128)
            self.cipher, self.page_key = key.of_segment(self.file.read(32), self.number)

    def read(self, position, length):
        """Exactly so many bytes of the file."""
        self.file.seek(position)
        data = self.file.read(length)
        if len(data) != length:
            raise DamageError("the segment ends too early")
        return data

    def check_header(self):
        """Refuses a segment of another bundle; other damage of the header costs nothing."""
        page = self.read(0, PAGE)
        if page[:8] != b"\x89DRS\r\n\x1a\n" or struct.unpack_from("<HH", page, 8) != (1, 0):
            raise DamageError("its header is not one of version 1.0")
        check_page(page, PAGE - CHECKS, b"")
        if (page[88] == 1) != (self.cipher is not None):
            raise RefusedError(f"segment {self.number} is not of this bundle: it is exchanged")
        if page[16:32] != self.bundle or page[-32:] != self.context:
            raise RefusedError(f"segment {self.number} is of another bundle")

    def batches(self):
        """All whole batches: their descriptors, and where their payload begins."""
        at = PAGE
        while at + PAGE <= self.length:
            try:
                number, descriptors, payload, after = self.batch(at)
            except DamageError:
                at += PAGE
            else:
                yield number, descriptors, payload
                at = after

    def batch(self, at):
        """The batch whose first descriptor page is there, and where it ends."""
        page = self.read(at, PAGE)
        number, first, pages, count, payload_pages = head = self.head(page)
        if first != 0 or not 1 <= pages <= PAGES_MAX or count > pages * DESCRIPTORS_PER_PAGE:
            raise DamageError("not the first page of a batch")
        descriptors = []
        for index in range(pages):
            page = self.read(at + index * PAGE, PAGE)
            if self.head(page) != (number, index, *head[2:]):
                raise DamageError("the pages of a batch disagree")
            here = min(DESCRIPTORS_PER_PAGE, count - len(descriptors))
            slots = range(64, 64 + here * 64, 64)
            descriptors += [struct.unpack_from("<QQB3xIII32s", page, slot) for slot in slots]
        payload = at + pages * PAGE
        return number, descriptors, payload, payload + payload_pages * PAGE

    def head(self, page):
        """Batch, page, pages, descriptors and payload pages of a descriptor page."""
        magic, segment, *head = struct.unpack_from("<4sIIHHII", page)
        if magic != b"DRBT" or segment != self.number:
            raise DamageError("not a descriptor page of this segment")
        check_page(page, 28, self.context, self.page_key)
        return tuple(head)

    def decrypt(self, stored, descriptor, place):
        """The stored bytes of a chunk in the clear, if they were written there with the key."""
        offset, length, kind, stored_bytes, page, _, digest = descriptor
        fields = (offset, length, kind, stored_bytes, page, 0, bytes(16) + digest[16:])
        associated = struct.pack("<QQB3xIII32s", *fields) + self.context
        nonce = struct.pack("<III", *place, 0)
        try:
            return self.cipher.decrypt(nonce, stored + digest[:16], associated)
        except Exception as error:
            raise DamageError("it was changed or put there by somebody without the key") from error

    def chunk(self, descriptor, payload, place):
        """The verified bytes of a chunk; None for zeros. `place`: its batch, and where in it."""
        offset, length, kind, stored_bytes, page, crc, digest = descriptor
        if offset + length > self.size:
            raise DamageError("it lies outside the volume")
        if kind == ZERO:
            return None
        if kind not in (DATA, ZSTD):
            raise DamageError("its source could not be read")
        if length > CHUNK_MAX or stored_bytes > length:
            raise DamageError("it has an impossible length")
        stored = self.read(payload + page * PAGE, stored_bytes)
        if crc32c(stored) != crc:
            raise DamageError("it does not match its CRC32C")
        if self.cipher is not None:
            stored = self.decrypt(stored, descriptor, place)
        plain = unpack(stored, length) if kind == ZSTD else stored
        if len(plain) != length:
            raise DamageError("it has another length")
        if self.cipher is None and blake3 is not None and blake3(plain).digest() != digest:
            raise DamageError("it does not match its BLAKE3")
        return plain


# The whole -------------------------------------------------------------------------------------


class Medium:
    """One directory of a bundle."""

    def __init__(self, directory, keys):
        self.directory = directory
        self.manifest, self.key = read_manifest(directory, keys)
        self.begin = self.manifest["begin"]
        self.cut = self.begin["generation"], self.begin["cut"]

    def follows(self, older):
        """Whether what changed up to here changed since that cut, wherever it was."""
        base = self.begin.get("base")
        same = all(self.begin[name] == older.begin[name] for name in ("volume", "size"))
        if not same or base is None or base.get("scope") is not None:
            return False
        return (base["generation"], base["cut"]) == older.cut


def read_media(directories, keys):
    """The media of each bundle, the oldest bundle first."""
    bundles = {}
    for directory in directories:
        medium = Medium(directory, keys)
        bundles.setdefault(json.dumps(medium.begin, sort_keys=True), []).append(medium)
    layers = sorted(bundles.values(), key=lambda media: (media[0].cut, "base" in media[0].begin))
    for (older, *_), (newer, *_) in zip(layers, layers[1:]):
        if not newer.follows(older):
            raise RefusedError(
                "expected media of one bundle, or also of incremental bundles that go on from it "
                f"one after the other; {older.directory} (cut {older.cut[1]}) and "
                f"{newer.directory} (cut {newer.cut[1]}) do not: restore each alone"
            )
    return layers


def joined(runs):
    """The same bytes in runs that ascend and do not touch."""
    found = []
    for start, end in sorted(run[:2] for run in runs):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((start, end))
    return found


def gaps(runs, found):
    """The parts of `runs` that lie in none of the runs `found`; with what else a run says."""
    found = joined(found)
    ends = [end for _, end in found]
    for at, end, *rest in runs:
        for start, stop in found[bisect.bisect_right(ends, at) :]:
            if start >= end:
                break
            if start > at:
                yield (at, start, *rest)
            at = max(at, stop)
        if at < end:
            yield (at, end, *rest)


def recover_segment(segment, coverage, out):
    """Writes what a segment holds; the runs that are whole, and those damaged, with the reason."""
    found, damaged = [], []
    try:
        segment.check_header()
    except DamageError as error:
        complain(f"segment {segment.number}: {error}")
    for batch, descriptors, payload in segment.batches():
        for index, descriptor in enumerate(descriptors):
            run = (descriptor[0], descriptor[0] + descriptor[1])
            found.append(run)
            try:
                plain = segment.chunk(descriptor, payload, (batch, index))
            except DamageError as error:
                damaged.append((*run, str(error)))
            except OSError as error:
                damaged.append((*run, f"the medium cannot be read: {errno.errorcode[error.errno]}"))
            else:
                if plain is not None and out is not None:
                    out.seek(run[0])
                    out.write(plain)
    lost = gaps(coverage, found)
    damaged += [(*run, "the page that describes it is damaged") for run in lost]
    return list(gaps(coverage, damaged)), damaged


def recover_medium(medium, out):
    """The same of all segments of a medium."""
    whole, damaged = [], []
    for entry in medium.manifest["segments"]:
        try:
            segment = Segment(medium.directory, medium.manifest, entry, medium.key)
        except OSError as error:
            complain(f"segment {entry['number']}: {error}")
            damaged += [(*run, "its segment cannot be read") for run in entry["coverage"]]
            continue
        with segment.file:
            found, lost = recover_segment(segment, entry["coverage"], out)
        whole += found
        damaged += lost
    return whole, damaged


def recover(layers, out):
    """Goes through all bundles, writing to the file `out` if there is one; what is damaged, and
    what is absent, of which the bytes may be on other media."""
    damaged, absent = [], []
    for number, media in enumerate(layers):
        selection = media[0].begin["selection"]
        if out is not None and number == 0:
            out.truncate(media[0].begin["size"])
        elif out is not None:
            # Nothing older is left where this bundle has something newer to say.
            blank(selection, out)
        whole = []
        damaged, absent = list(gaps(damaged, selection)), list(gaps(absent, selection))
        lost = []
        for medium in media:
            found, bad = recover_medium(medium, out)
            whole += found
            lost += bad
        # Of a medium and a copy of it one may be whole where the other is not.
        damaged += sorted(set(gaps(lost, whole)))
        absent += gaps(selection, whole + lost)
    return sorted(damaged), joined(absent)


def blank(runs, out):
    """Zeros over what is there."""
    zeros = bytes(CHUNK_MAX)
    for start, end in runs:
        out.seek(start)
        for at in range(start, end, CHUNK_MAX):
            out.write(zeros[: end - at])


def describe(media):
    """Says what else there is to know of a bundle that was given in part."""
    begin = media[0].begin
    given = sorted({medium.manifest.get("medium", {}).get("number", 1) for medium in media})
    several = [medium.manifest["medium"] for medium in media if "medium" in medium.manifest]
    last = max([medium["number"] for medium in several if medium["last"]], default=None)
    lacking = [str(number) for number in range(1, last or given[-1]) if number not in given]
    if several and last is None:
        lacking.append(f"whatever comes after {given[-1]}")
    if lacking:
        complain(f"bundle {begin['bundle']}: media not given: {', '.join(lacking)}")


def complain(text):
    """Says something to the human who restores."""
    print(text, file=sys.stderr)


def total(runs):
    """The bytes of runs that do not touch."""
    return sum(end - start for start, end in runs)


def main(arguments):
    """The command line; returns the exit code."""
    keys = []
    while len(arguments) > 2 and arguments[0] == "--key":
        keys.append(Key(arguments[1]))
        arguments = arguments[2:]
    if not arguments or arguments[0].startswith("-"):
        complain(__doc__)
        return 2
    writes = len(arguments) > 1 and not Path(arguments[-1]).is_dir()
    layers = read_media(arguments[:-1] if writes else arguments, keys)
    if writes:
        # A new file, so that what is not written is a hole that reads as zeros.
        with Path(arguments[-1]).open("xb") as out:
            damaged, absent = recover(layers, out)
            out.flush()
            os.fsync(out.fileno())
    else:
        damaged, absent = recover(layers, None)
    for start, end, why in damaged:
        complain(f"damaged: bytes {start} to {end}: {why}")
    for start, end in absent:
        complain(f"absent: bytes {start} to {end}: on a medium that was not given")
    for media in layers:
        describe(media)
    first = layers[0][0].begin
    if first.get("base") is not None:
        complain(f"only what changed since cut {first['base']['cut']}: the rest reads as zeros")
    selected = joined(run for media in layers for run in media[0].begin["selection"])
    whole = total(selected) - total(joined(damaged + absent))
    checks = "CRC32C (install blake3 for its hashes)" if blake3 is None else "CRC32C and BLAKE3"
    checks = "AES-256-GCM and HMAC-SHA256" if keys else checks
    print(
        f"{whole} of {total(selected)} selected bytes of a volume of {first['size']} bytes, "
        f"checked by {checks}"
    )
    return 3 if damaged or (writes and absent) else 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (OSError, RefusedError) as error:
        sys.exit(f"recover.py: {error}")
