"""What a stream consumer tells Prometheus."""

from collections import Counter
from collections.abc import Iterator

import numpy as np
from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from engagement.errors import EvergreenError
from evergreen.settings import LOOPBACK

DELAY_BUCKETS = np.array([0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0, 600.0, 3600.0])  # seconds, `<=`


class StreamMetrics(Collector):
    """Counts of one consumer since it started; whole batches are counted at once.

    Attributes:
        records: Records read.
        batches: Batches written.
        idle: Records without an action.
        quarantined: Records by the reason for which they were put aside.
    """

    def __init__(self) -> None:
        self.records = self.batches = self.idle = 0
        self.quarantined: Counter[str] = Counter()
        self._delays = np.zeros(len(DELAY_BUCKETS) + 1, np.int64)
        self._delay_sum = 0.0

    def serve(self, address: str) -> None:
        """Answer at `host:port`, in a thread of its own.

        Raises:
            EvergreenError: That is no address, or it cannot be listened at.
        """
        host, _, port = address.rpartition(":")
        registry = CollectorRegistry()
        registry.register(self)
        try:
            start_http_server(int(port), host or LOOPBACK, registry)
        except (OSError, ValueError, OverflowError) as error:
            raise EvergreenError(f"no metrics at {address!r} ({error})", "Give a free host:port") from error

    def delays(self, seconds: np.ndarray) -> None:
        """Count how long each action took from when it became known until it was a feature."""
        place = np.searchsorted(DELAY_BUCKETS, seconds, side="left")
        self._delays += np.bincount(place, minlength=len(self._delays))
        self._delay_sum += float(seconds.sum())

    def collect(self) -> Iterator[Metric]:
        """The metrics, as Prometheus' client asks for them."""
        for name, value, text in (
            ("records", self.records, "Records read"),
            ("batches", self.batches, "Batches written to the online store"),
            ("idle", self.idle, "Records without any action"),
        ):
            yield CounterMetricFamily(f"evergreen_stream_{name}", text, value=value)
        quarantined = CounterMetricFamily("evergreen_stream_quarantined", "Records put aside", labels=["reason"])
        for reason, count in sorted(self.quarantined.items()):
            quarantined.add_metric([reason], count)
        yield quarantined
        counts = np.cumsum(self._delays).tolist()
        bounds = [*(str(b) for b in DELAY_BUCKETS), "+Inf"]
        yield HistogramMetricFamily(
            "evergreen_stream_delay_seconds",
            "From when an action became known until it is an online feature",
            buckets=list(zip(bounds, counts, strict=True)),
            sum_value=self._delay_sum,
        )
