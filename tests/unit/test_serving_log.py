"""The writing half of the serving log: what rows say, that it never stops a server, and what a fault costs."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
from prometheus_client import REGISTRY

from engagement.index import from_us
from engagement.served import files, read, read_features
from engagement.table import Feature, TableSpec
from serving import serving_log
from serving.serving_log import FEATURES_EVERY, KEEP_DAYS, MAX_ROWS, ServingLog, clean, keeps_features
from tests.served_lab import AT, failed, served, with_features, write
from tests.serving_lab import ACTIONS, SPEC

ALWAYS = (AT - timedelta(days=400), AT + timedelta(days=4000))


def rows(how):
    return REGISTRY.get_sample_value("evergreen_serving_log_rows_total", {"how": how}) or 0.0


def all_rows(directory):
    return read(directory, *ALWAYS)


def test_an_answer_is_a_row_a_candidate_in_the_order_shown_with_all_that_was_said(tmp_path):
    spec = TableSpec((*SPEC.features, Feature("context__surface", "request", "categorical")), *_rest(SPEC))
    answer = served(3, user="ü1", items=("a", "b", "c", "b"), purpose="shadow", degraded="cached", latency_ms=12.5)
    answer = replace(answer, request=replace(answer.request, context={"surface": "home"}))
    write(tmp_path, answer, version="17", spec=spec)
    found = all_rows(tmp_path)
    order = answer.order_C.tolist()
    assert found["item_id"].to_list() == [answer.request.item_ids[i] for i in order]
    assert found["position"].to_list() == [0, 1, 2, 3]
    for column, action in enumerate(ACTIONS):
        np.testing.assert_array_equal(found[f"score__{action}"].to_numpy(), answer.scores_CA[order, column])
    same = {"request_id": "r3", "user_id": "ü1", "model_version": "17", "canary_bucket": 7, "purpose": "shadow"}
    same |= {"degraded": "cached", "status": 200, "latency_ms": 12.5, "event_timestamp": AT, "surface": "home"}
    assert {n: found[n].unique().to_list() for n in same} == {n: [v] for n, v in same.items()}


def _rest(spec):
    return spec.actions, spec.primary_action, spec.negative_actions


def test_a_request_that_failed_is_one_row_without_item_position_and_scores(tmp_path):
    # What was ranked in vain is not what somebody saw.
    write(tmp_path, served(1), served(2, status=500), failed(3, 429, bucket=None))
    found = (
        all_rows(tmp_path).filter(request_id="r2").to_dicts() + all_rows(tmp_path).filter(request_id="r3").to_dicts()
    )
    assert [(r["status"], r["canary_bucket"]) for r in found] == [(500, 7), (429, None)]
    assert {r[n] for r in found for n in ("item_id", "position", *(f"score__{a}" for a in ACTIONS))} == {None}


def test_headers_that_make_no_sense_cost_no_row_of_anybody(tmp_path):
    write(tmp_path, served(1, bucket=10**30, purpose="x" * 10_000), served(2, bucket=9_999), served(3, bucket=10_000))
    found = all_rows(tmp_path).unique("request_id").sort("request_id")
    assert found["canary_bucket"].to_list() == [None, 9_999, None]
    assert found["purpose"].to_list() == ["other", "live", "live"]


def test_what_finds_no_room_is_dropped_and_counted_and_the_rest_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(serving_log, "MAX_ROWS", 10)
    monkeypatch.setattr(serving_log, "FLUSH_SECONDS", 60.0)
    dropped, written = rows("dropped"), rows("written")
    log = ServingLog(tmp_path, "1", SPEC)
    for n in range(5):
        log.write(served(n))  # three rows each: the fourth would be rows 10 to 12
    log.write(failed(5))  # row 10
    log.close()
    assert (rows("dropped") - dropped, rows("written") - written) == (6, 10)
    assert sorted(all_rows(tmp_path)["request_id"].unique()) == ["r0", "r1", "r2", "r5"]


def test_rows_are_written_when_there_are_enough_of_them_or_after_a_while(tmp_path, monkeypatch):
    monkeypatch.setattr(serving_log, "FLUSH_SECONDS", 60.0)
    monkeypatch.setattr(serving_log, "FLUSH_ROWS", 6)
    log = ServingLog(tmp_path / "many", "1", SPEC)
    log.write(served(0))
    log.write(served(1))
    _until(lambda: files(tmp_path / "many"))
    log.close()
    monkeypatch.setattr(serving_log, "FLUSH_SECONDS", 0.05)
    log = ServingLog(tmp_path / "few", "1", SPEC)
    log.write(served(0))
    _until(lambda: files(tmp_path / "few"))
    log.close()


def test_a_directory_that_cannot_be_written_costs_rows_and_is_used_again_once_it_can(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(serving_log, "FLUSH_SECONDS", 0.02)
    place, lost = tmp_path / "log", rows("lost")
    place.write_text("a file where the directory should be")
    log = ServingLog(place, "1", SPEC)
    for n in range(3):
        log.write(served(n))
        _until(lambda n=n: rows("lost") - lost == 3 * (n + 1))
    assert len([r for r in caplog.records if "loses rows" in r.message]) == 1
    place.unlink()
    log.write(served(9))
    _until(lambda: all_rows(place).height == 3)
    log.close()
    assert all_rows(place)["request_id"].unique().to_list() == ["r9"]


def test_a_full_disk_costs_rows_and_leaves_no_half_file(tmp_path):
    # A limit on the size of files stands for a disk that is full in the middle of a file.
    lived = _child(tmp_path, "resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))\nlog.write(served(1))\nlog.close()")
    assert lived.returncode == 0, lived.stderr
    assert json.loads(lived.stdout) == {"lost": 3.0, "written": 0.0}
    assert files(tmp_path) == [] and all_rows(tmp_path).height == 0


def test_kill_9_costs_what_was_not_written_yet_and_leaves_no_half_file(tmp_path):
    script = "log.write(served(1))\nlog._flush()\nfor n in range(2, 200): log.write(served(n))\nos.kill(os.getpid(), 9)"
    assert _child(tmp_path, script).returncode == -signal.SIGKILL
    found = all_rows(tmp_path)["request_id"].unique().to_list()
    assert "r1" in found and len(files(tmp_path)) == 1
    # While it writes, too: whatever is there can be read to the end.
    busy = f"""
import threading, time
from engagement.served import files
def killer():
    while len(files({str(tmp_path / "busy")!r})) < 5:
        time.sleep(0.0007)
    os.kill(os.getpid(), 9)
threading.Thread(target=killer).start()
for n in range(10**9):
    log.write(served(n, items=[str(i) for i in range(300)]))
    log._flush()"""
    assert _child(tmp_path / "busy", busy).returncode == -signal.SIGKILL
    written = all_rows(tmp_path / "busy")
    assert written.height == 300 * written["request_id"].n_unique() >= 300 * 5
    assert written["request_id"].n_unique() == len(files(tmp_path / "busy"))


def _child(directory, body):
    script = "import json, os, resource, signal\nfrom prometheus_client import REGISTRY\n"
    script += "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    script += "from tests.served_lab import ServingLog, served\nfrom tests.serving_lab import SPEC\n"
    script += f"log = ServingLog({str(directory)!r}, '1', SPEC)\n{body}\n"
    script += "name = 'evergreen_serving_log_rows_total'\n"
    script += "print(json.dumps({h: REGISTRY.get_sample_value(name, {'how': h}) for h in ('lost', 'written')}))"
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, cwd=Path(__file__).parents[2]
    )


def test_features_of_a_sample_of_requests_are_kept_as_they_were_read(tmp_path):
    n, one = with_features(0, "u1")
    _, other = with_features(n, "u2", AT + timedelta(hours=1))
    unlucky = next(f"r{i}" for i in range(n + 500) if not keeps_features(f"r{i}"))
    left_out = replace(one, request=replace(one.request, request_id=unlucky))
    old = replace(one, degraded="cached")
    write(tmp_path, one, left_out, other, old)
    (found,) = read_features(tmp_path, AT - timedelta(days=9999), AT + timedelta(days=9999))
    assert found.table.request_id.tolist() == [one.request.request_id.encode(), other.request.request_id.encode()]
    assert found.as_of == (AT, AT + timedelta(hours=1))
    for i, answer in enumerate((one, other)):
        mine = found.table.select(np.array([i]))
        for name in ("user_id", "time", "request_cat", "item_id", "item_cat", "item_num"):
            np.testing.assert_array_equal(getattr(mine, name), getattr(answer.features, name), err_msg=name)


def test_the_sample_is_of_the_stated_size_and_the_same_for_every_version():
    kept = [i for i in range(20_000) if keeps_features(f"r{i}")]
    assert 0.8 < len(kept) * FEATURES_EVERY / 20_000 < 1.2
    assert kept == [i for i in range(20_000) if keeps_features(f"r{i}")]


def test_days_go_when_they_are_too_old_and_so_do_halves_that_nobody_will_finish(tmp_path):
    now = AT
    write(tmp_path, served(1))
    for age in (KEEP_DAYS, KEEP_DAYS + 1):
        day = tmp_path / f"date={now.date() - timedelta(days=age)}"
        day.mkdir()
        (day / "x.parquet").write_bytes(b"")
    (tmp_path / "date=yesterday").mkdir()
    today = files(tmp_path)[-1].parent
    for name, age in (("old", 3601), ("new", 3599)):
        half = today / f".{name}.tmp"
        half.write_bytes(b"PAR1")
        os.utime(half, (now.timestamp() - age,) * 2)
    clean(tmp_path, now)
    left = sorted(p.name for p in tmp_path.iterdir())
    assert left == sorted([f"date={now.date() - timedelta(days=KEEP_DAYS)}", today.name, "date=yesterday"])
    assert [p.name for p in today.glob(".*")] == [".new.tmp"]


def test_the_day_of_a_file_is_the_one_on_which_it_was_written(tmp_path):
    write(tmp_path, served(1))
    (file,) = files(tmp_path)
    assert file.parent.name == f"date={from_us(int(file.name.split('-')[0])).date()}"
    assert all_rows(tmp_path)["created_timestamp"][0].date().isoformat() == file.parent.name.removeprefix("date=")


@pytest.mark.parametrize("many", [1, 1000])
def test_a_thousand_candidates_fit(tmp_path, many):
    write(tmp_path, served(1, items=[f"i{i}" for i in range(many)]))
    assert all_rows(tmp_path).height == many <= MAX_ROWS


def test_a_log_that_was_closed_takes_nothing_and_says_so(tmp_path):
    log = ServingLog(tmp_path, "1", SPEC)
    log.close()
    dropped = rows("dropped")
    log.write(served(1))
    assert rows("dropped") == dropped + 3


def _until(true):
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)
