"""Streams of a feed with a known truth: ordinary life, and one thing that happens to it.

A stream is 56 days long: 28 that the reference is trained on, then 28 that are watched; what happens, happens at a
random instant of the first three watched weeks. Ordinary life is a rhythm of days and weeks in volume and in who
comes (`world.make_users`), heavy-tailed users who come in bursts and whose rows share their features, users and items
that arrive and leave all the time, and several columns that wander from week to week (AR(1), 0.1 to 0.15 standard
deviations). The scores are read from the columns as they are served, so a broken feature moves them; the labels
follow the columns as they are in truth.
"""

from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Literal

import numpy as np

from benchmarks.drift import world
from benchmarks.drift.feed import BREAKABLE, MARKET_COLUMNS, SHOCKED, SLOW, SPEC, coded, names, numbered
from benchmarks.drift.world import CANDIDATES, CATEGORIES, DAYS, HOURS, Items, Users, wander
from engagement.table import RankingTable, micros
from monitoring.compare import Window
from monitoring.verdict import Kind

Scenario = Literal["none", "seasonality", "slow", "shock", "broken", "market", "delay"]
SCENARIOS: tuple[Scenario, ...] = ("none", "seasonality", "slow", "shock", "broken", "market", "delay")

START = datetime(2026, 3, 2, tzinfo=UTC)  # a Monday
TRAIN = timedelta(days=28)
END = START + timedelta(days=DAYS)
EVERY = timedelta(hours=6)
_HOUR = 3_600_000_000  # microseconds

SLOW_SIZE = 0.5
"""A slow drift begins at the instant when the third of its columns is truly shifted by so many standard deviations."""

SLOW_DAILY = 0.1
"""By so many standard deviations a day that column moves on; the others up to twice as fast."""

SLOW_MOST = 1.5
"""And stops there."""

SHOCK = 0.9
"""The size of a shock, in standard deviations of each column that it moves."""

MARKET = 0.3
"""Share of the requests that come from the new market."""


@dataclass(frozen=True)
class Truth:
    """What happened.

    Attributes:
        kind: What a check should say, `none` where nothing happened.
        begin: First instant at which anything is other than usual.
        onset: From here on it counts as there.
        columns: What it moves by itself; the predictions follow.
        what: In words.
    """

    kind: Kind
    begin: datetime
    onset: datetime
    columns: tuple[str, ...]
    what: str


@dataclass(frozen=True)
class Stream:
    """One stream.

    Attributes:
        scenario: Its kind.
        table: All requests, with the labels that they get in the end.
        scores: (N, A) predicted chances.
        known: (R,) int64, microseconds: when the labels of a request arrive.
        holidays: ISO dates.
        names: Of categories.
        truth: What happened.
    """

    scenario: Scenario
    table: RankingTable
    scores: np.ndarray
    known: np.ndarray
    holidays: frozenset[str]
    names: dict[str, dict[int, str]]
    truth: Truth

    def window(self, start: datetime, end: datetime) -> Window:
        """All that was asked in [start, end), every request scored."""
        table = self.table.between(micros(start), micros(end))
        first = int(self.table.offsets[np.searchsorted(self.table.time, micros(start))])
        return Window(start, end, table, table, self.scores[first : first + table.rows], self.names)

    def as_known(self, start: datetime, end: datetime, at: datetime) -> Window:
        """The same, but of the labels only those that had arrived by an instant: others look like nothing was done."""
        window = self.window(start, end)
        a, b = np.searchsorted(self.table.time, [micros(start), micros(end)])
        there = self.known[a:b] <= micros(at)
        table = replace(window.table, labels=window.table.labels * there[window.table.request_of_row][:, None])
        return replace(window, table=table, part=table)


def stream(scenario: Scenario, seed: int) -> Stream:
    """Make a stream; the same scenario and seed give the same one."""
    rng = np.random.default_rng([SCENARIOS.index(scenario), seed])
    onset = START + TRAIN + timedelta(seconds=int(rng.integers(6 * 3600, 21 * 86400)))
    strong = 2.0 if scenario == "seasonality" else 1.0
    holidays = _holidays(rng) if scenario == "seasonality" else frozenset[str]()
    users, items = world.make_users(rng, strong), world.make_items(rng)
    time = _times(rng, strong, holidays)
    new = (
        (time >= micros(onset)) & (rng.random(len(time)) < MARKET)
        if scenario == "market"
        else np.zeros(len(time), bool)
    )
    user = _who(rng, time, users, new, holidays)
    item = _what(rng, time, items, new)
    columns = _columns(rng, time, users, items, user, item, strong)
    truth = Truth("none", onset, onset, (), "nothing")
    if scenario == "slow":
        truth = _slow(rng, columns, time, onset)
    elif scenario == "shock":
        truth = _shock(rng, columns, time, onset)
    elif scenario == "market":
        truth = Truth("population", onset, onset, MARKET_COLUMNS, "30 % of the requests from a new market")
    labels = rng.random((len(item), 3)) < _chances(columns)
    if scenario == "broken":
        truth = _broken(rng, columns, time, onset)
    table = _table(time, users, items, user, item, columns, labels)
    known = time + rng.exponential(2 * _HOUR, len(time)).astype(np.int64)
    if scenario == "delay":
        known, truth = _delayed(rng, known, time, onset)
    return Stream(scenario, table, _chances(columns).astype(np.float32), known, holidays, names(), truth)


def _holidays(rng: np.random.Generator) -> frozenset[str]:
    """One working day before and two in the watched weeks."""
    days = [7 * rng.integers(0, 4), *(28 + 7 * rng.choice(4, 2, replace=False))]
    return frozenset((START + timedelta(days=int(d + rng.integers(0, 5)))).date().isoformat() for d in days)


def _weekend(holidays: frozenset[str]) -> np.ndarray:
    """(days,) bool: which days people spend like a weekend."""
    dates = [(START + timedelta(days=d)).date() for d in range(DAYS)]
    return np.array([d.weekday() >= 5 or d.isoformat() in holidays for d in dates])


def _times(rng: np.random.Generator, strong: float, holidays: frozenset[str]) -> np.ndarray:
    """(R,) microseconds: a day's rhythm, more on weekends, and days that are busier than others."""
    hour = np.arange(HOURS)
    rhythm = 1 + 0.45 * np.sin((hour % 24 - 9) / 24 * 2 * np.pi)
    busy = np.exp(wander(rng, 1, 0.08)[:, 0] + 0.2 * strong * _weekend(holidays))
    count = rng.poisson(world.REQUESTS_AN_HOUR * rhythm * np.repeat(busy, 24))
    return np.sort(micros(START) + np.repeat(hour, count) * _HOUR + rng.integers(0, _HOUR, count.sum()))


def _who(
    rng: np.random.Generator, time: np.ndarray, users: Users, new: np.ndarray, holidays: frozenset[str]
) -> np.ndarray:
    """(R,) the user of each request: awake by their time zone, in bursts, more or less on weekends."""
    hour = (time - micros(START)) // _HOUR
    ends = np.searchsorted(hour, np.arange(HOURS + 1))
    drift = wander(rng, len(world.DEVICES), 0.12)  # the shares of devices wander
    weekend = _weekend(holidays)
    chosen = np.zeros(len(time), np.int64)
    for day in range(DAYS):
        there = (users.born <= day) & (users.gone > day)
        mood = np.exp(rng.normal(0, 0.8, len(there)) + drift[day, users.device])
        weight = users.activity * mood * (users.weekend if weekend[day] else 1.0)
        for of_day in range(24):
            lo, hi = ends[day * 24 + of_day], ends[day * 24 + of_day + 1]
            awake = 1.2 + np.sin((of_day + world.ZONE[users.country] - 9) / 24 * 2 * np.pi)
            for pool, rows in ((there & ~users.market, ~new[lo:hi]), (users.market, new[lo:hi])):
                cumulated = np.cumsum(weight * awake * pool)
                chosen[lo:hi][rows] = np.searchsorted(cumulated, rng.random(rows.sum()) * cumulated[-1], side="right")
    return chosen


def _what(rng: np.random.Generator, time: np.ndarray, items: Items, new: np.ndarray) -> np.ndarray:
    """(N,) the item of each candidate: newer ones more, categories in and out of fashion; a new market has its own."""
    block = ((time - micros(START)) // (6 * _HOUR)).astype(int)
    ends = np.searchsorted(block, np.arange(HOURS // 6 + 1)) * CANDIDATES
    own = np.repeat(new, CANDIDATES) & (rng.random(len(time) * CANDIDATES) < 0.5)
    fashion = wander(rng, CATEGORIES + world.NEW_CATEGORIES, 0.2)
    chosen = np.zeros(len(own), np.int64)
    for b in range(HOURS // 6):
        age = b / 4 - items.born
        fresh = np.where(age >= 0, np.exp(-np.abs(age) / world.ITEM_LIFE), 0)
        weight = items.pull * fresh * np.exp(fashion[b // 4, items.category])
        rows = slice(ends[b], ends[b + 1])
        for pool, taken in ((~items.market, ~own[rows]), (items.market, own[rows])):
            cumulated = np.cumsum(weight * pool)
            chosen[rows][taken] = np.searchsorted(cumulated, rng.random(taken.sum()) * cumulated[-1], side="right")
    return chosen


def _columns(
    rng: np.random.Generator,
    time: np.ndarray,
    users: Users,
    items: Items,
    user: np.ndarray,
    item: np.ndarray,
    strong: float,
) -> dict[str, np.ndarray]:
    """Each column but ids and embeddings, as the model reads it; categories as hashes."""
    days = (time - micros(START)) / (24 * _HOUR)
    day = days.astype(int)
    row_days = np.repeat(days, CANDIDATES)
    row_day, row_user = row_days.astype(int), np.repeat(user, CANDIDATES)
    level = wander(rng, 5, 0.12)
    mood = rng.normal(0, 0.3, (DAYS, len(users.born)))[day, user]  # a user's own week
    tenure = np.clip(days - users.born[user], 0, None)
    seen = users.activity[user] * 40 * (1 - np.exp(-(tenure + 0.3) / 3)) * np.exp(mood + 0.5 * level[day, 0])
    clicking = _rate(0.8 * users.engaged[user] + 0.3 * mood + level[day, 1])
    age = np.clip(row_days - items.born[item], 0, None)
    shown = items.pull[item] * np.exp(level[row_day, 2] * 0.6)
    noise = rng.normal(0, 1, (3, len(item))).astype(np.float32)
    week = shown * 60 * (1 - np.exp(-(age + 0.05) / 2))
    of_item = _rate(0.7 * items.liked[item] + level[row_day, 3] + 0.25 * noise[0])
    fashion = wander(rng, CATEGORIES + world.NEW_CATEGORIES, 0.3)[row_day, items.category[item]]
    surface = np.where(rng.random(len(time)) < 0.15 * np.exp(level[day, 4]), 2, users.device[user] % 2)
    return {
        "user_profile__country": coded("user_profile__country", world.COUNTRIES)[users.country[user]],
        "user_profile__device": coded("user_profile__device", world.DEVICES)[users.device[user]],
        "user_profile__plan": coded("user_profile__plan", world.PLANS)[users.plan[user]],
        "context__surface": coded("context__surface", world.SURFACES)[surface],
        "context__language": coded("context__language", world.LANGUAGES)[users.language[user]],
        "user_profile__age": users.age[user],
        "user_profile__tenure": np.sqrt(tenure),
        "user_stats__impressions_7d": np.log1p(np.floor(seen)),
        "user_stats__count_click_7d": np.log1p(np.floor(seen * clicking)),
        "user_stats__rate_click_7d": clicking,
        "days_since_action": np.log1p(rng.exponential(3 / (users.activity[user] + 0.5)) * np.exp(-0.2 * strong)),
        "item_profile__category": coded("item_profile__category", numbered("c", 24))[items.category[item]],
        "item_profile__format": coded("item_profile__format", numbered("f", world.FORMATS))[items.format[item]],
        "item_profile__creator": coded("item_profile__creator", numbered("by", 600))[items.creator[item]],
        "item_profile__length": items.length[item],
        "item_profile__price": items.price[item],
        "item_stats__impressions_1d": np.log1p(np.floor(shown * 12 * np.exp(-age / world.ITEM_LIFE))),
        "item_stats__impressions_7d": np.log1p(np.floor(week)),
        "item_stats__rate_click_7d": of_item,
        "item_stats__rate_save_30d": 0.3 * _rate(0.6 * items.liked[item] + 0.3 * noise[1]),
        "category_stats__rate_click_7d": _rate(0.4 * np.sin(items.category[item]) + fashion),
        "user_category_stats__rate_click_7d": _rate(0.6 * users.engaged[row_user] + 0.5 * noise[2]),
        "item_age_days": np.log1p(age),
    }


def _rate(logit: np.ndarray) -> np.ndarray:
    """A rate around 10 %."""
    return 1 / (1 + np.exp(2.2 - 0.6 * logit))


def _chances(columns: dict[str, np.ndarray]) -> np.ndarray:
    """(N, A) what a model that reads these columns predicts; a missing value counts as the usual one."""
    people = sum(
        _standard(columns, n) * w for n, w in (("user_stats__rate_click_7d", 0.4), ("user_profile__age", -0.1))
    )
    lives = np.isin(columns["user_profile__country"], coded("user_profile__country", ("us", "de")))
    of_row = np.repeat(people + 0.2 * lives, CANDIDATES)
    posts = (
        *(("item_stats__rate_click_7d", 0.5), ("user_category_stats__rate_click_7d", 0.2)),
        *(("category_stats__rate_click_7d", 0.2), ("item_age_days", -0.2), ("item_stats__rate_save_30d", 0.2)),
    )
    logit = of_row + sum(_standard(columns, n) * w for n, w in posts)
    return 1 / (1 + np.exp(-np.stack([logit - 3.5, logit - 2.2, -0.5 * logit - 4.5], axis=1)))


_USUAL = {  # mean and spread that the model learned
    "user_profile__age": (37, 10),
    "user_stats__rate_click_7d": (0.105, 0.045),
    "item_stats__rate_click_7d": (0.105, 0.042),
    "item_stats__rate_save_30d": (0.031, 0.012),
    "category_stats__rate_click_7d": (0.102, 0.028),
    "user_category_stats__rate_click_7d": (0.105, 0.045),
    "item_age_days": (1.5, 0.7),
}


def _standard(columns: dict[str, np.ndarray], name: str) -> np.ndarray:
    mean, spread = _USUAL[name]
    return np.nan_to_num(np.clip((columns[name] - mean) / spread, -4, 4))


def _after(columns: dict[str, np.ndarray], name: str, time: np.ndarray, since: datetime) -> tuple[np.ndarray, int]:
    """How many hours after `since` each value of a column is (below 0: before), and the first row after."""
    hours = (time - micros(since)) / _HOUR
    if len(columns[name]) != len(time):
        hours = np.repeat(hours, CANDIDATES)
    return hours, int(np.searchsorted(hours, 0))


def _move(columns: dict[str, np.ndarray], name: str, shift: np.ndarray) -> None:
    """Shift a column by so many of its standard deviations."""
    moved = columns[name] + shift * np.std(columns[name][: len(columns[name]) // 2])
    columns[name] = np.maximum(moved, 0) if name not in SLOW["population"] else moved


def _slow(rng: np.random.Generator, columns: dict[str, np.ndarray], time: np.ndarray, onset: datetime) -> Truth:
    kind: Kind = ("population", "behaviour")[rng.integers(2)]  # type: ignore[assignment]
    sign = rng.choice([-1, 1])
    begin = onset - timedelta(days=SLOW_SIZE / SLOW_DAILY)
    # The third fastest reaches the size at the onset; the fourth, if there is one, later.
    for name, fast in zip(SLOW[kind], (2.0, 1.4, 1.0, 0.7), strict=True):
        hours, _ = _after(columns, name, time, begin)
        _move(columns, name, sign * np.clip(fast * SLOW_DAILY * hours / 24, 0, SLOW_MOST))
    return Truth(kind, begin, onset, SLOW[kind], f"slow, {kind}")


def _shock(rng: np.random.Generator, columns: dict[str, np.ndarray], time: np.ndarray, onset: datetime) -> Truth:
    sign = rng.choice([-1, 1])
    for name in SHOCKED:
        hours, _ = _after(columns, name, time, onset)
        way = -sign if name == "days_since_action" else sign
        _move(columns, name, way * SHOCK * np.clip(hours, 0, 1))
    return Truth("behaviour", onset, onset, SHOCKED, "up" if sign > 0 else "down")


def _broken(rng: np.random.Generator, columns: dict[str, np.ndarray], time: np.ndarray, onset: datetime) -> Truth:
    name = str(rng.choice(BREAKABLE))
    whole = columns[name] = columns[name].copy()
    hashed = whole.dtype == np.int64
    how = str(rng.choice(["missing", "stuck", "default"] if hashed else ["missing", "stuck", "unit", "default"]))
    _, first = _after(columns, name, time, onset)
    late = whole[first:]
    some = rng.random(len(late)) < (0.6 if rng.random() < 0.5 else 1.0)
    if how == "missing":
        late[some] = 0 if hashed else np.nan
    elif how == "stuck":
        late[:] = late[0]
    elif how == "unit":
        log = next(f for f in SPEC.features if f.name == name).transform == "log1p"
        late[:] = np.log1p(np.expm1(late) * 1000) if log else late * 1000
    else:
        late[rng.random(len(late)) < 0.5] = coded(name, ("unknown",))[0] if hashed else 0.0
    return Truth("broken", onset, onset, (name,), f"{how} {name}")


def _delayed(
    rng: np.random.Generator, known: np.ndarray, time: np.ndarray, onset: datetime
) -> tuple[np.ndarray, Truth]:
    """Labels take twelve hours more from the onset on, or none arrive for two days and then all at once."""
    late = time >= micros(onset)
    if rng.random() < 0.5:
        return known + late * 12 * _HOUR, Truth("none", onset, onset, (), "labels 12 h later")
    stop = micros(onset) + 48 * _HOUR
    return np.where(known >= micros(onset), np.maximum(known, stop), known), Truth(
        "none", onset, onset, (), "no labels for two days"
    )


def _table(
    time: np.ndarray,
    users: Users,
    items: Items,
    user: np.ndarray,
    item: np.ndarray,
    columns: dict[str, np.ndarray],
    labels: np.ndarray,
) -> RankingTable:
    ids = {
        "user_id": np.array(numbered("u", len(users.born)), "S"),
        "item_id": np.array(numbered("i", len(items.born)), "S"),
    }
    filled = {
        **columns,
        "user_id": coded("user_id", numbered("u", len(users.born)))[user],
        "item_id": coded("item_id", numbered("i", len(items.born)))[item],
        "item_profile__embedding": items.embedding[item],
    }
    nothing = np.zeros(0, np.int64)

    def block(level: Literal["request", "candidate"], hashed: bool) -> np.ndarray:
        return np.column_stack([filled[f.name] for f in SPEC.of(level, hashed)]).astype(
            np.int64 if hashed else np.float32
        )

    return RankingTable(
        SPEC,
        np.array([b"r%d" % i for i in range(len(time))]),
        ids["user_id"][user],
        time,
        np.arange(len(time) + 1, dtype=np.int64) * CANDIDATES,
        np.zeros(len(time), np.int64),
        np.zeros(len(time), np.int64),
        block("request", True),
        block("request", False),
        ids["item_id"][item],
        block("candidate", True),
        block("candidate", False),
        labels.astype(np.uint8),
        np.zeros(len(item), bool),
        nothing,
        nothing,
        nothing,
    )
