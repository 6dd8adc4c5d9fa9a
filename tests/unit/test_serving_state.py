"""Rollout state and ledger: nothing is lost, torn lines do no harm, files are whole."""

import json

import pytest

from engagement.errors import EvergreenError
from serving.files import directory_digest, write_json
from serving.rollout_state import PENDING, ROLLED_BACK, Journal, RolloutResult, State, Step

STEP = Step(10, 60, 6, 0, 5.0, 9.0, "pass", "6 answers as expected")


def test_state_comes_back_as_it_was_written(tmp_path):
    journal = Journal(tmp_path)
    assert journal.load() is None
    state = journal.move(State("3", "2", salt="3-1"), "10", "ready", steps=(STEP,))
    assert journal.load() == state
    assert state.passed == {10} and not state.final


def test_ledger_tells_every_transition_in_order(tmp_path):
    journal = Journal(tmp_path)
    state = journal.move(State("3", "2"), PENDING, "begins")
    state = journal.move(state, "10", "ready")
    journal.move(state, ROLLED_BACK, "boom", reason="boom")
    told = [(line["from"], line["to"], line["why"]) for line in journal.ledger()]
    assert told == [("pending", "pending", "begins"), ("pending", "10", "ready"), ("10", "rolled_back", "boom")]


def test_transition_killed_before_its_state_was_written_counts_once(tmp_path):
    journal = Journal(tmp_path)
    state = journal.move(State("3", "2"), PENDING, "begins")
    journal.move(state, "10", "ready")
    write_json(tmp_path / "rollout.json", json.loads(json.dumps(state.__dict__)))  # as if killed in between
    journal.move(journal.load(), "10", "ready")
    assert [line["to"] for line in journal.ledger()] == ["pending", "10"]
    assert len((tmp_path / "ledger.jsonl").read_text().splitlines()) == 3  # append only: nothing was taken away


def test_torn_last_line_of_the_ledger_is_skipped_and_spoils_no_other(tmp_path):
    journal = Journal(tmp_path)
    state = journal.move(State("3", "2"), PENDING, "begins")
    with (tmp_path / "ledger.jsonl").open("a") as file:
        file.write('{"rollout": "x", "numb')
    journal.move(state, "10", "ready")
    assert [line["to"] for line in journal.ledger()] == ["pending", "10"]


def test_damaged_state_is_one_clear_line(tmp_path):
    (tmp_path / "rollout.json").write_text("{")
    with pytest.raises(EvergreenError, match="unreadable rollout state") as caught:
        Journal(tmp_path).load()
    assert "\n" not in str(caught.value)


def test_record_is_kept_by_version(tmp_path):
    journal = Journal(tmp_path)
    result = RolloutResult("3", "champion", (STEP,), "3", "fine")
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
