"""What live traffic says about two versions: arms by the split, failures that were hidden, nothing told twice."""

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest

from engagement.served import files
from engagement.table import hash_id
from serving.live import LAG, LiveTraffic, recent
from serving.plane import Doors
from serving.traffic import Stage
from tests.served_lab import AT, failed, served, write
from tests.serving_lab import ACTIONS

CANARY, OTHERS = 999, 1000  # buckets beside the boundary of 10 %


def stage(percent=10, champion="1", since=None):
    since = since or datetime.now(UTC) - timedelta(minutes=10)
    return Stage(champion, "2", percent, "salt", Doors("http://g", "http://a", "http://b"), since)


@pytest.fixture
def log(tmp_path):
    return tmp_path / "log"


def look(log, mark=None, at=None, **options):
    return LiveTraffic(log, "save", **options).look(at or stage(), mark)


def test_users_belong_to_the_arm_that_the_split_gives_them_to(log):
    ours, theirs = served(1, "ours", bucket=CANARY, latency_ms=7.0), served(2, "theirs", bucket=OTHERS)
    write(log, theirs, version="1")
    write(log, ours, version="2")
    evidence = look(log).evidence
    assert evidence.percent == 10
    for arm, answer in ((evidence.champion, theirs), (evidence.challenger, ours)):
        assert (arm.failed_N.tolist(), arm.invalid_N.tolist(), arm.constant_N.tolist()) == ([False],) * 3
        assert arm.user_N.tolist() == [hash_id("user_id", answer.request.user_id)] and not arm.problems
        np.testing.assert_allclose(arm.score_N, [answer.scores_CA[:, 0].mean()], rtol=1e-6)
        assert arm.latency_N.tolist() == [answer.latency_ms]


def test_in_the_dark_all_users_are_the_champions_and_of_a_first_model_all_are_the_challengers(log):
    write(log, served(1, bucket=0), served(2, bucket=9_999), version="1")
    dark = look(log, at=stage(percent=0)).evidence
    assert (len(dark.champion), len(dark.challenger)) == (2, 0)
    write(log, served(3, bucket=0), served(4, bucket=9_999), version="2")
    first = look(log, at=stage(champion="", percent=1)).evidence
    assert (len(first.champion), len(first.challenger)) == (0, 4)
    assert first.challenger.failed_N.sum() == 2  # those that another version answered


def test_an_answer_in_the_others_place_and_a_shed_or_failed_request_are_failures(log):
    write(log, served(1, bucket=CANARY), served(2, bucket=OTHERS), failed(3, 429, bucket=OTHERS), version="1")
    write(log, failed(1, 500, bucket=CANARY), failed(4, 503, bucket=CANARY), served(5, bucket=CANARY), version="2")
    evidence = look(log).evidence
    assert sorted(evidence.challenger.failed_N) == [False, True, True]  # r1 failed twice and counts once
    assert np.isnan(evidence.challenger.latency_N[evidence.challenger.failed_N]).all()
    assert any("r4" in p and "503" in p for p in evidence.challenger.problems)
    assert sorted(evidence.champion.failed_N) == [False, True] and "shed" in evidence.champion.problems[0]


def test_scores_that_are_broken_disordered_constant_or_not_the_models_are_told(log):
    good = served(0, bucket=CANARY)
    backwards = served(1, bucket=CANARY, order_C=np.argsort(served(1).scores_CA[:, 0]))
    broken = served(2, bucket=CANARY, scores_CA=np.full((3, 3), np.nan, np.float32))
    same = served(3, bucket=CANARY, scores_CA=np.full((3, 3), 0.5, np.float32))
    single = served(4, bucket=CANARY, items=("a",))
    popular = served(5, bucket=CANARY, scores_CA=same.scores_CA, degraded="popularity")
    cached = served(6, bucket=CANARY, degraded="cached")
    write(log, good, backwards, broken, same, single, popular, cached, version="2")
    arm = look(log).evidence.challenger
    assert arm.invalid_N.tolist() == [False, True, True, False, False, False, False]
    assert arm.constant_N.tolist() == [False, False, False, True, False, False, False]
    assert arm.degraded_N.tolist() == [False, False, False, False, False, True, True]
    assert np.isnan(arm.score_N).tolist() == [False, False, True, False, False, True, False]
    assert not arm.failed_N.any() and len(arm.problems) == 2


def test_replayed_and_shadow_requests_and_those_without_a_bucket_are_not_live(log):
    write(log, served(1, purpose="shadow"), served(2, purpose="replay"), served(3, bucket=None), version="2")
    evidence = look(log).evidence
    assert len(evidence.champion) == len(evidence.challenger) == 0


def test_what_arrived_before_the_stage_began_is_passed_over(log):
    write(log, served(1, bucket=OTHERS), served(2, bucket=OTHERS, latency_ms=3_600_000.0), version="1")
    assert len(look(log, at=stage(since=datetime.now(UTC) - timedelta(minutes=30))).evidence.champion) == 1
    assert len(look(log, at=stage(since=datetime.now(UTC) + timedelta(seconds=1))).evidence.champion) == 0


def test_nothing_is_told_twice_and_a_file_that_appears_late_is_not_missed(log):
    since = datetime.now(UTC) - timedelta(hours=1)
    write(log, served(1, bucket=OTHERS), version="1")
    slow = files(log)[0]
    hidden = slow.rename(slow.with_suffix(".hidden"))
    write(log, served(2, bucket=OTHERS), version="1")
    first = look(log, at=stage(since=since))
    again = look(log, _kept(first.mark), at=stage(since=since))
    assert (len(first.evidence.champion), len(again.evidence.champion)) == (1, 0)
    hidden.rename(slow)
    late = look(log, _kept(again.mark), at=stage(since=since))
    assert len(late.evidence.champion) == 1
    assert len(look(log, _kept(late.mark), at=stage(since=since)).evidence.champion) == 0
    assert len(late.mark["read"]) == 2


def test_a_file_may_be_late_by_the_stated_time_and_no_more(log):
    since = datetime.now(UTC) - timedelta(hours=1)
    write(log, served(1, bucket=OTHERS), version="1")
    mark = look(log, at=stage(since=since)).mark
    early = mark["through"] - LAG // timedelta(microseconds=1)
    (file,) = files(log)
    for name, seen in ((f"{early - 1:016d}-late.parquet", 0), (f"{early:016d}-late.parquet", 1)):
        file.with_name(name).write_bytes(file.read_bytes())
        assert len(look(log, _kept(mark), at=stage(since=since)).evidence.champion) == seen


def _kept(mark):
    """As a rollout keeps it over a crash."""
    return json.loads(json.dumps(mark))


def test_where_the_gateway_draws_for_each_request_the_version_that_answered_counts(log):
    now = stage()
    write(log, served(1, bucket=CANARY), served(2, bucket=OTHERS), version="1")
    write(log, served(3, bucket=OTHERS), failed(4, 500, bucket=OTHERS), version="2")
    sticky = look(log, at=now).evidence
    drawn = look(log, at=replace(now, doors=replace(now.doors, sticky=False))).evidence
    assert sorted(sticky.champion.failed_N) == [False, True, True] and sticky.challenger.failed_N.tolist() == [True]
    assert drawn.champion.failed_N.tolist() == [False, False]
    assert sorted(drawn.challenger.failed_N) == [False, True]


def test_a_sample_of_live_requests_can_be_asked_again_as_they_were(log):
    items = ("c", "a", "b")
    answers = [served(n, f"u{n}", items, minutes=n) for n in range(40)]
    write(log, *answers, served(99, purpose="shadow"), failed(98), version="1")
    asked = recent(log, [], AT, 15)
    assert len(asked) == 15 and all(a.saved is None for a in asked)
    times = [a.request.time for a in asked]
    assert times == sorted(times)
    by_id = {s.request.request_id: s for s in answers}
    for a in asked:
        was = by_id[a.request.request_id]
        assert (a.request.user_id, a.request.time) == (was.request.user_id, was.at)
        assert sorted(a.request.item_ids) == sorted(items)
    assert recent(log, [], AT, 15) == asked and len(recent(log, [], AT, 500)) == 40
    assert recent(log, [], AT + timedelta(days=1), 15) == []


def test_a_log_without_the_primary_action_is_no_evidence_of_scores(log):
    write(log, served(1, bucket=CANARY), version="2")
    evidence = LiveTraffic(log, "purchase").look(stage(), None).evidence
    assert evidence.challenger.invalid_N.tolist() == [True]
    assert "purchase" not in ACTIONS
