"""Requests that are kept for exams: no model is ever trained on them, so any model can be asked what it still knows.

A bounded sample of those of all past windows travels with the model, so that the question can be asked anywhere.
"""

import numpy as np

from engagement.table import RankingTable, hash_ids
from model.bundle import Bundle
from model.reservoir import EXAM, Reservoir

SHARE = 10
"""One request in so many, by the hash of its id: the same ones for every strategy, seed, slot and machine."""


def held_out(table: RankingTable) -> np.ndarray:
    """(R,) bool: the requests that are kept for exams."""
    return kept(table.request_id)


def kept(request_id: np.ndarray) -> np.ndarray:
    """(R,) bool: the same by their ids (bytes)."""
    kept_R: np.ndarray = hash_ids(request_id) % SHARE == 0
    return kept_R


def exam_of(bundle: Bundle) -> RankingTable | None:
    """The held-out requests that travel with a model, those of its own training window among them; None without any."""
    kept = Reservoir.from_tensors(bundle.memory, EXAM, bundle.spec)
    return kept.table if kept else None
