"""A real predictor, in a process of its own, over a model that needs no training and can be told to misbehave.

All else is real: KServe's server, both doors, batcher, admission. Run as a program: `serving_small.py PORT GRPC_PORT`.
An item's score is a hash of its id; items named `slow` (a run takes long), `heavy` (each request of
a run takes long), `nan` and `boom` do as they say. A user named `nobody-knows` has no features: popularity answers.
"""

import sys
import time
import zlib

import numpy as np

from engagement.table import Feature, RankingTable, TableSpec
from evergreen.settings import LOOPBACK

MODEL, VERSION, STRANGER = "homefeed-ranker", "7", "nobody-knows"
SLOW, HEAVY = 0.6, 0.03  # seconds
ACTIONS = ("save", "click")
SPEC = TableSpec(
    (
        Feature("user_id", "request", "categorical"),
        Feature("context__surface", "request", "categorical"),
        Feature("item_id", "candidate", "categorical"),
    ),
    ACTIONS,
    "save",
)


def scores(item: str) -> list[float]:
    """What the model thinks of an item; no user matters here."""
    return [zlib.crc32(f"{action}/{item}".encode()) % 10_000 / 10_000 for action in ACTIONS]


class SmallRanker:
    """A `serving.predictor.Ranker`."""

    spec = SPEC

    def score(self, tables):
        shown = {i.decode() for t in tables for i in t.item_id}
        time.sleep(SLOW * ("slow" in shown) + HEAVY * sum(b"heavy" in t.item_id for t in tables))
        if "boom" in shown:
            raise RuntimeError("boom")
        return [self.popular([i.decode() for i in t.item_id]) for t in tables]

    def popular(self, item_ids):
        return np.array([[np.nan] * 2 if i == "nan" else scores(i) for i in item_ids], np.float32)


def table_of(user: str, items: list[str]) -> RankingTable:
    """A request as a table; only its item ids are read here."""
    rows, empty = len(items), np.empty(0, np.int64)
    return RankingTable(
        spec=SPEC,
        request_id=np.array(["r"], "S"),
        user_id=np.array([user.encode()]),
        time=np.zeros(1, np.int64),
        offsets=np.array([0, rows], np.int64),
        history_start=np.zeros(1, np.int64),
        history_end=np.zeros(1, np.int64),
        request_cat=np.ones((1, 2), np.int64),
        request_num=np.empty((1, 0), np.float32),
        item_id=np.array([i.encode() for i in items]),
        item_cat=np.ones((rows, 1), np.int64),
        item_num=np.empty((rows, 0), np.float32),
        labels=np.zeros((rows, 2), np.uint8),
        sampled=np.zeros(rows, bool),
        history_time=empty,
        history_item=empty,
        history_actions=empty,
    )


def main() -> None:
    from serving.degrade import Features
    from serving.predictor import RankerPredictor
    from serving.server import run

    async def features(request, at, within):
        if request.user_id == STRANGER:
            return Features(None, "popularity")
        return Features(table_of(request.user_id, list(request.item_ids)), as_of=at)

    port, grpc_port = (int(a) for a in sys.argv[1:3])
    sys.argv = sys.argv[:1]
    run(RankerPredictor(MODEL, VERSION, SmallRanker(), features, lambda served: None), LOOPBACK, port, grpc_port)


if __name__ == "__main__":
    main()
