"""Answers to log, and logs of them: no model, no server, no waiting."""

from datetime import UTC, datetime, timedelta

import numpy as np

from serving.protocol import RankRequest
from serving.serving_log import Served, ServingLog, keeps_features
from tests.serving_lab import ACTIONS, SPEC, small_table

AT = datetime(2024, 3, 5, 12, tzinfo=UTC)


def served(n=0, user="u1", items=("a", "b", "c"), minutes=0, seed=0, **options):
    """A good answer to request `r<n>`, best first by the primary score, unless told otherwise."""
    scores_CA = np.random.default_rng([seed, n]).random((len(items), len(ACTIONS))).astype(np.float32)
    request = RankRequest(f"r{n}", user, tuple(items))
    ranked = {"order_C": np.argsort(-scores_CA[:, 0], kind="stable"), "scores_CA": scores_CA}
    told = {"request": request, "at": AT + timedelta(minutes=minutes), "status": 200, "latency_ms": 4.0, "bucket": 7}
    return Served(**(told | ranked | options))


def failed(n=0, status=500, **options):
    """A request without an answer."""
    return served(n, **({"status": status, "order_C": None, "scores_CA": None} | options))


def with_features(n, user, as_of=AT):
    """An answer whose features are kept: request ids are counted on from `n` until one is in the sample."""
    while not keeps_features(f"r{n}"):
        n += 1
    one = small_table(requests=1, candidates=3, seed=n)
    return n + 1, served(n, user, features=_of(one, user), as_of=as_of)


def _of(table, user):
    from dataclasses import replace

    return replace(table, user_id=np.array([user.encode()]))


def write(directory, *answers, version="1", spec=SPEC):
    """One server's life: it logs these answers and stops."""
    log = ServingLog(directory, version, spec)
    for answer in answers:
        log.write(answer)
    log.close()
