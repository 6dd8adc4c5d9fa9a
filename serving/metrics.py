"""What a predictor counts, for Prometheus, on KServe's `/metrics`; each series carries the model's version.

Resident memory, CPU and open files are there already (`process_*`). KServe's own histograms begin at 5 ms and know no
status codes.
"""

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Histogram

from serving.batcher import Run

# Seconds: fine where answers are (1 to 100 ms), coarse above.
SECONDS = (
    *(0.001, 0.0015, 0.002, 0.003, 0.004, 0.005, 0.0075, 0.01, 0.015),
    *(0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5),
)
STAGE_SECONDS = (0.0001, 0.00025, 0.0005, *SECONDS[:-2])
BATCH = (1, 2, 3, 4, 6, 8, 12, 16, 32)
FEATURES, QUEUE, MODEL = "features", "queue", "model"


class Metrics:
    """The counters of one predictor.

    Args:
        version: Of the model.
        registry: Where they are exported.
    """

    def __init__(self, version: str, registry: CollectorRegistry = REGISTRY) -> None:
        def histogram(name: str, says: str, buckets: tuple[float, ...], *more: str) -> Histogram:
            return Histogram(f"ranker_{name}", says, ["version", *more], buckets=buckets, registry=registry)

        requests = Counter("ranker_requests", "Answers", ["version", "status", "degraded"], registry=registry)
        shed = Counter("ranker_shed", "Requests shed by overload", ["version", "priority"], registry=registry)
        stages = histogram("stage_seconds", "Time a request spends in a stage", STAGE_SECONDS, "stage")
        self._version, self._requests, self._shed = version, requests, shed
        self._latency = histogram("request_seconds", "From body read to answer ready", SECONDS).labels(version)
        self._batch = histogram("batch_requests", "Requests merged into one run", BATCH).labels(version)
        self._features, self._queue, self._model = (stages.labels(version, s) for s in (FEATURES, QUEUE, MODEL))

    def answered(self, status: int, degraded: str, seconds: float) -> None:
        """One request has its answer, of whatever status; `degraded` is empty when it is not."""
        self._requests.labels(self._version, str(status), degraded or "no").inc()
        self._latency.observe(seconds)

    def refused(self, status: int) -> None:
        """One request was no ranking request."""
        self._requests.labels(self._version, str(status), "no").inc()

    def shed(self, priority: str) -> None:
        """One request was turned away."""
        self._shed.labels(self._version, priority).inc()

    def features(self, seconds: float) -> None:
        """Features of one request were there after so long."""
        self._features.observe(seconds)

    def run(self, run: Run) -> None:
        """The model ran."""
        self._batch.observe(run.requests)
        self._model.observe(run.seconds)
        for waited in run.waited:
            self._queue.observe(waited)
