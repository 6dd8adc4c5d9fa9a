"""A small feed with a rhythm, as a ranking table, for the tests of the drift monitors.

People of two countries: at night and on weekends more of them are German, who are older. Nothing else happens.
"""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import numpy as np

from engagement.table import Feature, RankingTable, TableSpec, hash_id, micros
from monitoring.compare import Window
from monitoring.sketch import feature_blocks

START = datetime(2026, 3, 2, tzinfo=UTC)  # a Monday
DAYS = 42
TRAINED = START + timedelta(days=28)
SPEC = TableSpec(
    (
        Feature("user_id", "request", "categorical"),
        Feature("user_profile__country", "request", "categorical"),
        Feature("user_profile__age", "request", "numeric"),
        Feature("user_stats__clicks_7d", "request", "numeric", transform="log1p"),
        Feature("hour_of_day", "request", "categorical"),
        Feature("item_id", "candidate", "categorical"),
        Feature("item_profile__topic", "candidate", "categorical"),
        Feature("item_profile__tags", "candidate", "categories", 3),
        Feature("item_profile__price", "candidate", "numeric"),
        Feature("item_profile__look", "candidate", "embedding", 4),
        Feature("item_profile__fixed", "candidate", "numeric"),
    ),
    ("save", "hide"),
    "save",
    ("hide",),
)
PER_HOUR, CANDIDATES, USERS, ITEMS = 22, 4, 400, 300


def hashed(name: str, values: list[str]) -> np.ndarray:
    """Hashes of a column's values."""
    return np.array([hash_id(name, v) for v in values])


def feed(days: int = DAYS, seed: int = 0, holidays: tuple[int, ...] = ()) -> RankingTable:
    """A feed of so many days; on `holidays`, days since its start, people behave as on a Sunday."""
    rng = np.random.default_rng(seed)
    hours = np.arange(days * 24)
    free = ((hours // 24 % 7) >= 5) | np.isin(hours // 24, holidays)
    count = rng.poisson(PER_HOUR * np.where(free, 1.4, 1.0) * (1 + 0.4 * np.sin(hours % 24 / 24 * 2 * np.pi)))
    hour = np.repeat(hours, count)
    time = np.sort(micros(START) + hour * 3_600_000_000 + rng.integers(0, 3_600_000_000, len(hour)))
    german = rng.random(len(hour)) < np.where(free[hour], 0.75, 0.3)
    user = rng.integers(0, USERS // 2, len(hour)) + german * (USERS // 2)
    age = np.where(np.arange(USERS) >= USERS // 2, 45, 30) + np.random.default_rng(1).normal(0, 8, USERS)
    clicks = np.log1p(rng.poisson(np.random.default_rng(2).lognormal(2, 0.7, USERS)[user]))
    item = rng.integers(0, ITEMS, len(hour) * CANDIDATES)
    fixed = np.random.default_rng(3)
    topic, price = fixed.integers(0, 12, ITEMS), fixed.lognormal(1, 0.8, ITEMS)
    look = fixed.normal(0, 1, (ITEMS, 4)).astype(np.float32)
    tags = hashed("item_profile__tags", [f"tag{i}" for i in range(50)])[fixed.integers(0, 50, (ITEMS, 3))]
    tags[fixed.random((ITEMS, 3)) < 0.3] = 0
    request_cat = [
        hashed("user_id", [f"u{u}" for u in range(USERS)])[user],
        hashed("user_profile__country", ["nl", "de"])[german.astype(int)],
        hashed("hour_of_day", [str(h) for h in range(24)])[hour % 24],
    ]
    item_cat = [
        hashed("item_id", [f"i{i}" for i in range(ITEMS)])[item][:, None],
        hashed("item_profile__topic", [f"topic{i}" for i in range(12)])[topic[item]][:, None],
        tags[item],
    ]
    n = len(item)
    return RankingTable(
        spec=SPEC,
        request_id=np.array([f"r{seed}-{i}" for i in range(len(hour))], np.bytes_),
        user_id=np.array([f"u{u}" for u in range(USERS)], np.bytes_)[user],
        time=time,
        offsets=np.arange(len(hour) + 1) * CANDIDATES,
        history_start=np.zeros(len(hour), np.int64),
        history_end=np.zeros(len(hour), np.int64),
        request_cat=np.stack(request_cat, axis=1),
        request_num=np.stack([age[user], clicks], axis=1).astype(np.float32),
        item_id=np.array([f"i{i}" for i in range(ITEMS)], np.bytes_)[item],
        item_cat=np.concatenate(item_cat, axis=1),
        item_num=np.concatenate([price[item][:, None], look[item], np.full((n, 1), 7.0)], axis=1).astype(np.float32),
        labels=(rng.random((n, 2)) < [0.1, 0.02]).astype(np.uint8),
        sampled=np.zeros(n, bool),
        history_time=np.zeros(0, np.int64),
        history_item=np.zeros(0, np.int64),
        history_actions=np.zeros(0, np.int64),
    )


def predicted(table: RankingTable) -> np.ndarray:
    """(N, A) what a model might predict of it: older people save more, of what is cheap; no age counts as 30."""
    known = np.nan_to_num(table.request_num[:, 0], nan=30, posinf=30)
    logit = np.repeat((known - 35) / 20, np.diff(table.offsets)) - table.item_num[:, 0] / 10 - 2
    return (1 / (1 + np.exp(-np.stack([logit, -logit - 5], axis=1)))).astype(np.float32)


def window(table: RankingTable, start: datetime, end: datetime, names: dict | None = None) -> Window:
    """A window of a feed, all of it scored."""
    part = table.between(micros(start), micros(end))
    return Window(start, end, part, part, predicted(part), names or {})


def put(of: Window, name: str, values: object) -> Window:
    """The window with the values of one feature replaced, and scored anew."""
    t = of.table
    fields = ("request_cat", "request_num", "item_cat", "item_num")
    copy = replace(t, **{field: np.array(getattr(t, field)) for field in fields})
    next(block for feature, block in feature_blocks(copy) if feature.name == name)[:] = values
    return replace(of, table=copy, part=copy, scores=predicted(copy))
