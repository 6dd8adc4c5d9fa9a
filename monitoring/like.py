"""Like with like: a window is compared with the reference's requests of the same weekdays and hours.

A cell is a weekday and a block of six hours, UTC: `weekday * 4 + hour // 6`, 28 of them. A holiday counts as a Sunday.
A window is held against two likes, and the nearer counts. The one is the mix of all the reference's cells that has the
window's own share of requests in each of them: a window of a weekend is held against weekends. The other is the newest
that the model learned, at the same hours: after a drift, a model that has learned the new world is at home in it,
though four weeks of its reference were another world.

Shapes: R requests, C cells of the reference.
"""

from collections.abc import Iterable, Mapping
from datetime import UTC, date, datetime, timedelta

import numpy as np

from engagement.errors import EvergreenError
from engagement.table import RankingTable, micros
from monitoring.sketch import Sketch, sketch, together

BLOCK_HOURS = 6
BLOCKS = 24 // BLOCK_HOURS
CELLS = 7 * BLOCKS
SUNDAY = 6
_BLOCK = BLOCK_HOURS * 3_600_000_000
_MONDAY = 3  # 1970-01-01 was a Thursday

Cell = tuple[str, int]
"""ISO week and cell: `("2020-W02", 5)`."""


def holiday_days(countries: str, start: datetime, end: datetime) -> frozenset[str]:
    """Public holidays as ISO dates.

    Args:
        countries: ISO 3166 codes, comma separated: `NL,DE`; a day is a holiday if it is one in any of them.
        start: From its day on.
        end: To its day.

    Raises:
        EvergreenError: A country is not known.
    """
    import holidays

    found: set[str] = set()
    for country in filter(None, (c.strip().upper() for c in countries.split(","))):
        try:
            days = holidays.country_holidays(country, years=range(start.year, end.year + 1))
        except NotImplementedError as error:
            problem = f"the holidays of country {country!r} are not known"
            raise EvergreenError(problem, "Name ISO 3166 codes in EVERGREEN_HOLIDAYS, such as NL,DE") from error
        found |= {day.isoformat() for day in days if start.date() <= day <= end.date()}
    return frozenset(found)


def blocks_of(time: np.ndarray, holidays: frozenset[str]) -> tuple[np.ndarray, np.ndarray]:
    """The six-hour blocks of requests in time order.

    Args:
        time: (R,) int64 microseconds.
        holidays: Days that count as Sundays.

    Returns:
        (R,) int64 Monday of the week, in days since 1970; (R,) int64 cell.
    """
    block = np.asarray(time) // _BLOCK
    day = block // BLOCKS
    weekday = (day + _MONDAY) % 7
    free = np.array([(date.fromisoformat(d) - date(1970, 1, 1)).days for d in holidays], np.int64)
    shown = np.where(np.isin(day, free), SUNDAY, weekday)
    return day - weekday, shown * BLOCKS + block % BLOCKS


def week_name(monday: int) -> str:
    """ISO week of a Monday, given in days since 1970."""
    year, week, _ = (date(1970, 1, 1) + timedelta(days=int(monday))).isocalendar()
    return f"{year}-W{week:02d}"


def begins(cell: Cell) -> datetime:
    """When a cell begins; a holiday's as if it were the Sunday that it counts as."""
    monday = datetime.fromisocalendar(int(cell[0][:4]), int(cell[0][6:]), 1).replace(tzinfo=UTC)
    return monday + timedelta(hours=BLOCK_HOURS * cell[1])


def ends(cell: Cell) -> datetime:
    """When a cell ends."""
    return begins(cell) + timedelta(hours=BLOCK_HOURS)


def composition(table: RankingTable, holidays: frozenset[str]) -> np.ndarray:
    """(28,) requests of a window in each cell."""
    return np.bincount(blocks_of(table.time, holidays)[1], minlength=CELLS).astype(float)


def cells_of(
    table: RankingTable, holidays: frozenset[str], centres: Mapping[str, float], scores: np.ndarray | None = None
) -> dict[Cell, Sketch]:
    """One sketch for each cell in which there are requests; of predictions where `scores` (N, A) are given."""
    monday, cell = blocks_of(table.time, holidays)
    edges = np.flatnonzero(np.diff(np.asarray(table.time) // _BLOCK)) + 1
    found: dict[Cell, list[Sketch]] = {}
    for start, end in zip([0, *edges], [*edges, table.requests], strict=True):
        if end > start:
            part = table.between(int(table.time[start]), int(table.time[end - 1]) + 1)
            rows = slice(int(table.offsets[start]), int(table.offsets[end]))
            key = week_name(monday[start]), int(cell[start])
            found.setdefault(key, []).append(sketch(part, centres, None if scores is None else scores[rows]))
    return {key: together(parts) for key, parts in sorted(found.items())}


def like(cells: np.ndarray, requests: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """(C,) the weight of each cell of a reference in the like of a window.

    A cell of the window that the reference holds fewer requests for than the window itself, or none, is filled from the
    same block of all days, and where that is thin too, from everything.

    Args:
        cells: (C,) which of the 28 each one is.
        requests: (C,) how many it holds; 0 where it must not be used.
        wanted: (28,) requests of the window.
    """
    weights = np.zeros(len(cells))
    for at in np.flatnonzero(wanted):
        for same in (cells == at, cells % BLOCKS == at % BLOCKS, np.ones(len(cells), bool)):
            held = requests[same].sum()
            if held >= wanted[at]:
                break
        weights[same] += wanted[at] / max(held, 1)
    return np.where(requests > 0, weights, 0.0)


def newest(cells: np.ndarray, requests: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """(C,) the weight of each cell in what was learned last: of each block of the day the newest cells.

    As many of them as hold the requests that the window has in that block, whatever the weekday: one, of a window of
    hours in a busy feed.

    Args:
        cells: (C,) which of the 28 each one is, in order of time.
        requests: (C,) how many it holds; 0 where it must not be used.
        wanted: (28,) requests of the window.
    """
    weights = np.zeros(len(cells))
    for block, many in enumerate(wanted.reshape(-1, BLOCKS).sum(axis=0)):
        same = np.flatnonzero((cells % BLOCKS == block) & (requests > 0))[::-1]
        last = same[: np.searchsorted(np.cumsum(requests[same]), many) + 1]
        weights[last] = many / max(requests[last].sum(), 1)
    return weights


def older(cells: Iterable[Cell], instant: datetime) -> np.ndarray:
    """(C,) bool: which cells are over at an instant."""
    return np.array([ends(c) <= instant for c in cells], bool)


def window_of(table: RankingTable, start: datetime, end: datetime) -> RankingTable:
    """The requests of a window."""
    return table.between(micros(start), micros(end))
