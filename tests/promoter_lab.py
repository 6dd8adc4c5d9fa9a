"""A home for the promoter's tests: a real MLflow registry on SQLite, the real rollout and judge, and a data plane in a
file. It is made once; what a crash leaves (`promoter_kills`) is copied and brought back in milliseconds.
"""

import sqlite3
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from engagement.errors import EvergreenError
from evergreen.settings import Settings
from serving.evidence import Arm, Evidence, Pairs
from serving.files import read_json, write_json
from serving.plane import Doors, Serving

PASSED = {"gate": "promote", "gate.not_worse": "pass: HIT@3/save +1.0 %", "gate.finite": "pass: all scores"}
# By name; version 1 is champion, "7" was before it.
VERSIONS = {
    "1": PASSED,
    "2": PASSED,
    "harmful": PASSED,
    "held": PASSED | {"gate": "hold", "gate.not_worse": "fail: HIT@3/save -3.0 %", "gate_reason": "worse"},
    "tampered": PASSED,
    "7": PASSED,
}
NUMBER = {name: str(i + 1) for i, name in enumerate(VERSIONS)}
NAME = {number: name for name, number in NUMBER.items()}
BEGINNING = 2  # decisions before anybody wishes anything
LEDGER = "ledger.jsonl"
SHADOW = 20  # requests that both arms get in a look


class FilePlane:
    """A `Plane` that is a file: what it says serves."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def serving(self) -> Serving:
        return Serving(**(read_json(self._path) or {}))

    def open(self, champion: str, challenger: str, salt: str) -> Doors:
        self._put(Serving(champion, challenger, 0))
        return Doors("gateway", champion, challenger)

    def split(self, percent: int) -> None:
        now = self.serving()
        self._put(Serving(now.champion, now.challenger, percent))

    def settle(self, champion: str, standby: str = "") -> None:
        if champion in (read_json(self._path.with_name("damaged.json")) or []):
            raise EvergreenError(f"v{champion} cannot be served", "Look at its log")
        self._put(Serving(champion))

    def close(self) -> None:
        pass

    def _put(self, serving: Serving) -> None:
        if serving != self.serving():
            write_json(self._path, serving.__dict__)


class Traffic:
    """A `Traffic` of two healthy arms; the harmful version fails every second request. `before_look` may interfere."""

    def __init__(self, before_look: Callable[[int], None]) -> None:
        self._before_look = before_look

    def look(self, stage, mark):
        from serving.traffic import Portion

        self._before_look(stage.percent)
        sick = stage.challenger == NUMBER["harmful"]
        evidence = Evidence(
            stage.percent,
            _arm(2 * (100 - stage.percent), False),
            _arm(2 * stage.percent, sick),
            _pairs(sick),
            (100.0, 100.0),
        )
        return Portion(evidence, (mark or 0) + 1)


def _arm(n: int, sick: bool) -> Arm:
    no = np.zeros(n, bool)
    failed = np.arange(n) % 2 == 0 if sick else no
    score = np.linspace(0.1, 0.9, n)
    return Arm(failed, no, no, no, np.full(n, 10.0), score, np.arange(n, dtype=np.int64))


def _pairs(sick: bool) -> Pairs:
    no = np.zeros((SHADOW, 2), bool)
    failed = no.copy()
    failed[::2, 1] = sick
    score = np.repeat(np.linspace(0.1, 0.9, SHADOW)[:, None], 2, axis=1)
    hits = np.ones((SHADOW, 2))
    return Pairs(failed, no, np.full((SHADOW, 2), 10.0), score, hits, np.arange(SHADOW, dtype=np.int64))


@dataclass(frozen=True)
class Disk:
    """All state of a home at an instant.

    Attributes:
        files: By path under `settings.serving`.
        database: MLflow's.
        met: What people had done in mid-canary by then (`Person.met`).
        before: The effect that came next.
    """

    files: dict[str, bytes]
    database: bytes
    met: frozenset[int] = frozenset()
    before: str = ""


@dataclass
class Person:
    """Does something once, when the canary is looked at at a stage; that a promoter dies changes nothing for them.

    Attributes:
        acts: By stage.
        met: Stages whose act is done.
    """

    acts: dict[int, Callable[[], None]] = field(default_factory=dict)
    met: set[int] = field(default_factory=set)

    def __call__(self, percent: int) -> None:
        if percent in self.acts and percent not in self.met:
            self.acts[percent]()
            self.met.add(percent)


class Home:
    """A home, and what a person and a crash can do to it.

    Args:
        root: Where it is made, once.
    """

    def __init__(self, root: Path) -> None:
        from serving.files import directory_digest
        from serving.registry import Registry
        from serving.signing import seal

        self.settings = Settings(home=root / "home")
        self.registry = Registry(self.settings)
        with self.registry.client() as client:
            client.create_registered_model(self.settings.model_name)
            for name, tags in VERSIONS.items():
                bundle = self.settings.mlflow_artifacts / name / "artifacts" / "bundle"
                bundle.mkdir(parents=True)
                (bundle / "weights").write_text(name)
                (bundle / "behaviour.json").write_text("{}")  # of the predictor in `fault/serving_light.py`: sound
                tags = tags | {"run_key": f"key-{name}", "bundle_digest": directory_digest(bundle)}
                seal(bundle, tags, self.settings)
                if name == "tampered":
                    (bundle / "weights").write_text("tampereD")
                client.create_model_version(self.settings.model_name, str(bundle.parent.parent), tags=tags)
        for name in ("7", "1"):
            self.registry.promote(NUMBER[name])
        self.plane().settle(NUMBER["1"])
        self.promoter().reconcile()
        self._beginning = self.disk()

    @property
    def database(self) -> Path:
        return self.settings.root / "mlflow" / "mlflow.db"

    def disk(self, met: frozenset[int] = frozenset(), before: str = "") -> Disk:
        """Copy all state."""
        root = self.settings.serving
        files = {str(p.relative_to(root)): p.read_bytes() for p in _state_files(root)}
        return Disk(files, self.database.read_bytes(), met, before)  # MLflow writes at the commit, not earlier

    def go_to(self, disk: Disk) -> None:
        """Be as in a copy."""
        if self.database.read_bytes() != disk.database:
            with sqlite3.connect(":memory:") as source, sqlite3.connect(self.database) as now:
                source.deserialize(disk.database)
                now.execute("PRAGMA synchronous=OFF")
                source.backup(now)
        root = self.settings.serving
        for path in _state_files(root):
            path.unlink()
        for name, content in disk.files.items():
            (root / name).parent.mkdir(exist_ok=True)
            (root / name).write_bytes(content)

    def begin_again(self) -> "Home":
        """The state of the beginning: version 1 serves, 7 is previous, all agree."""
        self.go_to(self._beginning)
        return self

    def plane(self) -> FilePlane:
        return FilePlane(self.settings.serving / "plane.json")

    def promoter(self, before_look: Callable[[int], None] = lambda percent: None, tell=lambda line: None):
        """A promoter as a new process would have it."""
        from serving.promoter import Promoter

        return Promoter(self.settings, self.plane, lambda *call: self.roll(before_look, *call), tell)

    def roll(self, before_look, registry, version, again, wanted, why):
        from serving.judge import laptop
        from serving.protocol import RankRequest
        from serving.rollout import Rollout
        from serving.traffic import Asked

        at = datetime(2024, 1, 1, tzinfo=UTC)
        asked = [Asked(RankRequest(f"r{i}", f"u{i}", ("a", "b", "c", "d"), {}, at)) for i in range(200)]
        rollout = Rollout(self.settings, registry, self.plane(), lambda *_: Traffic(before_look), laptop())
        return rollout.run(version, asked, None, again, wanted, why)

    # --- a person in the MLflow UI ---

    def set(self, alias: str, name: str) -> None:
        with self.registry.client() as client:
            client.set_registered_model_alias(self.settings.model_name, alias, NUMBER[name])

    def delete(self, alias: str) -> None:
        with self.registry.client() as client:
            client.delete_registered_model_alias(self.settings.model_name, alias)

    # --- what there is ---

    def decisions(self, since: int = BEGINNING) -> list[tuple[str, str]]:
        """What was decided after the beginning, as (decision, name of the version)."""
        return [(d["decision"], NAME[d["version"]]) for d in self.registry.agreement.decisions()[since:]]

    def assert_agreed(self, champion: str, previous: str) -> None:
        """Registry, ledger, traffic and MLflow's record say the same, and nothing is left to do."""
        aliases, agreed = self.registry.aliases(), self.registry.agreed()
        wanted = {"champion": NUMBER[champion]} | ({"previous": NUMBER[previous]} if previous else {})
        assert {k: v for k, v in aliases.items() if k != "challenger"} == wanted
        assert (agreed.champion, agreed.previous) == (NUMBER[champion], NUMBER[previous] if previous else "")
        assert self.plane().serving() == Serving(NUMBER[champion])
        left = {p.name for p in self.settings.serving.iterdir()} & {"wish.json", "stop.json"}
        assert left == set() and self.registry.agreement.shown
        made = sorted(d["digest"] for d in self.registry.agreement.decisions())
        runs = self.runs()
        assert sorted(r.data.tags["ledger_entry"] for r in runs) == made
        assert {r.info.status for r in runs} == {"FINISHED"}

    def runs(self) -> list[Any]:
        """The decisions as MLflow shows them."""
        with self.registry.client() as client:
            return list(client.search_runs([self.registry.experiment(client, "promotions")]))


def _state_files(root: Path) -> list[Path]:
    return [*root.glob("*.json"), *root.glob("*.jsonl"), *root.glob("rollouts/*.json")]
