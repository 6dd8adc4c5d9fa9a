"""A real day lived through: statistics are materialised every hour, actions are streamed as they become known, and what
each request then reads online is held against the offline store as of the same instants."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import polars as pl
import pyarrow as pa
import pytest

from engagement.importers import kuairand, movielens
from engagement.store import EngagementStore
from engagement.table import RankingTable
from feature_repo.parity import STALE, Asked, Parity, compare
from feature_repo.repo import FeatureRepo
from feature_repo.stream import consume
from feature_repo.stream_records import encode
from feature_repo.stream_sources import Batch
from tests.features_world import scratch

HOUR = timedelta(hours=1)
KUAIRAND = Path(__file__).parents[3] / "shared" / "data" / "kuairand-pure-2w"


@dataclass
class Day:
    """The requests of some hours and the actions that became known in them."""

    store: EngagementStore
    start: datetime
    end: datetime
    limit: int

    def rows(self) -> pl.DataFrame:
        return pl.DataFrame(self.store.snapshot(self.end + timedelta(days=30)).engagements(self.start, self.end))

    def asked(self) -> list[Asked]:
        """Every n-th request, in time order."""
        rows = self.rows()
        context = list(self.store.manifest.context_features)
        first = [pl.col("user_id").first(), pl.col("event_timestamp").min(), *(pl.col(c).first() for c in context)]
        requests = rows.group_by("request_id").agg(pl.col("item_id").unique(), *first)
        requests = requests.filter(pl.col("event_timestamp") >= self.start).sort("event_timestamp", "request_id")
        return [
            Asked(r["user_id"], tuple(sorted(r["item_id"])), {c: r[c] for c in context if r[c]}, r["event_timestamp"])
            for r in requests.gather_every(max(1, -(-len(requests) // self.limit))).to_dicts()
        ]

    def actions(self) -> pl.DataFrame:
        """Real rows with an action and when each became known, in that order."""
        acted = pl.any_horizontal(pl.col(a) for a in self.store.manifest.actions)
        known = pl.max_horizontal("event_timestamp", "created_timestamp").alias("known")
        return self.rows().filter(~pl.col("sampled") & acted).with_columns(known).sort("known", maintain_order=True)


class Once:
    """A source that delivers some records and is over."""

    partitioned = False

    def __init__(self, raw: list[bytes]) -> None:
        self.batch, self.over = Batch(raw, [str(i) for i in range(len(raw))], None), False

    def read(self, max_records: int, timeout: float) -> Batch:
        return self.batch

    def commit(self, batch: Batch) -> None:
        self.over = True

    def close(self) -> None:
        pass


def stream(repo: FeatureRepo, rows: pa.Table) -> None:
    source = Once([raw for _, raw in encode(rows, repo.online().spec.actions)])
    consume(repo.root, "", source, lambda: source.over)
    assert not list((repo.root / "quarantine").glob("*.parquet"))


def live(day: Day, repo: FeatureRepo, every: timedelta = HOUR, streamed: bool = True) -> Parity:
    """Serve the day's requests as they come; returns how what they read compares with the offline store."""
    tick, pushed, actions = day.start, 0, day.actions()
    repo.materialize(day.store.snapshot(tick))
    reader = repo.online()
    asked, read, as_of = day.asked(), [], []
    known = actions["known"].to_list()
    for request in asked:
        while tick + every <= request.at:
            tick += every
            repo.materialize(day.store.snapshot(tick))
        now = pushed
        while streamed and now < len(known) and known[now] < request.at:
            now += 1
        if now > pushed:
            stream(repo, actions[pushed:now].drop("known").to_arrow())
            pushed = now
        read.append(reader.read(request.user_id, list(request.item_ids), dict(request.context), request.at))
        as_of.append(reader.as_of)
    assert isinstance(read[0], RankingTable)
    return compare(repo, day.store.snapshot(day.end), asked, read, as_of)


@pytest.fixture(scope="module")
def movielens_day() -> Day:
    store = EngagementStore(scratch() / "data")
    store.append(movielens.read(movielens.fetch(scratch()), last_days=60))
    return Day(store, datetime(1998, 4, 1, 0, tzinfo=UTC), datetime(1998, 4, 2, 0, tzinfo=UTC), limit=150)


def test_every_feature_of_a_movielens_day_is_the_same_online_and_offline(movielens_day):
    parity = live(movielens_day, FeatureRepo(scratch() / "features"))
    assert parity.requests >= 10
    assert parity.values > 10_000
    # People who came for the first time: MovieLens knows them from their first request on, the store an hour later.
    assert {s.feature.split("__")[0] for s in parity.skews} <= {"user_profile"}, [
        f"{s.feature}: {s}" for s in parity.skews
    ]
    assert parity.unexplained == ()


def test_a_store_that_lags_is_told_as_stale_feature_by_feature(movielens_day):
    parity = live(movielens_day, FeatureRepo(scratch() / "features"), every=timedelta(days=1), streamed=False)
    assert parity.share > 0
    named = {s.feature: s.causes for s in parity.skews}
    assert "user_history" in named
    assert any(name.endswith("_1h") for name in named)
    assert all(set(causes) == {STALE} for causes in named.values()), named
    assert parity.unexplained == ()


@pytest.mark.skipif(not KUAIRAND.exists(), reason="the KuaiRand sample is not beside the project")
def test_every_feature_of_a_kuairand_day_is_the_same_online_and_offline():
    store = EngagementStore(scratch() / "data")
    store.append(kuairand.read(KUAIRAND))
    noon = datetime(2022, 5, 6, 4, tzinfo=UTC)
    parity = live(Day(store, noon, noon + 6 * HOUR, limit=120), FeatureRepo(scratch() / "features"))
    assert parity.requests >= 100
    assert parity.values > 10_000
    assert parity.skews == (), [f"{s.feature}: {s}" for s in parity.skews]
