"""The parts of a replay, in this process: what is to do, what a task does. Killed and parallel runs: tests/loop."""

import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
import torch

from engagement.errors import EvergreenError
from engagement.importers import contract_dir
from engagement.store import EngagementStore
from evergreen.settings import Settings
from model.bundle import Bundle
from model.config import STRATEGY_NAMES, debug
from pipelines.replay import plan
from pipelines.replay_plan import Named, Replay, Task
from pipelines.replay_report import page
from pipelines.replay_result import collect
from pipelines.replay_run import run
from pipelines.replay_window import Window
from pipelines.replay_work import work
from tests.synth import write_contract_dir


def day(number):
    return datetime(2024, 1, number, tzinfo=UTC)


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> Settings:
    """A feed with a gap: nobody came from the 7th to the 11th, so the window from the 8th to the 11th is empty."""
    root = tmp_path_factory.mktemp("replay")
    small = {"users": 8, "items": 40}
    write_contract_dir(root / "feed", days=6, **small)
    write_contract_dir(root / "feed", first=11, days=13, **small)
    found = Settings(home=root / "home", recipe="debug")
    EngagementStore(found.data).append(contract_dir.read(root / "feed"))
    return found


@pytest.fixture(scope="module")
def planned(settings) -> Replay:
    """Slots on the 4th, 8th, 11th and 15th; as if frozen were asked for, too."""
    found = plan(settings, day(3), day(16), ["finetune"], seeds=1)
    return replace(found, strategies={"finetune": Named("finetune"), "frozen": Named("frozen")})


@pytest.fixture(scope="module")
def done(planned) -> Replay:
    threads, todo = torch.get_num_threads(), planned.outstanding()
    torch.set_num_threads(1)  # as in a worker
    while todo:
        task = min((t for t, before in todo.items() if not before & set(todo)), key=lambda t: t.priority)
        work(planned, task)
        del todo[task]
    torch.set_num_threads(threads)
    return planned


# -- names ------------------------------------------------------------------------------------------------------


def test_strength_in_a_name_changes_the_recipe_only():
    assert Named.parse("ewc+distill@100", STRATEGY_NAMES) == Named("ewc+distill", 100.0)
    assert Named("ewc+distill", 100.0).recipe(debug()).train.ewc_lambda == 100.0
    assert Named("ewc+distill").recipe(debug()) == debug()


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("ewx", "'ewx' is unknown"),
        ("finetune@3", "no penalty"),
        ("ewc+distill@", "no strength"),
        ("ewc+distill@-1", "no strength"),
        ("ewc+distill@inf", "no strength"),
        ("ewc+distill@nan", "no strength"),
        ("ewc+distill@much", "no strength"),
    ],
)
def test_wrong_name_is_refused(name, told):
    with pytest.raises(EvergreenError, match=told):
        Named.parse(name, STRATEGY_NAMES)


def test_wrong_range_is_refused(settings):
    for start, end, told in (
        (day(2), day(3), "no slot lies between"),
        (day(3), day(5), "only one slot"),
        (datetime(2023, 12, 28, tzinfo=UTC), day(16), "no history before"),
        (datetime(2024, 2, 1, tzinfo=UTC), datetime(2024, 3, 1, tzinfo=UTC), "nothing to test on"),
    ):
        with pytest.raises(EvergreenError, match=told):
            plan(settings, start, end, ["finetune"], 1)


# -- what is to do ----------------------------------------------------------------------------------------------


def test_all_strategies_share_the_first_model_of_a_seed(settings):
    found = plan(settings, day(3), day(16), ["finetune", "scratch", "ewc+distill@3"], 2)
    first = {found.model(label, seed, 0) for label in found.strategies for seed in found.seeds}
    assert first == {Task(0, "model", "scratch", 0), Task(0, "model", "scratch", 1)}


def test_key_knows_strength_seed_and_lineage(settings):
    found = plan(settings, day(3), day(16), ["ewc+distill@3", "ewc+distill@4"], 2)
    keys = {found.key(found.model(label, s, 2)) for label in found.strategies for s in found.seeds}
    later = plan(settings, day(7), day(16), ["ewc+distill@3"], 2)
    keys |= {later.key(later.model("ewc+distill@3", s, 1)) for s in later.seeds}  # the same slot, another parent
    assert len(keys) == 6


def test_scratch_needs_no_model_before_it(settings):
    found = plan(settings, day(3), day(16), ["scratch", "finetune"], 1)
    assert all(t.kind == "table" for t in found.inputs(Task(3, "model", "scratch", 0)))
    assert Task(2, "model", "finetune", 0) in found.inputs(Task(3, "model", "finetune", 0))


def test_tables_are_built_one_after_the_other(settings):
    todo = plan(settings, day(3), day(16), ["finetune"], 1).outstanding()
    assert [todo[Task(i, "table")] for i in range(4)] == [set(), *({Task(i, "table")} for i in range(3))]


def test_finished_replay_has_nothing_to_do_and_reads_only(done):
    assert done.outstanding() == {}


def test_another_strategy_adds_its_own_tasks_only(done):
    more = replace(done, strategies={**done.strategies, "ewc+distill": Named("ewc+distill")})
    todo = {t for t in more.outstanding() if t.kind != "table"}
    assert todo == {Task(i, kind, "ewc+distill", 0) for i in (1, 2, 3) for kind in ("model", "test")}


# -- what a task does -------------------------------------------------------------------------------------------


def test_slot_without_requests_in_its_window_keeps_the_model(done):
    digests = [
        json.loads((done.directory(done.model("finetune", 0, i)) / "record.json").read_text())["digest"]
        for i in range(4)
    ]
    assert Window.load(done.window_file(2)).requests == 0
    assert digests[2] == digests[1] and len({*digests}) == 3


def test_held_out_requests_are_not_trained_on(done):
    for i in (1, 3):
        record = json.loads((done.directory(done.model("finetune", 0, i)) / "record.json").read_text())
        window = Window.load(done.window_file(i))
        assert record["requests"] == window.requests - window.exam_Q.sum() - held_out_of_few_candidates(done, i)
        assert 0 < window.exam_Q.sum() < window.requests / 2


def held_out_of_few_candidates(done, slot):
    from engagement.table import RankingTable, micros
    from model.exam import held_out

    start, end = (micros(t) for t in done.window(slot))
    window = RankingTable.load(done.directory(Task(slot, "table"))).between(start, end)
    return int((held_out(window) & (np.diff(window.offsets) <= 3)).sum())


def test_frozen_model_stays_the_first_one(done):
    first = Bundle.load(done.artefact(done.model("frozen", 0, 0))).digest
    assert Bundle.load(done.artefact(done.model("frozen", 0, 3))).digest == first


def test_numbers_are_plain_and_add_up(done):
    result = collect(done)
    json.dumps(result, allow_nan=False)
    found = result["strategies"]["finetune"]
    requests = [w["comparable_requests"] for w in result["windows"][1:]]
    mean = sum(h * r for h, r in zip(found["by_window"], requests, strict=True) if r) / sum(requests)
    assert found["hit3"]["save"]["value"] == pytest.approx(mean, abs=1e-5) == found["hit3_by_seed"][0]
    assert found["by_window"][1] is None  # nobody came
    assert [len(row) for row in found["matrix"]] == [1, 2, 3, 4]
    assert found["matrix"][2][:2] == found["matrix"][1]  # nothing was learned in between
    assert found["gate"]["promote"] + found["gate"]["hold"] == 1  # the third test; the second window was empty
    assert result["frozen"][0]["days"] == 0 and result["strategies"]["frozen"]["cost"]["rows"] == 0


def test_page_is_self_contained_and_names_every_strategy(done):
    result = collect(done)
    result["strategies"]["<b>"] = result["strategies"]["finetune"]
    text = page(result)
    assert "<script src" not in text and "<link" not in text
    assert all(f"</span>{name}</td>" in text for name in ("finetune", "frozen", "&lt;b&gt;"))


def test_failed_task_is_told_by_strategy_and_slot(done):
    task = done.model("finetune", 0, 1)
    moved = replace(done, seeds=(7,))  # its parent was never trained
    with pytest.raises(EvergreenError, match="model finetune of Mon 2024-01-08, seed 7"):
        work(moved, Task(task.slot, "model", "finetune", 7))


# Last: it takes away what the tests above read.
def test_what_no_later_replay_needs_is_removed_at_the_end(done):
    run(done, 1, lambda text, so_far, total: pytest.fail("there was nothing to do"))
    kept = {p.parent.name for p in (done.root / "models").glob("*/bundle")}
    assert kept == {done.key(t) for t in done.kept()} and not list((done.root / "tables").iterdir())
    assert done.outstanding() == {}
    (done.directory(Task(2, "test", "finetune", 0)) / "hits.npz").unlink()
    again = set(done.outstanding())
    assert {t for t in again if t.kind != "table"} == {Task(2, "test", "finetune", 0), Task(1, "model", "finetune", 0)}
    assert not Path(done.artefact(Task(1, "model", "finetune", 0))).exists()
