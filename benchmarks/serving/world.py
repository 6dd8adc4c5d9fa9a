"""What all contenders serve: one exported model of the laptop recipe, features in SQLite, and prepared requests.

The weights are random, which costs what trained ones cost; the tables are filled, so that every id is found.
"""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np

from benchmarks.features import online
from engagement.table import RankingTable, hash_id
from evergreen.settings import Settings
from serving.protocol import RankRequest, to_json

MODEL = "homefeed-ranker"
REQUESTS = 200  # prepared bodies; the generator goes round them
FEED, TABLE, BUNDLE = "feed.npz", "table", "bundle"


def settings(world: Path) -> Settings:
    """The home of the world."""
    return Settings(home=world / "home", model_name=MODEL)


def make(directory: str) -> dict[str, float]:
    """Publish features, export a model, keep what it is fed with for one request; in a process of its own (PyTorch)."""
    from feature_repo.online import OnlineReader
    from model.export import export
    from model.served import ServedRanker

    world = Path(directory)
    features = settings(world).features
    features.mkdir(parents=True)
    online.prepare(str(features), online.USERS, online.ITEMS, 1)
    online.fill(str(features), "sqlite", "")
    user, items = online.requests(1)[0]
    table = OnlineReader(features).read(user, items, {"surface": "home"}, online.AT)
    bundle = _bundle(table)
    bundle.save(world / BUNDLE)
    export(bundle, table, world / BUNDLE / "served")
    ranker = ServedRanker.load(world / BUNDLE / "served")
    # JSON has no NaN, which stands for a missing number; zero costs the graph the same.
    np.savez(world / FEED, **{n: np.nan_to_num(a) for n, a in ranker.feed([table], table.rows).items()})
    return {"megabytes": (world / BUNDLE / "served" / "ranker.onnx").stat().st_size / 1e6}


def _bundle(table: RankingTable):
    import torch

    from model import config
    from model.bundle import Bundle
    from model.content import ALWAYS
    from model.hashing import rows_of
    from model.interest import Content
    from model.ranker import Ranker

    torch.manual_seed(0)
    rng, recipe = np.random.default_rng(0), config.laptop()
    items = np.sort([hash_id("item_id", f"i{i}") for i in range(online.ITEMS)])
    users = np.sort([hash_id("user_id", f"u{i}") for i in range(online.USERS)])
    ranker, width = Ranker(recipe.ranker, table.spec), recipe.ranker.content

    def draw(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32) / 3

    vectors = Content(
        since=np.array([ALWAYS]),
        item_keys=items,
        item_VIC=draw(1, len(items), width),
        bias_VI=draw(1, len(items)),
        user_keys=users,
        user_VUC=draw(1, len(users), width),
        mean_V=np.zeros(1, np.float32),
        values_A=np.array([1, 0.3, -1], np.float32),
    )
    ranker.content.set(vectors)
    ranker.fit_statistics(table)
    weights = ranker.state()
    known = torch.unique(rows_of(torch.from_numpy(np.concatenate([items, users])), recipe.ranker.buckets))
    known = known[known != 0]
    weights |= {"table.rows": known, "table.values": torch.randn(len(known), recipe.ranker.dim // 2) / 3}
    now = datetime(2024, 3, 1, tzinfo=UTC)
    return Bundle(
        spec=table.spec,
        recipe=recipe,
        weights=weights,
        memory={},
        strategy="scratch",
        seed=0,
        parent="",
        data="none",
        train_start=now - timedelta(days=1),
        train_end=now,
        train_rows=table.rows,
        updates=0,
        code="benchmark",
    )


def http(path: str, body: bytes, headers: dict[str, str] | None = None) -> bytes:
    """A whole request as bytes."""
    head = {"host": "x", "content-type": "application/json", "content-length": str(len(body))} | (headers or {})
    lines = "".join(f"{name}: {value}\r\n" for name, value in head.items())
    return f"POST {path} HTTP/1.1\r\n{lines}\r\n".encode() + body


def ranking(headers: dict[str, str] | None = None) -> list[bytes]:
    """Requests to ours: a user and the candidates' ids."""
    found = []
    for index, (user, items) in enumerate(online.requests(REQUESTS)):
        request = RankRequest(f"r{index}", user, tuple(items), {"surface": "home"}, online.AT)
        found.append(http(f"/v2/models/{MODEL}/infer", json.dumps(to_json(request)).encode(), headers))
    return found


def tensors(world: Path, binary: bool) -> bytes:
    """A request to a server of tensors, in the Open Inference Protocol v2."""
    from kserve import InferInput, InferRequest

    names = {"f": "FP32", "i": "INT64", "b": "BOOL"}
    inputs = []
    with np.load(world / FEED) as feed:
        for name, array in feed.items():
            given = InferInput(name, list(array.shape), names[array.dtype.kind])
            given.set_data_from_numpy(array, binary_data=binary)
            inputs.append(given)
    parameters = {"binary_data_output": True} if binary else None
    body, length = InferRequest(MODEL, inputs, request_id="1", parameters=parameters).to_rest()
    path = f"/v2/models/{MODEL}/infer"
    if binary:
        headers = {"content-type": "application/octet-stream", "inference-header-content-length": str(length)}
        return http(path, body, headers)
    return http(path, json.dumps(body).encode())


def raw(world: Path) -> bytes:
    """A request to the bare binary server: the tensors' bytes, one after another."""
    with np.load(world / FEED) as feed:
        return http("/infer", b"".join(np.ascontiguousarray(a).tobytes() for a in feed.values()))
