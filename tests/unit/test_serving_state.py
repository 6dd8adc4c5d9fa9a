"""Rollout state and ledger: nothing is lost, torn lines do no harm, files are whole."""

import json

import numpy as np
import pytest

from engagement.errors import EvergreenError
from serving.evidence import Arm, Evidence, Pairs
from serving.files import directory_digest, write_json
from serving.ledger import Ledger
from serving.rollout_state import DARK, PENDING, ROLLED_BACK, Journal, OvertakenError, RolloutResult, State, Step

STEP = Step(10, looks=1, requests=60, answered=6, latency=({"80": 54}, {"81": 6}), verdict="pass", reason="all pass")


def test_state_comes_back_as_it_was_written(tmp_path):
    journal = Journal(tmp_path)
    assert journal.load() is None
    state = journal.begin(State("3", "2", salt="3-1"), None)
    state = journal.move(state, "10", "ready", steps=(STEP,), judge='{"looks": 1}', mark=[{"turn": 1}, None])
    assert journal.load() == state
    assert state.passed == {10} and not state.final


def test_ledger_tells_every_transition_in_order_with_what_was_shown(tmp_path):
    journal = Journal(tmp_path)
    state = journal.begin(State("3", "2", why="asked for by hand"), None)
    state = journal.save(journal.move(state, "10", "ready"), steps=(STEP,))
    journal.move(state, ROLLED_BACK, "boom", reason="boom")
    told = [(line["kind"], line["from"], line["to"], line["why"]) for line in journal.transitions()]
    assert told == [
        ("transition", "pending", "pending", "asked for by hand"),
        ("transition", "pending", "10", "ready"),
        ("transition", "10", "rolled_back", "boom"),
    ]
    assert [line["number"] for line in journal.transitions()] == [1, 2, 3]
    assert {(line["version"], line["champion"], line["rollout"]) for line in journal.transitions()} == {
        ("3", "2", state.id)
    }
    assert journal.transitions()[-1]["shown"]["p99_ms"] == STEP.to_json()["p99_ms"]


def test_transition_killed_before_its_state_was_written_counts_once(tmp_path):
    journal = Journal(tmp_path)
    state = journal.begin(State("3", "2"), None)
    kept = (tmp_path / "rollout.json").read_text()
    journal.move(state, DARK, "ready")
    (tmp_path / "rollout.json").write_text(kept)  # as if killed in between
    journal.move(journal.load(), DARK, "ready")
    assert [line["to"] for line in journal.transitions()] == [PENDING, DARK]
    entries = journal.ledger.entries()  # append only: nothing was taken away
    assert [(e["rollout"], e["number"]) for e in entries] == [(state.id, 1), (state.id, 2), (state.id, 2)]


def test_controller_that_lost_a_rollout_writes_nothing_any_more(tmp_path):
    journal = Journal(tmp_path)
    lost = journal.move(journal.begin(State("3", "2"), None), DARK, "ready")
    taken = journal.take_up(journal.load())
    for act in (
        lambda: journal.check(lost),
        lambda: journal.save(lost, mark=1),
        lambda: journal.move(lost, "1", "passed"),
        lambda: journal.take_up(lost),
        lambda: journal.begin(State("4", "2"), None),
        lambda: journal.begin(State("4", "2"), lost),
    ):
        with pytest.raises(OvertakenError, match="another controller has taken up the rollout of version 3"):
            act()
        assert journal.load() == taken and len(journal.ledger.entries()) == 2
    journal.check(taken)


def test_step_adds_up_portions_and_tells_percentiles(tmp_path):
    latency = np.r_[np.full(98, 10.0), 200.0, np.nan]
    failed = np.zeros(100, bool)
    failed[-1] = True
    arm = Arm(failed_N=failed, latency_N=latency)
    step = Step(10).plus(Evidence(10, Arm(np.zeros(50, bool), latency_N=np.full(50, 5.0)), arm))
    step = step.plus(Evidence(10, challenger=arm))
    assert (step.looks, step.requests, step.answered, step.errors, step.pairs) == (2, 250, 198, 2, 0)
    data = step.to_json()
    assert data["p50_ms"]["challenger"] == pytest.approx(10, rel=0.02)
    assert data["p99_ms"]["challenger"] == pytest.approx(200, rel=0.02)  # the 197th of 198, by nearest rank
    assert data["p99_ms"]["champion"] == pytest.approx(5, rel=0.02)
    quicker = step.plus(Evidence(10, challenger=Arm(np.zeros(2, bool), latency_N=np.full(2, 10.0))))
    assert quicker.to_json()["p99_ms"]["challenger"] == pytest.approx(10, rel=0.02)  # the 198th of 200


def test_step_in_the_dark_counts_pairs_and_a_pair_that_failed_once(tmp_path):
    failed = np.array([[False, False], [True, False], [True, True]])
    latency = np.array([[1.0, 4.0], [np.nan, 4.0], [np.nan, np.nan]])
    step = Step(0).plus(Evidence(0, pairs=Pairs(failed, latency_P2=latency)))
    assert (step.requests, step.pairs, step.answered, step.errors) == (0, 3, 2, 2)
    assert step.to_json()["p50_ms"] == {
        "champion": pytest.approx(1, rel=0.02),
        "challenger": pytest.approx(4, rel=0.02),
    }


def test_record_holds_nothing_that_json_does_not_know(tmp_path):
    step = Step(10, findings=({"value": float("nan"), "high": float("inf"), "n": 3},))
    text = json.dumps(step.to_json(), allow_nan=False)
    assert json.loads(text)["findings"] == [{"value": None, "high": None, "n": 3}]


OLD_LINE = '{"rollout": "abc", "number": 1, "at": "2024", "version": "1", "from": "pending", "to": "10", "pid": 1}'


def test_ledger_of_the_last_release_is_kept_and_the_chain_begins_after_it(tmp_path):
    path = tmp_path / "ledger.jsonl"
    path.write_text(f"{OLD_LINE}\n{OLD_LINE}")
    ledger = Ledger(path)
    assert ledger.entries() == []
    for what in "ab":
        ledger.append({"what": what})
    assert [e["what"] for e in ledger.entries()] == ["a", "b"] and path.read_text().count("pending") == 2
    lines = path.read_text().splitlines()
    for taken_out in (2, 3):  # a line without its digest, or one that is missing, is still noticed
        stripped = {k: v for k, v in json.loads(lines[taken_out]).items() if k not in ("digest", "before")}
        for put in ([json.dumps(stripped)], []):
            if (taken_out, put) != (3, []):  # nobody can tell that the last line of all is missing
                path.write_text("\n".join([*lines[:taken_out], *put, *lines[taken_out + 1 :]]))
                with pytest.raises(EvergreenError, match="was changed"):
                    ledger.entries()


def test_ledger_is_read_again_only_when_it_grew(tmp_path, monkeypatch):
    ledger, other = Ledger(tmp_path / "l"), Ledger(tmp_path / "l")
    ledger.append({"n": 1})
    assert len(ledger.entries()) == 1
    with monkeypatch.context() as patch:
        patch.setattr(json, "loads", None)
        assert len(ledger.entries()) == 1
    other.append({"n": 2})
    assert [e["n"] for e in ledger.entries()] == [1, 2]


@pytest.mark.parametrize("stage", ["champion", "10"])
def test_rollout_of_the_last_release_is_read_and_judged_anew(tmp_path, stage):
    step = {"percent": 10, "requests": 60, "answered": 6, "errors": 0, "p50_ms": 1.0, "p99_ms": 2.0}
    step |= {"verdict": "pass", "reason": "all pass"}
    old = {"version": "3", "champion": "2", "id": "abc", "salt": "s", "stage": stage, "steps": [step], "transitions": 4}
    write_json(tmp_path / "rollout.json", old | {"reason": ""})
    record = {"version": "3", "outcome": "champion", "steps": [step], "serving_version": "3", "reason": "all pass"}
    write_json(tmp_path / "rollouts" / "3.json", record)
    journal = Journal(tmp_path)
    state = journal.load()
    assert (state.version, state.stage, state.final, state.passed) == ("3", stage, stage == "champion", frozenset())
    assert journal.recorded("3") is None
    if not state.final:
        assert journal.move(journal.take_up(state), DARK, "anew").transitions == 5


def test_damaged_state_is_one_clear_line(tmp_path):
    (tmp_path / "rollout.json").write_text("{")
    with pytest.raises(EvergreenError, match="unreadable rollout state") as caught:
        Journal(tmp_path).load()
    assert "\n" not in str(caught.value)


def test_record_is_kept_by_version(tmp_path):
    journal = Journal(tmp_path)
    result = RolloutResult("3", "champion", (STEP.to_json(),), "3", "fine")
    journal.record(result)
    assert journal.recorded("3") == result and journal.recorded("4") is None
    assert json.loads(result.to_json())["steps"][0]["percent"] == 10


def test_directory_digest_sees_content_names_and_extra_files(tmp_path):
    (tmp_path / "d" / "sub").mkdir(parents=True)
    (tmp_path / "d" / "a").write_bytes(b"1")
    (tmp_path / "d" / "sub" / "b").write_bytes(b"2")
    seen = {directory_digest(tmp_path / "d")}
    (tmp_path / "d" / "a").write_bytes(b"3")
    seen.add(directory_digest(tmp_path / "d"))
    (tmp_path / "d" / "a").rename(tmp_path / "d" / "c")
    seen.add(directory_digest(tmp_path / "d"))
    (tmp_path / "d" / "extra").write_bytes(b"")
    seen.add(directory_digest(tmp_path / "d"))
    assert len(seen) == 4


def test_failed_write_leaves_the_old_file_and_no_rubbish(tmp_path):
    write_json(tmp_path / "x.json", {"a": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "x.json", {"a": object()})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]
