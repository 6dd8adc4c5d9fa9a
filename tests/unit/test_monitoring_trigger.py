"""The trigger: a drift asks for one early retrain, whoever asks, however often, wherever it is killed."""

import json
import multiprocessing
import os
import signal
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from engagement.errors import EvergreenError
from monitoring import trigger
from monitoring.verdict import DriftVerdict

AS_OF = datetime(2026, 3, 3, 12, tzinfo=UTC)
SLOT = datetime(2026, 3, 5, 3, tzinfo=UTC)
CALM = DriftVerdict(
    drifted=False,
    reason="0 of 5 features drifted",
    as_of=AS_OF.isoformat(),
    model_version="7",
    share=0.0,
    columns=(),
    broken={},
    skipped={},
    churn={},
    rows=(4000, 2000),
    users=(200, 100),
    window_rows=(4000, 2000),
    quality={},
)
DRIFT = replace(CALM, drifted=True, reason="4 of 5 features drifted", share=0.8)


def at(verdict, hours, version="7"):
    return replace(verdict, as_of=(AS_OF + timedelta(hours=hours)).isoformat(), model_version=version)


def far(hours=0):
    return SLOT + timedelta(hours=hours + 240)


def test_no_drift_is_logged_and_asks_for_nothing(tmp_path):
    decision = trigger.decide(CALM, tmp_path, SLOT)
    assert (decision.action, decision.reason) == ("none", "0 of 5 features drifted")
    assert trigger.history(tmp_path) == [decision]
    assert trigger.take(tmp_path) is None


def test_drift_asks_once_and_is_taken_once(tmp_path):
    decision = trigger.decide(DRIFT, tmp_path, SLOT)
    assert (decision.action, decision.champion, decision.key) == ("retrain", "7", "7@2026-03-03")
    assert trigger.pending(tmp_path) == decision
    assert trigger.take(tmp_path) == decision
    assert trigger.take(tmp_path) is None
    assert trigger.pending(tmp_path) is None


def test_same_check_again_gives_the_same_decision_and_no_second_request(tmp_path):
    first = trigger.decide(DRIFT, tmp_path, SLOT)
    trigger.take(tmp_path)
    assert trigger.decide(DRIFT, tmp_path, SLOT) == first
    assert trigger.take(tmp_path) is None
    assert len(trigger.history(tmp_path)) == 1


def test_request_that_waits_blocks_another_even_for_another_champion(tmp_path):
    trigger.decide(DRIFT, tmp_path, far())
    later = trigger.decide(at(DRIFT, 24 * 7, version="8"), tmp_path, far(24 * 7))
    assert later.action == "none"
    assert "already asked for" in later.reason


def test_one_champion_asks_once_a_day(tmp_path, monkeypatch):
    monkeypatch.setattr(trigger, "COOLDOWN", timedelta(0))
    trigger.decide(DRIFT, tmp_path, far())
    trigger.take(tmp_path)
    assert "asked for today" in trigger.decide(at(DRIFT, 1), tmp_path, far()).reason
    assert trigger.decide(at(DRIFT, 1, version="8"), tmp_path, far()).action == "retrain"
    trigger.take(tmp_path)
    assert trigger.decide(at(DRIFT, 24), tmp_path, far()).action == "retrain"


@pytest.mark.parametrize("sign", [1, -1])  # -1: a clock that ran ahead, or history replayed backwards
def test_cooldown_holds_until_its_last_second(tmp_path, sign):
    hours = trigger.COOLDOWN.total_seconds() / 3600
    trigger.decide(DRIFT, tmp_path, far())
    trigger.take(tmp_path)
    early = trigger.decide(at(DRIFT, sign * (hours - 1 / 3600), version="8"), tmp_path, far())
    assert early.action == "none"
    assert "of the retrain asked for by" in early.reason
    assert trigger.decide(at(DRIFT, sign * hours, version="8"), tmp_path, far()).action == "retrain"


def test_slot_that_is_near_makes_an_early_retrain_pointless(tmp_path):
    near = AS_OF + trigger.SLOT_NEAR
    decision = trigger.decide(DRIFT, tmp_path / "near", near)
    assert decision.action == "none"
    assert "the slot of 2026-03-03 18:00 UTC" in decision.reason
    assert trigger.decide(DRIFT, tmp_path / "far", near + timedelta(seconds=1)).action == "retrain"


def test_broken_data_never_starts_a_retrain(tmp_path):
    broken = replace(DRIFT, broken={"age": "is missing in 100% of the rows (0% in the reference)"})
    decision = trigger.decide(broken, tmp_path, SLOT)
    assert decision.action == "none"
    assert decision.reason.startswith("Broken data is repaired, not trained on: age is missing")
    assert trigger.decide(DRIFT, tmp_path, SLOT).action == "retrain"  # the same instant, once the data is whole


def test_torn_last_line_of_a_killed_monitor_is_forgotten(tmp_path):
    first = trigger.decide(CALM, tmp_path, SLOT)
    log = tmp_path / "decisions.jsonl"
    log.write_bytes(log.read_bytes() + b'{"action": "retrain", "as')
    assert trigger.pending(tmp_path) is None
    second = trigger.decide(DRIFT, tmp_path, SLOT)
    assert trigger.history(tmp_path) == [first, second]
    assert [json.loads(line)["action"] for line in log.read_text().splitlines()] == ["none", "retrain"]


def test_damaged_line_is_named(tmp_path):
    trigger.decide(CALM, tmp_path, SLOT)
    log = tmp_path / "decisions.jsonl"
    log.write_text("nonsense\n" + log.read_text())
    with pytest.raises(EvergreenError, match=r"line 1 of .*decisions.jsonl is not a decision"):
        trigger.decide(DRIFT, tmp_path, SLOT)


def test_unwritable_log_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(EvergreenError, match="decision log .* cannot be written"):
        trigger.decide(CALM, tmp_path / "file", SLOT)


def monitor(state, gate, number, found):
    gate.wait()
    # Two monitors see the same drift in slightly different windows: not the same check, but the same need.
    trigger.decide(replace(DRIFT, share=number / 10), state, SLOT)
    request = trigger.take(state)
    if request:
        found.put(number)


def test_monitors_at_once_start_one_retrain(tmp_path):
    context = multiprocessing.get_context("fork")
    gate, found = context.Event(), context.Queue()
    processes = [context.Process(target=monitor, args=(tmp_path, gate, n, found)) for n in range(6)]
    for process in processes:
        process.start()
    gate.set()
    for process in processes:
        process.join(60)
    assert [p.exitcode for p in processes] == [0] * 6
    found.get(timeout=5)
    assert found.empty()
    assert [d.action for d in trigger.history(tmp_path)].count("retrain") == 1
    assert len(trigger.history(tmp_path)) == 6


def decide_for_ever(state):
    for hour in range(10_000_000):
        trigger.decide(at(DRIFT if hour % 50 == 0 else CALM, hour), state, far(hour))
        trigger.take(state)


def test_kill_at_any_moment_leaves_a_log_that_reads(tmp_path):
    for trial in range(8):
        process = multiprocessing.get_context("fork").Process(target=decide_for_ever, args=(tmp_path,))
        process.start()
        time.sleep(0.1 + 0.013 * trial)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        asked = [d.key for d in trigger.history(tmp_path) if d.action == "retrain"]
        assert len(asked) == len(set(asked))
        trigger.take(tmp_path)
        assert trigger.pending(tmp_path) is None
    assert trigger.history(tmp_path)
