"""The tester of the NBD reference implementation against our daemons, in all its modes.

`python -m tests.conformance [SOURCE]`: SOURCE is an unpacked source tree of `nbd`; without it the
Debian source package is fetched (`apt-get source nbd`, through a package list of its own, so that
the machine's is left alone). Needs a C compiler, libglib2.0-dev and libgnutls28-dev. None of the
tester's code is kept. It is compiled as it is, but for one word: it speaks TLS 1.2 and nothing
else, which we refuse, so it is told 1.3. It is not part of `tests/run`, since it needs a network
and a mirror that holds sources.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import trustme

from tests.e2e.harness import MIB, Pair, run
from tests.e2e.pki import set_tls, write_pki

MIRROR = "http://deb.debian.org/debian"
CONFIG = "#define HAVE_FDATASYNC 1\n#define HAVE_MKSTEMP 1\n#define HAVE_GNUTLS 1\n"
SOURCES = ("tests/run/nbd-tester-client.c", "cliserv.c", "buffer.c")
TLS_SOURCE = "crypto-gnutls.c"
SECONDS = 600.0


class Mode(NamedTuple):
    """One way to run the tester: its words, and the bytes of a fresh volume."""

    name: str
    words: tuple[str, ...]
    size: int


def modes(source: Path) -> list[Mode]:
    """All of them."""
    log = source / "tests/run/integrity-test.tr"
    huge = source / "tests/run/integrityhuge-test.tr"
    return [
        Mode("reads", (), 4 * MIB),
        Mode("writes", ("-w",), 4 * MIB),
        Mode("writes and flushes", ("-w", "-f"), 4 * MIB),
        Mode("requests too large", ("-o",), 4 * MIB),
        Mode("handshake", ("-h",), 4 * MIB),
        Mode("integrity", ("-i", "-t", str(log)), 50 * MIB),
        Mode("integrity, loosely ordered", ("-i", "-l", "-t", str(log)), 50 * MIB),
        Mode("integrity, huge requests", ("-i", "-t", str(huge)), 50 * MIB),
    ]


def fetch(place: Path) -> Path:
    """The Debian source package, unpacked."""
    lists = place / "lists"
    (lists / "partial").mkdir(parents=True)
    (place / "sources.list").write_text(f"deb-src {MIRROR} stable main\n")
    private = [f"Dir::State::lists={lists}", f"Dir::Etc::sourcelist={place}/sources.list"]
    options = [word for one in [*private, "Dir::Etc::sourceparts=-"] for word in ("-o", one)]
    run(["apt-get", "-qq", *options, "update"])
    subprocess.run(["apt-get", "-qq", *options, "source", "nbd"], cwd=place, check=True)
    (source,) = (path for path in place.glob("nbd-*") if path.is_dir())
    return source


def build(source: Path, place: Path) -> Path:
    """Compiles the tester."""
    (place / "config.h").write_text(CONFIG)
    text = (source / TLS_SOURCE).read_text()
    (place / TLS_SOURCE).write_text(text.replace("+VERS-TLS1.2", "+VERS-TLS1.3"))
    flags = run(["pkg-config", "--cflags", "--libs", "glib-2.0", "gnutls"]).stdout.split()
    tester = place / "nbd-tester-client"
    includes = [f"-I{place}", f"-I{source}"]
    files = [str(place / TLS_SOURCE), *(str(source / name) for name in SOURCES)]
    run(["cc", "-O1", "-w", "-D_GNU_SOURCE", *includes, "-o", tester, *files, *flags])
    return tester


def attempt(tester: Path, mode: Mode, *, over: str) -> str:
    """Runs one mode against a fresh pair; what went wrong, nothing if all is well."""
    pair = Pair(mode.size)
    words = [str(tester), *mode.words, "-N", "v"]
    if over == "TLS":
        authority = trustme.CA()
        pki = write_pki(pair.directory / "pki", authority, authority)
        set_tls(pair.primary, pki)
        set_tls(pair.backup, pki)
        text = pair.primary.configuration.read_text()
        text = text.replace(f"tcp:127.0.0.1:{pair.port}", f"tcp:0.0.0.0:{pair.port}")
        pair.primary.configuration.write_text(text)
        words += ["-C", str(pki / "client-cert.pem"), "-K", str(pki / "client-key.pem")]
        words += ["-A", str(pki / "ca-cert.pem"), "-H", "localhost"]
    words += ["-u", str(pair.socket)] if over == "Unix" else ["127.0.0.1", str(pair.port)]
    with pair:
        finished = run(words, expect=None, seconds=SECONDS)
    return "" if finished.returncode == 0 else finished.stdout + finished.stderr


def main() -> int:
    """Runs every mode; the exit code says whether all passed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, nargs="?", help="a source tree of nbd")
    parser.add_argument("--only", default="", help="modes whose names hold this")
    chosen = parser.parse_args()
    failed = 0
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        source = (chosen.source or fetch(place)).resolve()
        tester = build(source, place)
        for mode in modes(source):
            # The handshake that it expects is one without TLS.
            for over in ("TCP", "Unix") if "-h" in mode.words else ("TCP", "Unix", "TLS"):
                name = f"{mode.name} over {over}"
                if chosen.only not in name:
                    continue
                begun = time.monotonic()
                problem = attempt(tester, mode, over=over)
                failed += bool(problem)
                print(f"{'FAILED' if problem else 'passed'}: {name}", end="")
                print(f" ({time.monotonic() - begun:.1f} s)\n{problem[-2000:]}", end="")
                sys.stdout.flush()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
