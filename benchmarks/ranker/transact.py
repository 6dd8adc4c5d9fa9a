"""Inference of TransAct beside Pinterest's reference code, one process, one core, the two taking turns.

    python -m benchmarks.ranker.transact

The reference (pinterest/transformer_user_action, Apache-2.0) is cloned at a pinned commit into the benchmarks' cache;
EVERGREEN_TRANSACT names another place to clone from. It gets one head, as in the paper, and its weights are copied into
ours, so both compute the same outputs where the reference is right: full histories, no action id 0, one layer after
another. It always computes 100 actions; with real lengths ours skips padding, and outputs differ by the reference's
defects.
"""

import importlib
import os
import statistics
import subprocess
import sys
import time
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.kept import Kept
from benchmarks.ranker.data import cache
from model.bundle import code_digest
from model.gemm import keep_memory
from model.transact import SelfAttention, TransAct

REPOSITORY = "https://github.com/pinterest/transformer_user_action"
COMMIT = "2c8b6c9"
LENGTH, ITEM, ACTION, FIRST, FFN, SUMMARY, RUNS = 100, 32, 32, 10, 32, 96, 5
WIDTH = ACTION + 2 * ITEM
CANDIDATES = (1, 16, 64, 256)
ROWS = 256
# Histories at the requests of the two data sets: deciles (10 % to 100 %) of their number of actions, cut at 100.
LENGTHS = {
    "full": [LENGTH] * 10,
    "MovieLens 100K": [0, 12, 20, 35, 51, 72, 98, 100, 100, 100],
    "KuaiRand": [0, 0, 0, 1, 1, 2, 3, 4, 7, 67],
}


def reference() -> Any:
    """The reference's two modules, cloned."""
    room = cache() / "transformer_user_action"
    if not room.exists():
        room.parent.mkdir(parents=True, exist_ok=True)
        source = os.environ.get("EVERGREEN_TRANSACT", REPOSITORY)
        subprocess.run(["git", "clone", "--quiet", source, str(room)], check=True)
        subprocess.run(["git", "-C", str(room), "checkout", "--quiet", COMMIT], check=True)
    sys.path.append(str(room / "transact_code"))
    config = importlib.import_module("transact_config").TransActConfig(nhead=1, time_window_ms=0)
    return importlib.import_module("transact").TransAct(config).eval()


@torch.no_grad()
def same_weights(theirs: Any, summary: nn.Linear) -> TransAct:
    """Ours with the reference's weights; `summary` is what follows the reference's output."""
    ours = TransAct(ACTION + ITEM, ITEM, 2, FFN, FIRST, SUMMARY, 0.0).eval()
    attentions: list[SelfAttention] = [ours.fuse, *(a for a in ours.attend if isinstance(a, SelfAttention))]
    for attend, feed, layer in zip(attentions, ours.feed, theirs.transformer_encoder.layers, strict=True):
        weights, biases = layer.self_attn.in_proj_weight.chunk(3), layer.self_attn.in_proj_bias.chunk(3)
        for linear, weight, bias in zip((attend.query, attend.key, attend.value), weights, biases, strict=True):
            linear.weight.copy_(weight)
            if linear.bias is not None:
                linear.bias.copy_(bias)
        attend.out.load_state_dict(layer.self_attn.out_proj.state_dict())
        pairs = {"norm1": "norm1", "up": "linear1", "down": "linear2", "norm2": "norm2"}
        for mine, other in pairs.items():
            getattr(feed, mine).load_state_dict(getattr(layer, other).state_dict())
    pooled, first = summary.weight.split([WIDTH, FIRST * WIDTH], 1)
    ours.summary.weight.copy_(torch.cat([first, pooled @ theirs.out_linear.weight], 1))
    ours.summary.bias.copy_(summary.bias + pooled @ theirs.out_linear.bias)
    return ours


def case(lengths: list[int], candidates: int) -> dict:
    """Candidates a CPU second of both, and the largest difference of their outputs."""
    torch.manual_seed(0)
    theirs, summary = reference(), nn.Linear((FIRST + 1) * WIDTH, SUMMARY)
    ours, requests = same_weights(theirs, summary), min(64, max(10, ROWS // candidates))
    row = torch.arange(requests).repeat_interleave(candidates)
    length = torch.tensor(lengths)[torch.linspace(0, len(lengths) - 1, requests).round().long()]
    mask = torch.arange(LENGTH) < length[:, None]
    actions = torch.randint(1, 20, mask.shape) * mask
    items, cand = torch.randn(requests, LENGTH, ITEM) * mask[..., None], torch.randn(len(row), ITEM)
    times = torch.zeros(mask.shape, dtype=torch.long)
    inputs = (actions[row], items[row], times[row], torch.ones(len(row), dtype=torch.long), cand)

    def fast() -> Tensor:
        types = theirs.action_emb_module(theirs.action_type_lookup[actions + 1])
        return ours(torch.cat([types, items], -1), cand, mask, row)

    seconds: list[tuple[float, float]] = []
    with torch.inference_mode():
        for _ in range(RUNS + 1):
            start = time.process_time()
            slow_out = theirs(*inputs)
            middle = time.process_time()
            fast_out = fast()
            seconds.append((middle - start, time.process_time() - middle))
        difference = float((summary(slow_out) - fast_out).abs().max())
    reference_s, ours_s = (statistics.median(s) for s in zip(*seconds[1:], strict=True))
    return {"reference": len(row) / reference_s, "ours": len(row) / ours_s, "difference": difference}


def run() -> str:
    """The section of the results page."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    keep_memory()
    lines = [
        f"TransAct in inference, d {WIDTH}, {LENGTH} actions, 2 layers, FFN {FFN}, one core, medians of "
        f"{RUNS} turns in one process: `python -m benchmarks.ranker.transact`.",
        "",
        "| histories | candidates a request | Evergreen, candidates/s | reference | ratio | largest difference |",
        "|---|---|---|---|---|---|",
    ]
    kept = Kept(cache() / "transact.jsonl")
    for name, lengths in LENGTHS.items():
        for candidates in CANDIDATES:
            key = f"{name} {candidates} {code_digest()}"
            if key not in kept:
                kept.add(key, case(lengths, candidates))
            found = kept[key]
            exact = f"{found['difference']:.0e}" if name == "full" else "-"
            ratio = found["ours"] / found["reference"]
            lines.append(
                f"| {name} | {candidates} | {found['ours']:,.0f} | {found['reference']:,.0f} | {ratio:.1f} | {exact} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    print(run())
