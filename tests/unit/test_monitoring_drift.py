"""One drift check by Evidently itself: what is drift, what is noise, and what is broken data."""

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from test_monitoring_frame import SPEC, put, window

from engagement.errors import EvergreenError
from engagement.table import Feature
from monitoring import rules
from monitoring.drift import Skew, check
from monitoring.verdict import DriftVerdict

AS_OF = datetime(2026, 3, 2, 3, tzinfo=UTC)
REFERENCE = window(users=200, seed=1)


@pytest.fixture
def judge(tmp_path):
    def run(current, reference=REFERENCE, spec=SPEC, **more):
        return check(reference, current, spec, AS_OF, "7", tmp_path, **more)

    return run


def compared(verdict):
    return {c.name: c for c in verdict.columns}


def test_same_population_is_no_drift_and_leaves_whole_files(judge, tmp_path):
    verdict = judge(window(users=80, seed=2), quality={"HIT@3/save": 0.31, "HIT@3/hide": float("nan")})
    assert not verdict.drifted
    assert verdict.drifted_columns == ()
    assert verdict.broken == {}
    assert verdict.share == 0.0
    assert set(compared(verdict)) == {"country", "topic", "age", "clicks", "price", "score_save", "score_hide"}
    assert set(verdict.skipped) == {"user_id", "item_id", "tags", "look", "day_of_week"}
    assert verdict.churn["user_id"] == 1.0
    assert verdict.churn["item_id"] == 0.0
    assert "0 of 5 features drifted" in verdict.reason
    assert DriftVerdict.load(tmp_path / "drift.json").to_json() == verdict.to_json()
    page = (tmp_path / "drift.html").read_text()
    assert verdict.reason[:20] in page
    assert "<script src=" not in page  # self-contained
    assert json.loads((tmp_path / "snapshot.json").read_text())["timestamp"] == "2026-03-02T03:00:00"


def test_train_serve_skew_is_told_and_only_an_unexplained_one_is_in_the_reason(judge, tmp_path):
    why = {"user_stats__impressions_1h": "3 of 300 values differ (3 stale)"}
    stale = judge(window(users=40, seed=2), skew=Skew(0.01, why, unexplained=False))
    assert (stale.skew, stale.skew_share) == (why, 0.01)
    assert "skew" not in stale.reason and "3 of 300 values differ" in (tmp_path / "drift.html").read_text()
    other = judge(window(users=40, seed=2), skew=Skew(0.01, why, unexplained=True))
    assert "train/serve skew: user_stats__impressions_1h: 3 of 300" in other.reason
    assert not other.drifted
    assert judge(window(users=40, seed=2)).skew_share is None


def test_same_windows_give_the_same_verdict(judge):
    assert judge(window(users=40, seed=2)) == judge(window(users=40, seed=2))


def test_shifted_features_are_drift_and_named_worst_first(judge):
    current = window(users=80, seed=2)
    current = put(current, "age", pc.add(current["age"].combine_chunks(), 20.0))
    current = put(current, "clicks", pc.multiply(current["clicks"].combine_chunks(), 4))
    verdict = judge(current)
    assert verdict.drifted
    assert verdict.drifted_columns == ("clicks", "age")
    assert verdict.share == pytest.approx(2 / 5)
    assert verdict.reason.startswith("2 of 5 features drifted, weighing 40% (threshold")
    assert "clicks" in verdict.reason


def test_one_shifted_feature_of_five_is_told_but_is_no_drift_of_the_window(judge):
    current = window(users=80, seed=2)
    verdict = judge(put(current, "age", pc.add(current["age"].combine_chunks(), 20.0)))
    assert verdict.drifted_columns == ("age",)
    assert not verdict.drifted


def test_shifted_score_of_the_primary_action_is_drift_by_itself(judge):
    current = window(users=80, seed=2)
    verdict = judge(put(current, "score_save", pc.multiply(current["score_save"].combine_chunks(), 2.0)))
    assert verdict.drifted
    assert verdict.share == 0.0
    assert "predicted score_save" in verdict.reason
    other = judge(put(current, "score_hide", pc.multiply(current["score_hide"].combine_chunks(), 4.0)))
    assert compared(other)["score_hide"].drifted
    assert not other.drifted


def test_scores_and_flags_are_those_of_evidently(judge, tmp_path):
    from scipy.stats import wasserstein_distance

    current = window(users=80, seed=2)
    current = put(current, "age", pc.add(current["age"].combine_chunks(), 20.0))
    verdict = judge(current)
    ref, cur = (np.log1p(t["clicks"].to_numpy()) for t in (REFERENCE, current))
    expected = wasserstein_distance(ref, cur) / ref.std()
    assert compared(verdict)["clicks"].score == pytest.approx(expected, rel=1e-9)
    results = json.loads((tmp_path / "snapshot.json").read_text())["metric_results"].values()
    drift = [r for r in results if r["metric_value_location"]["metric"]["params"]["type"].endswith(":ValueDrift")]
    failed = {
        r["metric_value_location"]["metric"]["params"]["column"]
        for r in drift
        if any(t["status"] == "FAIL" for t in r["tests"])
    }
    assert failed == set(verdict.drifted_columns) == {"age"}


def test_new_category_that_takes_over_is_seen_and_counted_as_churn(judge):
    current = window(users=80, seed=2)
    topics = np.where(np.arange(current.num_rows) % 2, current["topic"].to_pylist(), "video")
    verdict = judge(put(current, "topic", topics.tolist()))
    assert "topic" in verdict.drifted_columns
    assert verdict.churn["topic"] == pytest.approx(0.5, abs=0.01)


def test_feature_that_arrives_all_null_is_broken_data_not_drift(judge):
    current = window(users=80, seed=2)
    verdict = judge(put(current, "age", pa.nulls(current.num_rows, pa.float64())))
    assert verdict.broken == {"age": "is missing in 100% of the rows (0% in the reference)"}
    assert "age" not in compared(verdict)
    assert verdict.reason.startswith("broken data: age is missing")


@pytest.mark.parametrize(
    ("name", "values", "why"),
    [
        ("price", float("nan"), "is missing in 100%"),
        ("price", float("inf"), "is missing in 100%"),
        ("price", "n/a", "is missing in 100%"),
        ("country", None, "is missing in 100%"),
        ("country", "xx", "is stuck at xx"),
        ("age", 0.0, "is stuck at 0.0"),
        ("score_save", float("nan"), "is missing in 100%"),
    ],
)
def test_frozen_or_emptied_column_is_broken(judge, name, values, why):
    current = window(users=80, seed=2)
    verdict = judge(put(current, name, [values] * current.num_rows))
    assert list(verdict.broken) == [name]
    assert verdict.broken[name].startswith(why)


def test_vanished_column_is_broken_and_a_new_one_is_left_out(judge):
    verdict = judge(window(users=80, seed=2).drop_columns(["age", "tags"]))
    assert verdict.broken == {
        "age": "is gone from the current window",
        "tags": "is gone from the current window",
    }
    verdict = judge(window(users=80, seed=2), reference=REFERENCE.drop_columns(["age"]))
    assert verdict.skipped["age"] == "not in the reference"
    assert verdict.broken == {}


def test_columns_without_information_neither_crash_nor_drift(judge):
    spec = replace(
        SPEC,
        features=(*SPEC.features, Feature("flat", "candidate", "numeric"), Feature("void", "candidate", "numeric")),
    )

    def widen(table):
        flat = pa.array(np.full(table.num_rows, 5, dtype=np.int8))
        return table.append_column("flat", flat).append_column("void", pa.nulls(table.num_rows))

    verdict = judge(widen(window(users=80, seed=2)), reference=widen(REFERENCE), spec=spec)
    assert compared(verdict)["flat"].score == 0.0
    assert verdict.skipped["void"] == "no values"
    assert not verdict.drifted


def test_hundred_thousand_categories_are_compared_by_the_most_frequent(judge, tmp_path):
    def many(table, seed):
        ids = np.random.default_rng(seed).integers(0, 100_000, table.num_rows)
        return put(table, "topic", [f"t{i}" for i in ids])

    verdict = judge(many(window(users=80, seed=2), 3), reference=many(REFERENCE, 4))
    assert not compared(verdict)["topic"].drifted
    assert verdict.churn["topic"] > 0.9
    assert (tmp_path / "drift.html").stat().st_size < 8e6


def test_empty_window_is_one_clear_sentence(judge, tmp_path):
    verdict = judge(REFERENCE.slice(0, 0))
    assert not verdict.drifted
    assert verdict.reason == "No rows in the current window, nothing to compare"
    assert verdict.rows == (4000, 0)
    assert "No rows in the current window" in (tmp_path / "drift.html").read_text()
    assert not (tmp_path / "snapshot.json").exists()


@pytest.mark.parametrize("rows", [1, 2, rules.MIN_ROWS - 1])
def test_tiny_window_never_drifts_however_odd(judge, rows):
    current = window(users=80, seed=2).slice(0, rows)
    current = put(current, "age", np.full(rows, 300.0))
    current = put(current, "score_save", np.full(rows, 0.99))
    verdict = judge(current)
    assert not verdict.drifted
    assert verdict.broken == {}
    assert verdict.reason.startswith("Too small to tell")


def test_few_users_raise_the_threshold_by_their_noise(judge):
    """Twelve users differ from a population by chance, however many rows they bring."""
    few, many = window(users=12, per_user=100, seed=9), window(users=600, per_user=5, seed=9)
    wide, narrow = compared(judge(few))["age"], compared(judge(many))["age"]
    assert wide.threshold > 2 * narrow.threshold
    assert wide.score > 0.1  # Evidently's own threshold would call this drift
    assert not wide.drifted


def test_large_window_is_sampled_and_says_so(judge, monkeypatch):
    monkeypatch.setattr(rules, "MAX_ROWS", 3000)
    verdict = judge(window(users=300, seed=2))
    assert verdict.window_rows == (4000, 6000)
    assert max(verdict.rows) <= 3000
    assert not verdict.drifted


def test_reference_without_the_declared_features_is_refused(judge):
    with pytest.raises(EvergreenError, match="holds none of the declared features"):
        judge(REFERENCE, reference=pa.table({"other": [1]}))
    with pytest.raises(EvergreenError, match="is empty"):
        judge(REFERENCE, reference=REFERENCE.slice(0, 0))


def test_unfinished_check_is_told(tmp_path):
    with pytest.raises(EvergreenError, match="holds no drift verdict"):
        DriftVerdict.load(tmp_path / "drift.json")
    (tmp_path / "drift.json").write_text('{"drifted": tr')
    with pytest.raises(EvergreenError, match="holds no drift verdict"):
        DriftVerdict.load(tmp_path / "drift.json")


def test_as_of_in_another_zone_is_the_same_check(judge, tmp_path):
    local = AS_OF.astimezone(timezone(timedelta(hours=9)))
    verdict = check(REFERENCE, window(users=20, seed=2), SPEC, local, "7", tmp_path)
    assert verdict.as_of == AS_OF.isoformat()
    assert json.loads((tmp_path / "snapshot.json").read_text())["timestamp"] == "2026-03-02T03:00:00"
