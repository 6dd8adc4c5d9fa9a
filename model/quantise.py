"""INT8 weights for a served graph, taken only where they rank as float32 does.

Dynamic quantisation (onnxruntime): weights become INT8, and activations in every run by the range of that run. So a
request's scores depend, a little, on what is scored with it, and one that is not a number spoils its company; that is
why float32 is the default, and INT8 has to be asked for.

Shapes: N candidates, A actions.
"""

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnxruntime.quantization import QuantType, quantize_dynamic

from engagement.table import RankingTable
from model.metrics import hit3, hits, ranking_score, ranks
from model.served import ServedRanker

TOP = 10
"""Candidates of a request whose set is compared; a request with no more than these says nothing."""
OVERLAP = 0.98
"""INT8 is taken when the mean share of the `TOP` best by the primary action that it keeps is at least (>=) this."""
HIT_LOSS = 0.002
"""INT8 is taken when HIT@3 of the primary action is lower by at most (<=) this."""


def quantised(graph: bytes) -> bytes:
    """The graph with INT8 weights; the table of embeddings too."""
    with tempfile.TemporaryDirectory() as room:
        out = Path(room) / "int8.onnx"
        quantize_dynamic(onnx.load_from_string(graph), out, weight_type=QuantType.QInt8)
        return out.read_bytes()


def compared(table: RankingTable, fp32: ServedRanker, int8: ServedRanker) -> dict[str, Any]:
    """How alike two forms of a model rank a table by its primary action.

    Returns:
        `overlap`, the share of the ten best of a request that both have (1 where no request has more); `hit3` and
        `hit3_int8`, HIT@3 on the primary action; `worst`, the largest difference of a probability; `speed`, how many
        times faster INT8 was.
    """
    scores, seconds = zip(*(_scored(table, ranker) for ranker in (fp32, int8)), strict=True)
    place_N, place8_N = (ranks(table, ranking_score(table.spec, s)) for s in scores)
    longer_N = np.diff(table.offsets)[table.request_of_row] > TOP
    best = np.count_nonzero(longer_N & (place_N < TOP))
    kept = np.count_nonzero(longer_N & (place_N < TOP) & (place8_N < TOP))
    hit, hit8 = (hit3(hits(table, s))[table.spec.primary_action] for s in scores)
    return {
        "overlap": float(kept / best) if best else 1.0,
        "hit3": hit,
        "hit3_int8": hit8,
        "worst": float(np.abs(scores[0] - scores[1]).max()),
        "speed": seconds[0] / seconds[1],
    }


def _scored(table: RankingTable, ranker: ServedRanker) -> tuple[np.ndarray, float]:
    """Scores (N, A), request by request, and the CPU seconds that they took."""
    requests = [table.select(np.array([r])) for r in range(table.requests)]
    ranker.score(requests[:1])
    started = time.process_time()
    scores = [ranker.score([one])[0] for one in requests]
    return np.concatenate(scores), time.process_time() - started


def within_budget(overlap: float, hit3: float, hit3_int8: float) -> bool:
    """Whether INT8 is good enough: see `OVERLAP` and `HIT_LOSS`. What is not a number is not."""
    return bool(overlap >= OVERLAP and hit3 - hit3_int8 <= HIT_LOSS)
