"""Two machines on one: network namespaces joined by a cable (veth), with addresses of their own.

Guarantees: they are gone when the test process is, however it ends; nothing outside them changes.
Does not know: what runs inside.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.e2e.harness import run, wait_until

ADDRESSES = ("192.0.2.1", "192.0.2.2")
"""Of documentation (RFC 5737): nobody's."""


class Machine:
    """One namespace, held open by a process that does nothing."""

    def __init__(self, address: str) -> None:
        self.address = address
        # From here on the kernel ends it when we end.
        hold = ["unshare", "--net", "setpriv", "--pdeathsig", "KILL", "sleep", "infinity"]
        self._holder = subprocess.Popen(hold, stdin=subprocess.DEVNULL)
        self.pid = self._holder.pid
        place = Path(f"/proc/{self.pid}/ns/net")
        ours = Path("/proc/self/ns/net").readlink()
        wait_until("the namespace is there", lambda: place.readlink() != ours)
        self.inside = ["nsenter", f"--net={place}"]

    def close(self) -> None:
        """Gives it up."""
        self._holder.kill()
        self._holder.wait()


class Machines:
    """The two, and the cable between them."""

    def __init__(self) -> None:
        self.both: list[Machine] = []

    def __enter__(self) -> Machines:
        """Makes them."""
        try:
            self.both = [Machine(address) for address in ADDRESSES]
            one, other = self.both
            ends = ["type", "veth", "peer", "name", "cable", "netns", str(other.pid)]
            run(["ip", "link", "add", "cable", "netns", str(one.pid), *ends])
            for machine in self.both:
                address = f"{machine.address}/24"
                run([*machine.inside, "ip", "address", "add", address, "dev", "cable"])
                run([*machine.inside, "ip", "link", "set", "lo", "up"])
                run([*machine.inside, "ip", "link", "set", "cable", "up"])
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *problem: object) -> None:
        """Gives both up."""
        self.close()

    def close(self) -> None:
        """Gives both up."""
        for machine in self.both:
            machine.close()

    def pull_the_cable(self) -> None:
        """Nothing goes through; nobody is told."""
        run([*self.both[0].inside, "ip", "link", "set", "cable", "down"])

    def plug_it_in(self) -> None:
        """As before."""
        run([*self.both[0].inside, "ip", "link", "set", "cable", "up"])
