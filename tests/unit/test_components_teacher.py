"""A bad teacher is not inherited for ever: when a model from scratch competes, and which contender goes on."""

import dataclasses
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from kfp import dsl

from components.judge import Judged, in_order, judge_challenger
from components.plan import Plan, plan_run, why_also_scratch
from components.train import train_ranker
from engagement.importers import contract_dir
from engagement.store import EngagementStore
from evergreen.settings import Settings
from model.bundle import Bundle
from model.gate import judge
from model.gate_evidence import measure
from model.train import train
from monitoring.reference import DIRECTORY, Reference
from serving.files import directory_digest
from serving.registry import Registry, Version
from tests.synth import START, write_contract_dir
from tests.unit import model_synth as synth

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
NEW, LATER, END = 250, 310, 610  # hours: the champion knows what was before NEW; evidence begins at LATER
TABLE = synth.make(requests=END, users=60)


def version(number: int, **tags: str) -> Version:
    return Version(str(number), tags, (), EPOCH, "")


@pytest.mark.parametrize(
    ("reason", "updates", "verdicts", "why"),
    [
        ("slot", "0", [], ""),
        ("slot", "7", [], ""),
        ("slot", "8", [], "8 updates since scratch"),
        ("slot", "9", [], ""),  # from scratch competed at 8 and lost; the next time is at 16
        ("slot", "16", [], "16 updates since scratch"),
        ("slot", "1", ["hold"], ""),
        ("slot", "1", ["hold", "hold"], "held twice running"),
        ("slot", "1", ["hold", "promote", "hold"], ""),
        ("slot", "1", ["promote", "hold", "hold"], ""),  # the canary took the newest back, not the gate
        ("person", "1", ["hold", "hold", "hold"], "held twice running"),
        ("drift", "1", [], "asked for by drift"),
    ],
)
def test_one_from_scratch_competes_every_eighth_update_after_two_holds_and_on_drift(reason, updates, verdicts, why):
    newer = [version(9 - i, gate=v) for i, v in enumerate(verdicts)]
    assert why_also_scratch(reason, version(1, updates=updates), newer) == why


def test_champion_without_a_count_is_taken_for_one_from_scratch():
    assert why_also_scratch("slot", version(1), []) == ""


# --- contenders on a small home, through the real steps ----------------------------------------------------------


@pytest.fixture(scope="module")
def champion(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    checkpoints = tmp_path_factory.mktemp("checkpoints")
    return train(TABLE.between(0, NEW * synth.HOUR_US), synth.recipe(), "scratch", None, 0, checkpoints)


class Home:
    """A home with a champion, and a plan to update it."""

    def __init__(self, root: Path, champion: Bundle, **changes: Any) -> None:
        self.settings = Settings(home=root, recipe="debug")
        self.table = root / "table"
        TABLE.save(self.table)
        rows = np.flatnonzero(TABLE.request_of_row >= NEW)  # as `build_features` would, from `update_start` on
        owner = TABLE.request_of_row[rows]
        ids = {"request_id": TABLE.request_id[owner].astype(str), "item_id": TABLE.item_id[rows].astype(str)}
        pq.write_table(
            pa.table({**ids, "row": rows, "item_rate": TABLE.item_num[rows, 0]}), self.table / "sample.parquet"
        )
        directory = self.settings.serving / "models" / "1"
        champion.save(directory)
        self.plan = Plan(
            run_key="run", as_of=_at(END), snapshot="s", code="c", recipe="debug", strategy="ewc+distill", seed=0,
            reason="slot", champion="1", champion_digest=directory_digest(directory), also_scratch="held twice running",
            train_start=_at(0), update_start=_at(NEW), train_end=_at(LATER),
        )  # fmt: skip
        self.plan = dataclasses.replace(self.plan, **changes)

    def contest(self) -> tuple[str, dict[str, Any], Path]:
        """Train and judge; returns the verdict, the evidence and the chosen bundle."""
        out = self.settings.root
        table, bundle, rival, chosen = (_artifact(dsl.Model, out / n) for n in ("table", "bundle", "rival", "chosen"))
        evidence, report = _artifact(dsl.Artifact, out / "e.json"), _artifact(dsl.Markdown, out / "r.md")
        train_ranker.python_func(self.plan.to_json(), table, bundle, rival)
        verdict = judge_challenger.python_func(self.plan.to_json(), table, bundle, rival, evidence, report, chosen)
        return verdict, json.loads(Path(evidence.path).read_text()), Path(chosen.path)


def _at(hour: int) -> datetime:
    return EPOCH + timedelta(hours=hour)


def _artifact(kind: Any, path: Path) -> Any:
    return kind(name=path.name, uri=str(path), metadata={})


@pytest.fixture
def home(tmp_path, monkeypatch, champion):
    def make(poison: float | None = None, **changes: Any) -> Home:
        monkeypatch.setenv("EVERGREEN_HOME", str(tmp_path))
        monkeypatch.setenv("EVERGREEN_RECIPE", "debug")
        return Home(tmp_path, champion if poison is None else poisoned(champion, poison), **changes)

    return make


def poisoned(bundle: Bundle, scale: float) -> Bundle:
    """The bundle with noise for weights."""
    noise = torch.Generator().manual_seed(7)
    weights = {
        k: v if not v.is_floating_point() else torch.randn(v.shape, generator=noise).mul(scale).to(v.dtype)
        for k, v in bundle.weights.items()
    }
    return dataclasses.replace(bundle, weights=weights)


def test_without_a_reason_only_the_update_is_trained_and_on_new_requests_alone(home):
    made = home(also_scratch="", train_start=_at(NEW))
    _, evidence, chosen = made.contest()
    assert evidence["chosen"] == "update" and evidence["rival"] is None
    assert list((made.settings.root / "rival").iterdir()) == []
    assert Bundle.load(chosen).train_start >= _at(NEW)


def test_of_two_that_pass_the_better_goes_on_and_of_two_held_the_update():
    real = judge(measure(TABLE, np.random.default_rng(0).random((TABLE.rows, 3)), None, seed=0))

    def judged(origin: str, verdict: Any, hit3: float) -> Judged:
        metrics = {"challenger": {"hit3": {"save": hit3}}}
        return Judged(origin, Path(), dataclasses.replace(real, verdict=verdict, metrics=metrics))

    for update, scratch, chosen in (
        (("promote", 0.4), ("promote", 0.5), "scratch"),
        (("promote", 0.5), ("promote", 0.5), "update"),
        (("promote", 0.4), ("hold", 0.5), "update"),
        (("hold", 0.5), ("promote", 0.4), "scratch"),
        (("hold", 0.4), ("hold", 0.5), "update"),
    ):
        assert in_order([judged("update", *update), judged("scratch", *scratch)])[0].origin == chosen


def test_noise_as_champion_is_not_inherited_one_from_scratch_goes_through(home):
    made = home(poison=3.0)
    verdict, evidence, chosen = made.contest()
    assert verdict == "promote" and evidence["chosen"] == "scratch"
    update, scratch = (e["metrics"]["challenger"]["hit3"]["save"] for e in (evidence["rival"], evidence))
    assert evidence["rival"]["chosen"] == "update" and update < scratch  # the update inherits the noise
    assert "held twice running" in (made.settings.root / "r.md").read_text()
    reference = Reference.load(chosen / DIRECTORY)  # of a model from scratch: all that it learned
    assert (reference.end, reference.slot) == (_at(LATER), _at(END).isoformat())
    assert reference.totals[0] == sum(s.requests for s in reference.cells.values()) == LATER
    assert sum(s.requests for s in reference.predictions.values()) == END  # those of the evidence too
    assert Bundle.load(chosen).strategy == "scratch" and Bundle.load(chosen).train_start < _at(NEW)


def test_update_that_cannot_be_trained_leaves_the_field_to_the_one_from_scratch(home):
    made = home(poison=float("nan"))
    verdict, evidence, _ = made.contest()
    assert verdict == "promote" and evidence["chosen"] == "scratch" and evidence["rival"] is None
    told = json.loads((made.plan.directory(made.settings) / "train.json").read_text())
    assert "not finite" in told["failed"] and "scratch" in told


# --- through the registry -------------------------------------------------------------------------------------------


def test_two_holds_in_the_registry_make_the_third_run_read_the_full_history(tmp_path, champion):
    settings = Settings(home=tmp_path / "home", recipe="debug")
    store = EngagementStore(settings.data)
    store.append(contract_dir.read(write_contract_dir(tmp_path / "feed", users=10, items=40, days=15)))
    registry, slots = Registry(settings), [START + timedelta(days=d, hours=3) for d in (7, 10, 14)]
    champion.save(tmp_path / "bundle")
    for name, verdict in (("champion", "promote"), ("held", "hold")):
        registry.register(tmp_path / "bundle", name, tags={"gate": verdict, "train_end": slots[0].isoformat()})
    registry.promote("1")
    once = plan_run(settings, slots[2], "finetune", "slot")
    registry.register(tmp_path / "bundle", "held again", tags={"gate": "hold"})
    twice = plan_run(settings, slots[2], "ewc+distill", "slot")
    scratch = plan_run(settings, slots[2], "scratch", "slot")
    assert (once.also_scratch, twice.also_scratch, scratch.also_scratch) == ("", "held twice running", "")
    assert once.train_start == once.update_start == twice.update_start == slots[0]
    assert twice.train_start == scratch.train_start == scratch.update_start == store.time_range()[0]
    assert once.train_end == twice.train_end == slots[1]
    assert Plan.from_json(twice.to_json()) == twice
