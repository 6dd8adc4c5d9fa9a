"""Training and inference of a parallel MaskNet beside FuxiCTR's, one process, one core, the two taking turns.

    python -m benchmarks.ranker.speed

FuxiCTR 2.3.10 comes from the peers' environment, its MaskNet from its repository's model zoo. Both models have the same
embeddings, three mask blocks of 512 with ratio 2, a projection to 512 and one output; both take batches of 4096 rows.
FuxiCTR trains all with dense Adam, as it ships; ours has one merged table with row-wise Adagrad, and fused AdamW.
"""

import importlib.util
import json
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.ranker.peers import environment
from model.gemm import Linear, keep_memory
from model.interactions.masknet import ParallelMaskNet
from model.optim import RowAdagrad

CASES = ((3, 30_000), (39, 54_000))  # fields, ids of each
BATCH, DIM, BLOCKS, WIDTH, RATIO, RUNS = 4096, 16, 3, 512, 2, 7


class Ours(nn.Module):
    """Merged table, parallel MaskNet, one output."""

    def __init__(self, fields: int, ids: int) -> None:
        super().__init__()
        self.table = nn.Embedding(fields * ids, DIM, sparse=True)
        nn.init.normal_(self.table.weight, std=1e-4)
        self.masks = ParallelMaskNet((DIM,) * fields, BLOCKS, RATIO, WIDTH)
        self.head = Linear(WIDTH, 1)
        self.rows = RowAdagrad(self.table.weight)
        dense = [p for name, p in self.named_parameters() if name != "table.weight"]
        self.dense = torch.optim.AdamW(dense, lr=1e-3, fused=True)
        self.register_buffer("offset", torch.arange(fields) * ids)

    def forward(self, ids_NF: Tensor) -> Tensor:
        x_NX = self.table(ids_NF + self.offset).flatten(1)
        return self.head(torch.relu(self.masks(x_NX))).squeeze(-1)

    def step(self, ids_NF: Tensor, labels_N: Tensor) -> None:
        F.binary_cross_entropy_with_logits(self(ids_NF), labels_N).backward()
        self.dense.step()
        self.dense.zero_grad()
        self.rows.step(0.05)


def peer(fields: int, ids: int, site: Path, source: Path) -> Any:
    """FuxiCTR's MaskNet of the same sizes, on the peers' packages."""
    if str(site) not in sys.path:
        sys.path.append(str(site))  # last: what both environments have comes from ours
    from fuxictr.features import FeatureMap  # type: ignore[import-not-found]

    spec = importlib.util.spec_from_file_location("peer_masknet", source)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with tempfile.TemporaryDirectory() as room:
        columns = [{f"c{i}": {"type": "categorical", "vocab_size": ids, "source": ""}} for i in range(fields)]
        path = Path(room) / "map.json"
        path.write_text(json.dumps({"dataset_id": "speed", "labels": ["label"], "features": columns}))
        features = FeatureMap("speed", room)
        features.load(str(path), {"embedding_dim": DIM})
        model = module.MaskNet(
            features,
            gpu=-1,
            embedding_dim=DIM,
            dnn_hidden_units=[WIDTH],
            model_type="ParallelMaskNet",
            parallel_num_blocks=BLOCKS,
            parallel_block_dim=WIDTH,
            reduction_ratio=RATIO,
            optimizer="adam",
            loss="binary_crossentropy",
            metrics=["AUC"],
            task="binary_classification",
            model_root=room,
            verbose=0,
        )
    model._max_gradient_norm = 10.0
    return model


def rates(calls: dict[str, Callable[[], None]], runs: int = RUNS) -> dict[str, float]:
    """Median rows a CPU second of each, in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(runs + 1):
        for name, call in calls.items():
            start = time.process_time()
            call()
            if turn:  # the first warms up
                seconds[name].append(time.process_time() - start)
    return {name: BATCH / statistics.median(s) for name, s in seconds.items()}


def case(fields: int, ids: int, site: Path, source: Path) -> dict[str, float]:
    """Rows a second: ours and theirs, training and inference."""
    torch.manual_seed(0)
    ids_NF, labels_N = torch.randint(1, ids, (BATCH, fields)), (torch.rand(BATCH) < 0.3).float()
    batch: dict[str, Tensor] = {f"c{i}": ids_NF[:, i] for i in range(fields)} | {"label": labels_N}
    ours, theirs = Ours(fields, ids), peer(fields, ids, site, source)
    found = rates({"ours": lambda: ours.step(ids_NF, labels_N), "theirs": lambda: theirs.train_step(batch)})
    ours.eval(), theirs.eval()
    with torch.inference_mode():
        infer = rates({"ours": lambda: ours(ids_NF), "theirs": lambda: theirs.forward(batch)})
    return {f"train {k}": v for k, v in found.items()} | {f"infer {k}": v for k, v in infer.items()}


def run(site: Path | None = None, source: Path | None = None) -> str:
    """The section of the results page.

    Args:
        site: The site-packages directory with fuxictr; that of the peers' environment when left out.
        source: The model zoo's MaskNet.py; fetched when left out.
    """
    if site is None or source is None:
        environment.prepare({"source": "model_zoo/MaskNet/src/MaskNet.py"})
        site = next((environment.python().parents[1] / "lib").glob("python*/site-packages"))
        source = environment.models() / "model_zoo/MaskNet/src/MaskNet.py"
    torch.set_num_threads(1)
    logging.disable(logging.INFO)
    keep_memory()
    lines = [
        f"Parallel MaskNet {BLOCKS}x{WIDTH}, ratio {RATIO}, embeddings of {DIM}, batches of {BATCH}, one core, "
        f"medians of {RUNS} turns in one process: `python -m benchmarks.ranker.speed`.",
        "",
        "| fields | ids | rows/s | Evergreen | FuxiCTR 2.3.10 | ratio |",
        "|---|---|---|---|---|---|",
    ]
    for fields, ids in CASES:
        found = case(fields, ids, site, source)
        for what in ("train", "infer"):
            ours, theirs = found[f"{what} ours"], found[f"{what} theirs"]
            lines.append(
                f"| {fields} | {fields * ids:,} | {what} | {ours:,.0f} | {theirs:,.0f} | {ours / theirs:.1f} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    print(run(*(Path(a) for a in sys.argv[1:])))
