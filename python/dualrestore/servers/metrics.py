"""Numbers for Prometheus, made of one status at the moment they are asked for."""

from collections.abc import Iterable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_GAUGES = {
    "size": ("volume_bytes", "Size of the volume"),
    "current_bytes": ("current_bytes", "Bytes that the primary has"),
    "missing_bytes": ("missing_bytes", "Bytes that the primary lacks"),
    "unsent_bytes": ("unsent_bytes", "Bytes that a backup lacks"),
    "generation": ("generation", "Life of the volume"),
    "connections": ("nbd_connections", "Open NBD sessions"),
    "bytes_preserved": ("preserved_bytes", "Old contents kept for snapshots"),
    "store_free_bytes": ("store_free_bytes", "Room that is left for old contents"),
    "store_total_bytes": ("store_total_bytes", "The file system that they lie on"),
    "store_low": ("store_low", "1: little room is left, and snapshots are about to break"),
}
_COUNTERS = {
    "reads": ("reads", "Read requests"),
    "writes": ("writes", "Write requests"),
    "flushes": ("flushes", "Flush requests"),
    "bytes_read": ("read_bytes", "Bytes read by applications"),
    "bytes_written_live": ("written_bytes", "Bytes written by applications"),
    "bytes_fetched": ("fetched_bytes", "Missing bytes brought because someone asked"),
    "bytes_hydrated": ("hydrated_bytes", "Missing bytes brought in the background"),
    "bytes_merged": ("merged_bytes", "Missing bytes written from bundles"),
    "bytes_from_media": ("media_bytes", "Missing bytes read from attached media"),
    "bytes_skipped_current": ("merge_skipped_bytes", "Bytes of bundles that were current"),
    "bytes_resent": ("resent_bytes", "Bytes sent again to a backup"),
    "bytes_found_equal": ("found_equal_bytes", "Unsent bytes that a backup held already"),
    "bytes_mirrored": ("mirrored_bytes", "Bytes of writes applied by the backup"),
    "errors": ("errors", "Requests that failed"),
}


class _StatusCollector(Collector):
    def __init__(self, status: dict[str, Any]) -> None:
        self._status = status

    def collect(self) -> Iterable[Metric]:
        for name, key in (("sent", "link_bytes_sent"), ("received", "link_bytes_received")):
            yield CounterMetricFamily(
                f"dualrestore_link_{name}_bytes", f"Bytes {name} by links", self._status[key]
            )
        yield from self._volume_metrics()

    def _volume_metrics(self) -> Iterator[Metric]:
        kinds = ((_GAUGES, GaugeMetricFamily), (_COUNTERS, CounterMetricFamily))
        for table, family in kinds:
            for key, (name, text) in table.items():
                metric = family(f"dualrestore_{name}", text, labels=["volume", "role"])
                for volume in self._status["volumes"]:
                    if volume.get(key) is not None:
                        metric.add_metric([volume["name"], volume["role"]], float(volume[key]))
                yield metric
        media = GaugeMetricFamily(
            "dualrestore_attached_media",
            "Media that missing blocks are read from, by state",
            labels=["volume", "state"],
        )
        for volume in self._status["volumes"]:
            states = [medium["state"] for medium in volume.get("media", [])]
            for state in sorted(set(states)):
                media.add_metric([volume["name"], state], float(states.count(state)))
        yield media
        yield self._snapshots()
        mirrored = GaugeMetricFamily(
            "dualrestore_mirrored", "1: both sides are proven equal", labels=["volume"]
        )
        for volume in self._status["volumes"]:
            if "mirrored" in volume:
                mirrored.add_metric([volume["name"]], float(volume["mirrored"]))
        yield mirrored

    def _snapshots(self) -> Metric:
        snapshots = GaugeMetricFamily(
            "dualrestore_snapshots",
            "Snapshots, by whether they can be read",
            labels=["volume", "state"],
        )
        for volume in self._status["volumes"]:
            if "snapshots" in volume:
                whole = sum(1 for one in volume["snapshots"] if not one["broken"])
                for state, count in (
                    ("intact", whole),
                    ("broken", len(volume["snapshots_broken"])),
                ):
                    snapshots.add_metric([volume["name"], state], float(count))
        return snapshots


def metrics_text(status: dict[str, Any]) -> bytes:
    """The exposition of one status."""
    registry = CollectorRegistry()
    registry.register(_StatusCollector(status))
    return generate_latest(registry)
