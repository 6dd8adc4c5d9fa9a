"""A predictor's counters without a predictor: `ranker_counters.py PORT` answers `/metrics` until it is stopped."""

import sys
import time

from prometheus_client import start_http_server

from serving.batcher import Run
from serving.metrics import Metrics


def main(port: int) -> None:
    metrics = Metrics("7")
    start_http_server(port, "127.0.0.1")
    while True:
        for status, degraded in ((200, ""), (200, "cached"), (200, "popularity"), (500, ""), (504, ""), (429, "")):
            metrics.answered(status, degraded, 0.02)
        metrics.refused(400)
        metrics.shed("low")
        metrics.features(0.005)
        metrics.run(Run(requests=2, seconds=0.01, waited=[0.001, 0.002]))
        time.sleep(0.05)


if __name__ == "__main__":
    main(int(sys.argv[1]))
