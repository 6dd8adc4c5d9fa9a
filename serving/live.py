"""Evidence from the requests of real users: what the serving log says since the last look.

A request belongs to the arm that the split gives its user to, whoever answered it: one that the champion answered in
the challenger's place is a failure of the challenger. Where the gateway splits by chance, it belongs to the version
that answered it. What no version answered at all is in no log: behind Envoy the champion steps in, and that is seen.
"""

import time
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from engagement.index import from_us, to_us
from engagement.served import ANSWER, LIVE, SCORE, files, read, rows_of
from engagement.table import hash_id, hash_ids
from serving.buckets import threshold
from serving.evidence import CONSTANT_RANGE, PROBLEMS, Arm, Evidence
from serving.protocol import TOO_MANY
from serving.served_log import live_requests
from serving.traffic import Asked, Portion, Stage

LAG = timedelta(seconds=60)
"""A file of the log may appear so long after the instant in its name; a look goes back as far for those it missed."""


class LiveTraffic:
    """Watches live traffic by the serving log; asks nobody anything.

    Args:
        directory: The serving log.
        primary_action: Whose scores are looked at.
        pause: Seconds that a look takes, for users to do something; 0 where another source drives.
    """

    def __init__(self, directory: Path, primary_action: str, pause: float = 0.0) -> None:
        self._directory, self._score = Path(directory), f"{SCORE}{primary_action}"
        self._pause = pause

    def look(self, stage: Stage, mark: Any) -> Portion:
        """What was logged since the mark: instants and names of files that were read."""
        time.sleep(self._pause)
        mark = mark or {"through": 0, "read": []}
        since = to_us(stage.since.astimezone(UTC))
        start = max(since, mark["through"] - LAG // timedelta(microseconds=1))
        day = from_us(start).date() if start else date.min
        new = [f for f in files(self._directory, day) if _instant(f) >= start and f.name not in mark["read"]]
        answers = self._answers(rows_of(new), since)
        canary = pl.col("canary_bucket") < (threshold(stage.percent) if stage.champion else threshold(100))
        if not stage.doors.sticky:
            canary = pl.col("model_version") == stage.challenger
        champion, challenger = (
            _arm(_settled(mine, version))
            for version, mine in (
                (stage.champion, answers.filter(~canary)),
                (stage.challenger, answers.filter(canary)),
            )
        )
        through = max([mark["through"], *(_instant(f) for f in new)])
        near = through - LAG // timedelta(microseconds=1)
        names = {f.name for f in new} | set(mark["read"])
        read_lately = sorted(n for n in names if int(n.split("-")[0]) >= near)
        return Portion(Evidence(stage.percent, champion, challenger), {"through": through, "read": read_lately})

    def _answers(self, rows: pl.DataFrame, since: int) -> pl.DataFrame:
        """One row an answer of live users that arrived since an instant."""
        if self._score not in rows.columns:
            rows = rows.with_columns(pl.lit(None, pl.Float32).alias(self._score))
        arrived = pl.col("created_timestamp").dt.timestamp("us") - pl.col("latency_ms").cast(pl.Float64) * 1000
        rows = rows.filter((pl.col("purpose") == LIVE) & pl.col("canary_bucket").is_not_null() & (arrived >= since))
        score = pl.col(self._score).cast(pl.Float64)
        return rows.group_by(ANSWER, maintain_order=True).agg(
            pl.col("canary_bucket", "status", "degraded", "latency_ms").first(),
            score.mean().alias("score"),
            (score.max() - score.min()).alias("range"),
            pl.col("item_id").count().alias("items"),
            (~score.is_finite().fill_null(value=False)).any().alias("broken"),
            (score.sort_by("position").diff() > 0).any().alias("disordered"),
        )


def recent(directory: Path, context: list[str], since: datetime, limit: int) -> list[Asked]:
    """A sample of live requests since an instant, oldest first, to be put to both versions off the users' path.

    It is uniform, and a function of the requests' ids. Nobody knows yet what their users do.
    """
    requests = live_requests(read(directory, since, datetime.max.replace(tzinfo=UTC)), context)
    hashes = hash_ids(np.array([r.request_id.encode() for r in requests], dtype=np.bytes_), seed=limit)
    chosen = np.sort(np.argsort(hashes, kind="stable")[:limit])
    return [Asked(requests[i]) for i in chosen]


def _settled(answers: pl.DataFrame, version: str) -> pl.DataFrame:
    """Answers with `failed`: an error, or an answer by another version; several attempts that failed count once."""
    failed = (pl.col("status") != 200) | (pl.col("model_version") != version)
    marked = answers.with_columns(failed=failed).sort("created_timestamp", maintain_order=True)
    last = pl.struct("request_id", "user_id", "failed").is_last_distinct()
    return marked.filter(~pl.col("failed") | last)


def _arm(settled: pl.DataFrame) -> Arm:
    ok = ~pl.col("failed")
    by_model = ok & (pl.col("degraded") != "popularity")  # popularity is no score of the model's
    columns = settled.select(
        pl.col("failed"),
        (ok & (pl.col("broken") | pl.col("disordered").fill_null(value=False))).alias("invalid"),
        (by_model & (pl.col("items") > 1) & (pl.col("range") <= CONSTANT_RANGE)).fill_null(value=False).alias("same"),
        (ok & (pl.col("degraded") != "")).alias("degraded"),
        pl.when(ok).then(pl.col("latency_ms").cast(pl.Float64)).fill_null(np.nan).alias("latency"),
        pl.when(by_model).then("score").fill_null(np.nan).alias("score"),
    )
    return Arm(
        failed_N=columns["failed"].to_numpy(),
        invalid_N=columns["invalid"].to_numpy(),
        constant_N=columns["same"].to_numpy(),
        degraded_N=columns["degraded"].to_numpy(),
        latency_N=columns["latency"].to_numpy(),
        score_N=columns["score"].to_numpy(),
        user_N=np.array([hash_id("user_id", u) for u in settled["user_id"].to_list()], np.int64),
        problems=_problems(settled),
    )


def _problems(settled: pl.DataFrame) -> list[str]:
    found = []
    for row in settled.filter("failed").head(PROBLEMS).to_dicts():
        how = "was shed" if row["status"] == TOO_MANY else f"has status {row['status']}"
        how = f"was answered by v{row['model_version']}" if row["status"] == 200 else how
        found.append(f"request {row['request_id']} {how}")
    wrong = settled.filter(~pl.col("failed") & (pl.col("broken") | pl.col("disordered")))
    found += [f"request {r} has scores that are not finite or not in order" for r in wrong["request_id"].head(PROBLEMS)]
    return found[:PROBLEMS]


def _instant(path: Path) -> int:
    """Microseconds when a file of the log was begun."""
    return int(path.name.split("-")[0])
