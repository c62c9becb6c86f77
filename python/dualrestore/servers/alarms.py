"""What an operator should hear of before it does harm, in words.

| sign | lasts |
|---|---|
| the preservation store runs low | from its low-water mark on, while there are snapshots to break |
| a snapshot broke | until it is deleted |

Guarantees: one that goes on is logged once, and once more when it is over. Looking is cheap:
nothing is counted for it. Does not know: who reads the log.
"""

import logging
from typing import TYPE_CHECKING, Any

from dualrestore.errors import DualRestoreError
from dualrestore.sizes import format_size

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dualrestore.core import BackupVolume

log = logging.getLogger("dualrestore.warnings")

LOOK_SECONDS = 2.0


def _keyed(name: str, told: dict[str, Any]) -> dict[str, str]:
    """The warnings of a backup, by what they are about, of what `preservation` says."""
    found = {}
    if told["store_low"]:
        found["store"] = (
            f"the store of old contents runs low: {format_size(told['store_free_bytes'])} of "
            f"{format_size(told['store_total_bytes'])} are free; make room on the file system of "
            "the state directory, finish bundles or delete snapshots, or writes will break them"
        )
    for snapshot, reason in told["snapshots_broken"].items():
        found[snapshot] = (
            f"snapshot {name}@{snapshot} broke and can be read no more: {reason}; delete it and "
            "take a new one"
        )
    return found


def warnings_of(name: str, told: dict[str, Any]) -> list[str]:
    """The same in words alone."""
    return list(_keyed(name, told).values())


def warnings_in(document: dict[str, Any]) -> set[tuple[str, str]]:
    """All in the status of a node, each with the name of its volume."""
    return {
        (volume["name"], _without_figures(words))
        for volume in document["volumes"]
        for words in volume.get("warnings", [])
    }


def _without_figures(words: str) -> str:
    """What stays the same while a warning goes on."""
    return words.partition(": ")[0] if words.startswith("the store") else words


class Watch:
    """Remembers what was said of some backups, so that only news are logged."""

    def __init__(self, backups: "Mapping[str, BackupVolume]") -> None:
        self._backups = backups
        self._said: dict[tuple[str, str], str] = {}

    def look(self) -> None:
        """Logs what is new, and what is over."""
        found: dict[tuple[str, str], str] = {}
        for name, backup in self._backups.items():
            try:
                told = backup.preservation()
            except DualRestoreError as problem:
                log.debug("%s: cannot be looked at: %s", name, problem)
                continue
            found |= {(name, about): words for about, words in _keyed(name, told).items()}
        for key in found.keys() - self._said.keys():
            log.warning("%s: %s", key[0], found[key])
        for key in self._said.keys() - found.keys():
            about = "the store of old contents" if key[1] == "store" else f"snapshot {key[1]}"
            log.info("%s: %s: no longer a matter of concern", key[0], about)
        self._said = found
