"""Tests that a window's data must pass before a retrain may use it. Every limit is here, with its exact rule.

A model that learned from broken data is worse than an old one, so a retrain holds on it. A test must never hold healthy
data, though: days are compared with their like among the days before (same weekday, by how much such days differ among
themselves), and what is too thin to tell is not judged. What the log does not have, it cannot teach: days after its
last row are no fault of the data.
"""

from collections.abc import Iterator, Sequence
from datetime import UTC, date, datetime, timedelta

import numpy as np
from scipy import stats

from engagement.table import RankingTable, TableSpec, micros
from monitoring.days import STRETCHED, Day, Log
from monitoring.looks import LEAST_USERS, Filled, Look, look
from monitoring.verdict import DataTest

HISTORY = timedelta(days=28)
"""How far back the days that a window is compared with go."""

ALPHA = 0.001
"""A day fails if its volume is below what **<** this share of healthy days would have, or an action's rate is below or
above; divided by the number of days (and actions) that are tested (Bonferroni)."""

LEAST_DAYS = 7
"""Days before a day that are needed to judge it."""

LEAST_ACTED = 20
"""An action's rate of a day is judged if **≥** this many were expected, from `LEAST_USERS` users."""

VOLUME_SPREAD = 0.15
"""Least deviation of a day's log volume from its like: less than about half is a fault in the steadiest feed."""

RATE_SPREAD = 0.3
"""Least deviation of a day's log rate of an action: people may change by a factor of 3 in a day, feeds by more."""

GAP_HOURS = 6
"""A gap in the window is a fault if it is **>** this many hours and **>** twice the longest of the days before."""

LATE_RISE = 0.5
"""The newest whole day is held if its share of late rows is **≥** the days' before (their median) plus this."""

MISSING_RISE = 0.5
"""A feature is broken on a day if its share of missing values is **≥** the usual day's (median) plus this, and above
that of every usual day."""

VANISHED = 0.1
LEAST_PRESENT = 0.05
"""So it is if the share that is there is **≤** `VANISHED` of the usual day's, itself **≥** `LEAST_PRESENT`: a
feature of few values can be lost without a rise of `MISSING_RISE`."""

STUCK_SHARE = 0.5
"""A feature is stuck on a day if it has a single value, and on the usual day (median) none held **>** this share."""

QUARANTINED = 0.05
"""Rows of the window in quarantine may be **≤** this share of what was delivered; so may those of unknown items."""

CLOCK = 0.01
"""Rows that claim to be from the future may be **≤** this share of what was delivered; so may stretched requests."""

TWICE = 0.01
"""Rows that show a user the same item at the same instant as another request does may be **≤** this share."""

PERSONAL = ("user_stats__", "user_category_stats__", "days_since_action")
"""Features that new users do not have: that they are missing says who came, not that a feed broke."""

CLOCKS = ("hour_of_day", "day_of_week")
"""Features that are constant in some days by their nature."""


def test_window(
    table: RankingTable,
    log: Log,
    window: tuple[datetime, datetime],
    usual: Sequence[Look] = (),
    expected: TableSpec | None = None,
) -> tuple[DataTest, ...]:
    """Test the data of a window.

    Args:
        table: Ranking table of the window; what it has of earlier requests helps to tell how features look usually.
        log: The log of the window and of `HISTORY` before it.
        window: Start and end: requests in [start, end) are what a retrain would use.
        usual: How features looked on days that were found good, as those that the champion learned; may be empty.
        expected: What the champion's table had; None without one.

    Returns:
        Every test. What could not be judged passes, and says so.
    """
    start, end = (t.astimezone(UTC) for t in window)
    inside = table.between(micros(start), micros(end))
    tested = _whole_days(log, start, end)
    return (
        _schema(inside, expected),
        _volume(log, tested),
        _gaps(log, start, end),
        *(_rate(log, action, tested) for action in log.actions),
        _both_labels(inside),
        _late(log, tested),
        *_features(table, (start, end), usual),
        *_deliveries(log, inside.rows),
        _stretched(log),
        _twice(inside),
    )


def failed(tests: Sequence[DataTest]) -> list[DataTest]:
    """The tests that do not hold, in their order."""
    return [t for t in tests if not t.passed]


def _whole_days(log: Log, start: datetime, end: datetime) -> list[date]:
    """UTC days of the window, its first one included, that have ended, and after which the log goes on."""
    last = max(log.days, default=start.date())
    until = min(end.date(), last)
    return [start.date() + timedelta(days=i) for i in range((until - start.date()).days)]


def _before(log: Log, day: date) -> list[Day]:
    """The days before one that the log has, empty ones in between included; not its first, which is seldom whole."""
    first = max(min(log.days, default=day) + timedelta(days=1), day - HISTORY)
    return [_at(log, first + timedelta(days=i)) for i in range((day - first).days)]


def _at(log: Log, day: date) -> Day:
    return log.days.get(day) or Day(0, 0, dict.fromkeys(log.actions, 0), 0, frozenset())


def _thin(days: Sequence[Day]) -> bool:
    return len(days) < LEAST_DAYS or float(np.median([d.users for d in days])) < LEAST_USERS


def _limits(past: Sequence[float], spread: float, alpha: float, like: slice | None = None) -> tuple[float, float]:
    """Between which the next of a series of positive numbers lies with chance 1 - 2 * alpha, if nothing is wrong.

    Student's prediction interval of the logarithm; with `like`, of every seventh number, around their own mean.
    """
    logs = np.log(past)
    n, free = len(logs), len(logs) - 1
    centre, deviations = logs.mean(), logs - logs.mean()
    if like is not None and len(logs) >= 3 * LEAST_DAYS:
        weekday = np.arange(len(logs)) % 7
        means = np.array([logs[weekday == w].mean() for w in range(7)])
        free, n = len(logs) - 7, len(logs[like])
        centre, deviations = logs[like].mean(), logs - means[weekday]
    step = stats.t.ppf(1 - alpha, free) * max(spread, float(np.sqrt((deviations**2).sum() / free)))
    reach = step * float(np.sqrt(1 + 1 / n))
    return float(np.exp(centre - reach)), float(np.exp(centre + reach))


def _volume(log: Log, tested: Sequence[date]) -> DataTest:
    """Each whole day's rows against its like."""
    worst: tuple[float, date, int, float] | None = None
    for day in tested:
        past = _before(log, day)
        if _thin(past):
            continue
        rows = _at(log, day).rows
        # From a week ago backwards every seventh day is the same weekday.
        low, _ = _limits([max(d.rows, 0.5) for d in past], VOLUME_SPREAD, ALPHA / len(tested), slice(-7, None, -7))
        if worst is None or rows / low < worst[0]:
            worst = rows / low, day, rows, low
    if worst is None:
        return _untold("volume", "≥ its like", "too few days or users a day to tell what a day usually has")
    ratio, day, rows, low = worst
    told = f"{day} has {rows:,} rows" + (f", and days like it have at least {low:,.0f}" if ratio < 1 else "")
    return DataTest("volume", ratio >= 1, rows, f"≥ {low:,.0f}", told)


def _gaps(log: Log, start: datetime, end: datetime) -> DataTest:
    """The longest time without a row between two rows of the window, in whole hours."""
    past = _before(log, start.date())
    if _thin(past):
        return _untold("gaps", f"≤ {GAP_HOURS} h", "too few days or users a day to tell which gaps are usual")
    hours = [
        datetime(day.year, day.month, day.day, hour, tzinfo=UTC)
        for day, told in sorted(log.days.items())
        for hour in sorted(told.hours)
    ]
    split = next((i for i, h in enumerate(hours) if h >= start), len(hours))
    usual, _ = _longest(hours[:split])
    gap, since = _longest([h for h in hours[max(0, split - 1) :] if h < end])
    limit = max(GAP_HOURS, 2 * usual)
    told = f"nothing was shown for {gap:.0f} h" + (f" from {since:%Y-%m-%d %H:%M} on" if since else "")
    return DataTest("gaps", gap <= limit, gap, f"≤ {limit:.0f} h", told)


def _longest(hours: Sequence[datetime]) -> tuple[float, datetime | None]:
    """Hours without a row between two that have one, the most in a row, and when they begin."""
    gaps = [((b - a) / timedelta(hours=1) - 1, a + timedelta(hours=1)) for a, b in zip(hours, hours[1:], strict=False)]
    longest = max(gaps, default=(0.0, None))
    return longest if longest[0] else (0.0, None)


def _rate(log: Log, action: str, tested: Sequence[date]) -> DataTest:
    """Each whole day's share of rows with an action against the days before."""
    name, worst = f"rate of {action}", None
    for day in tested:
        past, now = _before(log, day), _at(log, day)
        told = [d for d in past if d.users >= LEAST_USERS]
        if _thin(past) or len(told) < LEAST_DAYS or now.users < LEAST_USERS:
            continue
        usual = sum(d.acted[action] for d in told) / sum(d.rows for d in told)
        if usual * now.rows < LEAST_ACTED:
            continue
        rate, *rates = ((d.acted[action] + 0.5) / (d.rows + 1) for d in (now, *told))
        low, high = _limits(rates, RATE_SPREAD, ALPHA / len(tested) / len(log.actions))
        off = max(low / rate, rate / high)
        if worst is None or off > worst[0]:
            worst = off, day, now.acted[action] / now.rows, low, min(1.0, high)
    if worst is None:
        return _untold(name, "as usual", "too few days, users or actions a day to tell")
    off, day, rate, low, high = worst
    limit = f"{low:.2%} to {high:.2%}"
    told_of = f"on {day} {rate:.2%} of the rows have {action}" + (f", usual is {limit}" if off > 1 else "")
    return DataTest(name, off <= 1, rate, limit, told_of)


def _both_labels(inside: RankingTable) -> DataTest:
    """Some rows have the primary action and some have not: else there is nothing to learn."""
    action = inside.spec.primary_action
    rate = float(inside.labels[:, inside.spec.actions.index(action)].mean()) if inside.rows else 0.0
    told = f"{rate:.1%} of {inside.rows:,} rows have {action}"
    return DataTest("labels", 0 < rate < 1, rate, "> 0 and < 1", told)


def _late(log: Log, tested: Sequence[date]) -> DataTest:
    name, limit = "late rows", f"< usual + {LATE_RISE:.0%}"
    past = _before(log, tested[-1]) if tested else []
    newest = _at(log, tested[-1]) if tested else None
    shares = [d.late / d.rows for d in past if d.rows]
    if newest is None or not newest.rows or _thin(past):
        return _untold(name, limit, "too few days or users a day to tell how late rows usually are")
    share, usual = newest.late / newest.rows, float(np.median(shares))
    told = f"{share:.1%} of the rows of {tested[-1]} became known late, usual is {usual:.1%}"
    return DataTest(name, share < usual + LATE_RISE, share, f"< {usual + LATE_RISE:.0%}", told)


def _features(table: RankingTable, window: tuple[datetime, datetime], usual: Sequence[Look]) -> list[DataTest]:
    """Each feature on each day of the window against good days; without such, against the days before in the table."""
    start, end = window
    good = [u for u in usual if u]
    given, seen, found = bool(good), 0, dict[str, DataTest]()
    first = start if given or not table.requests else min(start, _instant(int(table.time[0])))
    for day, today in _days_of(table, first, end):
        if today and day + timedelta(days=1) > start and len(good) >= LEAST_DAYS:
            seen += 1
            for name in today:
                wrong = _wrong(name, today[name], [u[name] for u in good if name in u], day)
                if wrong:
                    found.setdefault(wrong.name, wrong)
        if today and not given:
            good = [*good, today][-HISTORY.days :]
    if found:
        return list(found.values())
    if not seen:
        return [_untold("features", "as usual", "too few good days, or rows a day, to tell how features look usually")]
    return [DataTest("features", True, 0.0, "none broken", f"no feature vanished or froze on {seen} days")]


def _days_of(table: RankingTable, start: datetime, end: datetime) -> Iterator[tuple[datetime, Look]]:
    """Each UTC day of [start, end), and how the features look in its part of that."""
    day = start.replace(hour=0, minute=0, second=0, microsecond=0)
    while day < end:
        until = day + timedelta(days=1)
        yield day, look(table.between(micros(max(day, start)), micros(min(until, end))))
        day = until


def _instant(us: int) -> datetime:
    return datetime.fromtimestamp(us / 1e6, UTC)


def _wrong(name: str, now: Filled, usual: Sequence[Filled], day: datetime) -> DataTest | None:
    """What is wrong with a feature on a day."""
    if len(usual) < LEAST_DAYS or name in CLOCKS:
        return None
    shares = [u.missing for u in usual]
    limit, present = float(np.median(shares)) + MISSING_RISE, 1 - float(np.median(shares))
    if present >= LEAST_PRESENT:
        limit = min(limit, 1 - VANISHED * present)
    if now.missing >= limit and now.missing > max(shares) and not name.startswith(PERSONAL):
        told = f"{name} is missing in {now.missing:.0%} of {day:%Y-%m-%d}, usual is {np.median(shares):.0%}"
        return DataTest(f"missing: {name}", False, now.missing, f"< {limit:.0%}", told)
    if now.same == 1 and np.median([u.same for u in usual]) <= STUCK_SHARE:
        told = f"{name} has one value only on {day:%Y-%m-%d}"
        return DataTest(f"stuck: {name}", False, 1.0, "> 1 value", told)
    return None


def _deliveries(log: Log, rows: int) -> list[DataTest]:
    """What stayed in quarantine, as a share of what was delivered for the window."""
    bad = sum(log.quarantined.values())
    future, unknown = (log.quarantined.get(r, 0) for r in ("future_timestamp", "unknown_item"))
    reasons = ", ".join(f"{n:,} {reason}" for reason, n in sorted(log.quarantined.items(), key=lambda p: -p[1]))
    shares = [n / max(1, rows + bad) for n in (bad, unknown, future)]
    delivered = f"of the {rows + bad:,} rows delivered for the window"
    return [
        DataTest(
            "quarantined", shares[0] <= QUARANTINED, shares[0], f"≤ {QUARANTINED:.0%}",
            f"{shares[0]:.1%} {delivered} are in quarantine" + (f" ({reasons})" if bad else ""),
        ),
        DataTest(
            "unknown items", shares[1] <= QUARANTINED, shares[1], f"≤ {QUARANTINED:.0%}",
            f"{shares[1]:.1%} {delivered} show an item that no delivery of items has",
        ),
        DataTest(
            "clock", shares[2] <= CLOCK, shares[2], f"≤ {CLOCK:.0%}",
            f"{shares[2]:.1%} {delivered} claimed to be from the future",
        ),
    ]  # fmt: skip


def _stretched(log: Log) -> DataTest:
    share = log.stretched / max(1, log.requests)
    hours = STRETCHED / timedelta(hours=1)
    told = f"the rows of {share:.1%} of the requests lie more than {hours:.0f} h apart"
    return DataTest("clock within requests", share <= CLOCK, share, f"≤ {CLOCK:.0%}", told)


def _twice(inside: RankingTable) -> DataTest:
    """Rows that stand in two requests of one user at one instant: a delivery that came twice under new ids."""
    tie = np.diff(np.asarray(inside.time)) == 0
    rows = inside.rows_of(np.flatnonzero(np.r_[tie, False] | np.r_[False, tie]) if len(tie) else np.arange(0))
    logged = rows[~np.asarray(inside.sampled)[rows]]
    request = inside.request_of_row[logged]
    time = np.asarray(inside.time)[request]
    user, item = (np.unique(of, return_inverse=True)[1] for of in (inside.user_id[request], inside.item_id[logged]))
    order = np.lexsort((request, item, time, user))
    same = np.diff(request[order]) != 0
    for column in (user, time, item):
        same &= np.diff(column[order]) == 0
    share = float(same.sum()) / max(1, int((~np.asarray(inside.sampled)).sum()))
    told = f"{share:.1%} of the rows show a user the same item at the same instant as another row"
    return DataTest("duplicates", share <= TWICE, share, f"≤ {TWICE:.0%}", told)


def _schema(inside: RankingTable, expected: TableSpec | None) -> DataTest:
    """Labels are 0 or 1, and nothing that the champion reads is gone."""
    problems = []
    if expected:
        names = {f.name for f in inside.spec.features}
        gone = [f.name for f in expected.features if f.name not in names]
        gone += [a for a in expected.actions if a not in inside.spec.actions]
        problems += [f"{', '.join(gone)} is gone"] if gone else []
    odd = int((np.asarray(inside.labels) > 1).sum())
    problems += [f"{odd:,} labels are neither 0 nor 1"] if odd else []
    told = f"{len(inside.spec.features)} features and {len(inside.spec.actions)} actions are there"
    return DataTest("schema", not problems, float(len(problems)), "nothing gone", "; ".join(problems) or told)


def _untold(name: str, limit: str, why: str) -> DataTest:
    return DataTest(name, True, 0.0, limit, f"not judged: {why}")
