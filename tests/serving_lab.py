"""What the tests of `serving/` share: bundles that need no training, homes with real features, small servers."""

import contextlib
import http.server
import json
import socket
import threading
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import psutil

from engagement.table import Feature, RankingTable, TableSpec
from evergreen.settings import Settings

ACTIONS = ("save", "click", "hide")
SPEC = TableSpec(
    (
        Feature("user_id", "request", "categorical"),
        Feature("item_id", "candidate", "categorical"),
        Feature("quality", "candidate", "numeric"),
    ),
    ACTIONS,
    "save",
    ("hide",),
)


def small_table(requests: int = 6, candidates: int = 5, seed: int = 0) -> RankingTable:
    """A ranking table of `SPEC` without history."""
    rng = np.random.default_rng(seed)
    rows = requests * candidates
    empty = np.empty(0, np.int64)
    return RankingTable(
        spec=SPEC,
        request_id=np.array([f"r{i}" for i in range(requests)], "S"),
        user_id=np.array([f"u{i % 3}" for i in range(requests)], "S"),
        time=np.arange(requests, dtype=np.int64) + 1_700_000_000_000_000,
        offsets=np.arange(requests + 1, dtype=np.int64) * candidates,
        history_start=np.zeros(requests, np.int64),
        history_end=np.zeros(requests, np.int64),
        request_cat=rng.integers(1, 1 << 60, (requests, 1)),
        request_num=np.empty((requests, 0), np.float32),
        item_id=np.array([f"i{i % candidates}" for i in range(rows)], "S"),
        item_cat=rng.integers(1, 1 << 60, (rows, 1)),
        item_num=rng.normal(size=(rows, 1)).astype(np.float32),
        labels=(rng.random((rows, len(ACTIONS))) < 0.3).astype(np.uint8),
        sampled=np.zeros(rows, bool),
        history_time=empty,
        history_item=empty,
        history_actions=empty,
    )


def write_bundle(
    directory: Path,
    table: RankingTable,
    seed: int = 0,
    poisoned_item: str = "",
    broken: bool = False,
    exported: bool = True,
) -> Path:
    """A bundle with random weights, exported as the judge step does. The first one in a process takes seconds.

    Args:
        directory: Where it goes.
        table: Gives features and statistics.
        seed: Another seed, other scores.
        poisoned_item: The embedding of this item is NaN: requests that show it have no finite score.
        broken: All heads are NaN.
        exported: As a server needs it; the export takes most of the time.
    """
    import torch

    from engagement.table import hash_id
    from model import config
    from model.bundle import Bundle
    from model.export import export
    from model.hashing import rows_of
    from model.ranker import Ranker
    from model.served import SERVED

    torch.manual_seed(seed)
    recipe = config.debug()
    ranker = Ranker(recipe.ranker, table.spec)
    ranker.fit_statistics(table)
    weights = ranker.state()
    if poisoned_item:
        rows = rows_of(torch.tensor(hash_id("item_id", poisoned_item)), recipe.ranker.buckets)
        weights["table.rows"] = rows
        weights["table.values"] = torch.full((2, recipe.ranker.dim // 2), float("nan"))
    if broken:
        weights["heads.bias"] = torch.full_like(weights["heads.bias"], float("nan"))
    time = datetime(2024, 1, 1, tzinfo=UTC)
    bundle = Bundle(
        spec=table.spec,
        recipe=recipe,
        weights=weights,
        memory={},
        strategy="scratch",
        seed=seed,
        parent="",
        data="none",
        train_start=time,
        train_end=time + timedelta(days=1),
        train_rows=table.rows,
        updates=0,
        code="test",
    )
    bundle.save(directory)
    if exported:
        export(bundle, table, directory / SERVED)
    return directory


@dataclass(frozen=True)
class Feed:
    """A home with imported engagement and materialised features."""

    settings: Settings
    table: RankingTable
    as_of: datetime


def feed_home(root: Path) -> Feed:
    """Import the synthetic feed and publish its features, through the rooms below."""
    from engagement.importers import contract_dir
    from engagement.store import EngagementStore
    from feature_repo.repo import FeatureRepo
    from tests.synth import START, write_contract_dir

    ports = {
        f"{name}_port": service_port()
        for name in ("gateway", "mlflow", "evidently", "promoter", "scheduler", "metrics")
    }
    settings = Settings(home=root / "home", **ports)
    store = EngagementStore(settings.data)
    store.append(contract_dir.read(write_contract_dir(root / "feed", users=30, items=60, days=8)))
    as_of = START + timedelta(days=8)
    snapshot, repo = store.snapshot(as_of), FeatureRepo.of(settings)
    repo.build(snapshot)
    repo.materialize(snapshot)
    return Feed(settings, repo.table(snapshot, START + timedelta(days=6), as_of, root / "table"), as_of)


def replay_requests(feed: Feed, count: int) -> list:
    """The last requests of a feed, as a rollout replays them."""
    from serving.protocol import RankRequest

    table, found = feed.table, []
    for r in range(max(0, table.requests - count), table.requests):
        items = table.item_id[table.offsets[r] : table.offsets[r + 1]]
        found.append(
            RankRequest(
                request_id=table.request_id[r].decode(),
                user_id=table.user_id[r].decode(),
                item_ids=tuple(i.decode() for i in items),
                context={"surface": "home"},
                time=feed.as_of,
            )
        )
    return found


class Backend:
    """An HTTP server on loopback that answers every request with its version."""

    def __init__(self, version: str) -> None:
        from serving.processes import free_port

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self):
                super().setup()
                owner.connections.append(self.connection)

            def do_POST(self):
                self.rfile.read(int(self.headers.get("content-length", 0)))
                body = json.dumps({"version": version}).encode()
                head = f"HTTP/1.1 {owner.status} X\r\ncontent-length: {len(body)}\r\nx-model-version: {version}\r\n\r\n"
                owner.heard = {name.lower(): value for name, value in self.headers.items()}
                owner.served += 1  # before the answer: a test may look as soon as it has it
                self.wfile.write(head.encode() + body)

            def do_GET(self):
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *args):
                pass

        owner = self
        self.version, self.port, self.served, self.status = version, free_port(), 0, 200
        self.heard: dict[str, str] = {}
        self.connections: list[socket.socket] = []
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        """Stop as a killed process does: open connections break."""
        self._server.shutdown()
        self._server.server_close()
        for connection in self.connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


def left_over(home: Path) -> list[str]:
    """Processes that still belong to a home; those that are just dying get three seconds."""
    deadline = time.monotonic() + 3
    while True:
        found = []
        for pid in psutil.pids():
            try:
                process = psutil.Process(pid)
                mine = process.environ().get("EVERGREEN_HOME") == str(home)
                if mine and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(" ".join(process.cmdline()))
            except psutil.Error:
                continue
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.05)


def service_port() -> int:
    """A port for one of a home's services, which stop and start again: no process gets it as a free one meanwhile."""
    from serving.processes import free_port

    return free_port(range(12_000, 20_000))
