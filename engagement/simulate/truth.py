"""The truth of a simulated feed: what each candidate's chances were, and what an order of them gives away.

Shapes: N rows, Q requests, 3 actions (`draw.ACTIONS`).
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from engagement.errors import EvergreenError
from engagement.simulate.draw import ACTIONS
from engagement.simulate.write import TRUTH
from engagement.table import RankingTable

FIRST = 3  # the places that count, as in HIT@3


@dataclass(frozen=True)
class Regret:
    """Saves that are expected among the first three, were every item looked at.

    Attributes:
        best_Q: Of the true order.
        got_Q: Of the order that was judged; `best_Q - got_Q` is the regret of each request, never below zero.
    """

    best_Q: np.ndarray
    got_Q: np.ndarray

    @property
    def mean(self) -> float:
        """Saves lost a request."""
        return float((self.best_Q - self.got_Q).mean())

    @property
    def relative(self) -> float:
        """Share of the possible saves that is lost: 0 for the true order."""
        return float(1 - self.got_Q.sum() / self.best_Q.sum())


def chances(directory: Path, table: RankingTable) -> np.ndarray:
    """The true chances of a table's candidates, from the directory that `simulate` wrote.

    Args:
        directory: It holds `truth/`.
        table: Requests of that feed.

    Returns:
        (N, 3) float32: save, click and hide, without position bias.

    Raises:
        EvergreenError: There is no truth, or a candidate is not in it.
    """
    files = sorted((Path(directory) / TRUTH).glob("*.parquet"))
    if not files:
        raise EvergreenError(f"{directory} holds no truth", "Name a directory that `data simulate --out` wrote")
    keys = ["request_id", "item_id"]
    request, item = table.request_id[table.request_of_row], table.item_id
    wanted = pl.DataFrame({"request_id": request.astype(str), "item_id": item.astype(str)})
    known = pl.scan_parquet(files).join(wanted.lazy(), on=keys, how="semi").collect(engine="streaming")
    found = wanted.join(known, on=keys, how="left", maintain_order="left")
    if missing := found["save"].null_count():
        raise EvergreenError(f"{missing:,} candidates are not in the truth of {directory}", "Name their own directory")
    return found.select(ACTIONS).to_numpy().astype(np.float32)


def regret(table: RankingTable, save_N: np.ndarray, scores_N: np.ndarray) -> Regret:
    """What ordering the candidates by `scores_N` gives away against ordering them by the truth.

    Args:
        table: Requests.
        save_N: Their true chances of a save, the first column of `chances`.
        scores_N: Numbers to order by. NaN comes last; equal ones are put in an order that is drawn, always the same.
    """
    tie_N = np.random.default_rng(0).random(table.rows)
    best_Q, got_Q = (_first_three(table, save_N, order_N, tie_N) for order_N in (save_N, scores_N))
    return Regret(best_Q, got_Q)


def _first_three(table: RankingTable, save_N: np.ndarray, by_N: np.ndarray, tie_N: np.ndarray) -> np.ndarray:
    place = np.lexsort((tie_N, -by_N, table.request_of_row))
    rank = np.arange(table.rows) - np.repeat(table.offsets[:-1], np.diff(table.offsets))
    first = np.where(rank < FIRST, save_N[place].astype(np.float64), 0.0)
    return np.bincount(table.request_of_row, first, minlength=table.requests)
