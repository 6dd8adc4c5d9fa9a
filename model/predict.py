"""Scores of a bundle on a ranking table."""

import numpy as np
import torch

from engagement.errors import EvergreenError
from engagement.table import RankingTable
from model.bundle import Bundle
from model.data import Batcher, pick_device

BATCH_ROWS = 4096


def score(bundle: Bundle, table: RankingTable, batch_rows: int = BATCH_ROWS) -> np.ndarray:
    """Probability of every action for every candidate.

    Args:
        bundle: The model.
        table: Requests; its labels are not read.
        batch_rows: Most candidates scored at once. A request is never split, so a larger one goes alone.

    Returns:
        (N, A) float32, in the order of `spec.actions`. The same for any `batch_rows` to 1e-6.

    Raises:
        EvergreenError: The table has other features or actions than the model was trained on.
    """
    if table.spec != bundle.spec:
        raise EvergreenError(
            "the table has other features than the model was trained on", "Train the model again from scratch"
        )
    device = pick_device()
    ranker = bundle.ranker().to(device)
    batcher = Batcher(table, ranker.config)
    out = np.zeros((table.rows, len(table.spec.actions)), np.float32)
    with torch.inference_mode():
        for first, last in _chunks(table.offsets, batch_rows):
            batch = batcher.of_requests(np.arange(first, last)).to(device)
            out[table.offsets[first] : table.offsets[last]] = torch.sigmoid(ranker(batch)).cpu().numpy()
    return out


def _chunks(offsets: np.ndarray, batch_rows: int) -> list[tuple[int, int]]:
    """Runs of whole requests with at most `batch_rows` rows, or one request where it alone has more."""
    chunks, first = [], 0
    while first < len(offsets) - 1:
        last = int(np.searchsorted(offsets, offsets[first] + batch_rows, side="right")) - 1
        last = min(max(last, first + 1), len(offsets) - 1)
        chunks.append((first, last))
        first = last
    return chunks
