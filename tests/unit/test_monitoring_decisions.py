"""The log of decisions: one line each, whole or forgotten, quick with a year of them."""

import json
import time
from dataclasses import asdict, replace
from datetime import timedelta

import pytest

from engagement.errors import EvergreenError
from monitoring.decisions import LOG, Decision, history, pending, take
from monitoring.trigger import Situation, decide
from tests.verdicts import AS_OF, verdict

CALM = Situation(next_slot=AS_OF + timedelta(days=400))


def ask(state, situation=CALM):
    """Decide on a drift that persists."""
    return decide(verdict(0, ("age",)), [verdict(-1, ("age",))], situation, state)


def test_same_check_again_gives_the_same_decision_whatever_changed_meanwhile(tmp_path):
    first = ask(tmp_path)
    take(tmp_path)
    decide(verdict(50), [], CALM, tmp_path)
    changed = replace(CALM, held=9, missed_slot=AS_OF - timedelta(hours=9), now=AS_OF - timedelta(days=4))
    assert ask(tmp_path, changed) == first
    assert take(tmp_path) is None
    assert len(history(tmp_path)) == 2


def test_torn_last_line_of_a_killed_monitor_is_forgotten(tmp_path):
    first = decide(verdict(-1), [], CALM, tmp_path)
    log = tmp_path / LOG
    log.write_bytes(log.read_bytes() + b'{"action": "retrain", "as')
    assert pending(tmp_path) is None
    second = ask(tmp_path)
    assert history(tmp_path) == [first, second]
    assert log.read_bytes().count(b"\n") == 2


@pytest.mark.parametrize("line", ["nonsense", "[]", '{"action": "retrain"}', '{"action": "no", "as_of": 3}', ""])
def test_damaged_line_is_named(tmp_path, line):
    decide(verdict(), [], CALM, tmp_path)
    log = tmp_path / LOG
    log.write_text(f"{line}\n{log.read_text()}")
    with pytest.raises(EvergreenError, match=r"line 1 of .*decisions.jsonl is not a decision. Repair or remove"):
        ask(tmp_path)
    assert len(log.read_text().splitlines()) == 2


def test_unwritable_log_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(EvergreenError, match="decision log .* cannot be written"):
        decide(verdict(), [], CALM, tmp_path / "file")


def test_decision_after_a_year_of_hourly_ones_is_quick(tmp_path):
    none = asdict(decide(verdict(-1), [], CALM, tmp_path))
    lines = (json.dumps({**none, "check": f"{n:016x}"}, sort_keys=True) for n in range(8760))
    (tmp_path / LOG).write_text("\n".join(lines) + "\n")
    start = time.process_time()
    assert ask(tmp_path).action == "retrain"
    assert time.process_time() - start < 2.0  # 0.02 s where nothing else runs; each line against each: minutes
    assert len(history(tmp_path)) == 8761


def test_decision_reads_back_as_it_was_written(tmp_path):
    decision = ask(tmp_path)
    assert Decision(**asdict(decision)) == history(tmp_path)[0]
