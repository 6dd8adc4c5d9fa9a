"""The reading half of the serving log: damaged files, the join with later actions, and forgetting."""

from datetime import timedelta

import numpy as np
import polars as pl
import pyarrow as pa
import pytest

from engagement.contract import Manifest, engagement_schema
from engagement.served import files, forget, join_actions, read, read_features
from engagement.table import Feature, TableSpec
from tests.served_lab import AT, failed, served, with_features, write
from tests.serving_lab import ACTIONS, SPEC

MINUTE, HOUR = timedelta(minutes=1), timedelta(hours=1)
MANIFEST = Manifest("a-feed", ACTIONS, "save", "impressions", ("hide",), context_features=("surface",))
ALWAYS = (AT - 9999 * HOUR, AT + 9999 * HOUR)


def log_of(directory, *answers, **options):
    write(directory, *answers, **options)
    return read(directory, *ALWAYS)


def acted(*rows):
    """Engagements: (request, item, action or None, known after)."""
    schema = engagement_schema(MANIFEST)
    columns = {n: [None] * len(rows) for n in schema.names} | {"sampled": [False] * len(rows)}
    columns |= {"request_id": [r[0] for r in rows], "user_id": ["u1"] * len(rows), "item_id": [r[1] for r in rows]}
    columns |= {"event_timestamp": [AT] * len(rows), "created_timestamp": [AT + r[3] for r in rows]}
    columns |= {a: [r[2] == a for r in rows] for a in ACTIONS}
    return pa.table(columns, schema=schema)


def joined(rows, engagements, as_of, matures=HOUR):
    known = engagements.filter(pa.compute.less(engagements["created_timestamp"], pa.scalar(as_of)))
    return join_actions(rows, known, MANIFEST, as_of, matures)


def labels(found, request="r0"):
    rows = found.filter(request_id=request).sort("item_id").to_dicts()
    return {r["item_id"]: tuple(r[a] for a in ACTIONS) for r in rows}


NOBODY_KNOWS, NOTHING = (None,) * 3, (False,) * 3


def test_labels_are_unknown_until_a_request_has_matured_and_then_true_or_false(tmp_path):
    rows = log_of(tmp_path, served(0), served(1, minutes=1))
    engagements = acted(("r0", "b", "save", MINUTE), ("r0", "b", "click", 2 * MINUTE))
    before = joined(rows, engagements, AT + HOUR - timedelta(microseconds=1))
    assert set(labels(before).values()) == {NOBODY_KNOWS}  # also of the item that is known to be saved
    at_last = joined(rows, engagements, AT + HOUR)
    assert labels(at_last) == {"a": NOTHING, "b": (True, True, False), "c": NOTHING}
    assert set(labels(at_last, "r1").values()) == {NOBODY_KNOWS}


def test_an_action_that_becomes_known_late_counts_in_a_later_join(tmp_path):
    rows, late = log_of(tmp_path, served(0)), acted(("r0", "c", "hide", 30 * HOUR))
    assert labels(joined(rows, late, AT + 2 * HOUR))["c"] == NOTHING
    assert labels(joined(rows, late, AT + 31 * HOUR))["c"] == (False, False, True)


def test_what_real_users_saw_is_joined_and_nothing_else(tmp_path):
    answers = (served(0), served(1, purpose="shadow"), served(2, purpose="replay"), failed(3), served(4, user="u2"))
    found = joined(log_of(tmp_path, *answers), acted(), AT + HOUR)
    assert sorted(found["request_id"].unique()) == ["r0", "r4"]
    assert found.columns[: len(engagement_schema(MANIFEST))] == engagement_schema(MANIFEST).names
    cast = found.select(engagement_schema(MANIFEST).names).to_arrow().cast(engagement_schema(MANIFEST))
    assert not any(cast["sampled"].to_pylist()) and cast["position"].to_pylist() == [0, 1, 2] * 2
    assert found.columns[-6:] == ["score__save", "score__click", "score__hide", "model_version", "canary_bucket",
                                  "degraded"]  # fmt: skip


def test_a_request_that_was_answered_twice_is_joined_once_by_its_last_answer(tmp_path):
    write(tmp_path, served(0, seed=1), version="1")
    write(tmp_path, served(0, seed=2), version="2")
    found = joined(read(tmp_path, *ALWAYS), acted(), AT + HOUR)
    assert found.height == 3 and found["model_version"].unique().to_list() == ["2"]


def test_versions_that_know_other_features_and_actions_are_read_together(tmp_path):
    wider = TableSpec((*SPEC.features, Feature("context__surface", "request", "categorical")), *_rest())
    write(tmp_path, served(0), version="1")
    write(tmp_path, served(1), version="2", spec=wider)
    found = read(tmp_path, *ALWAYS)
    assert found.height == 6 and "surface" in found.columns


def _rest():
    return SPEC.actions, SPEC.primary_action, SPEC.negative_actions


def test_reading_is_by_the_instant_of_the_ranking_from_start_to_before_end(tmp_path):
    write(tmp_path, *(served(n, minutes=n) for n in range(4)))
    assert set(read(tmp_path, AT + MINUTE, AT + 3 * MINUTE)["request_id"]) == {"r1", "r2"}
    assert read(tmp_path / "nowhere", *ALWAYS).is_empty()


@pytest.mark.parametrize("left", [0, 4, 300])
def test_a_file_that_was_cut_is_passed_over_with_a_warning(tmp_path, left, caplog):
    write(tmp_path, served(0))
    write(tmp_path, served(1))
    first = files(tmp_path)[0]
    first.write_bytes(first.read_bytes()[:left])
    assert read(tmp_path, *ALWAYS)["request_id"].unique().to_list() == ["r1"]
    assert first.name in caplog.text


def test_forgetting_takes_a_users_rows_and_features_and_nobody_elses(tmp_path):
    n, mine = with_features(0, "u1")
    n, theirs = with_features(n, "u2")
    _, alone = with_features(n, "u1")
    write(tmp_path, mine, theirs, failed(9001, user="u1"), served(9002, user="u2"))
    write(tmp_path, alone)
    before = read(tmp_path, *ALWAYS).filter(pl.col("user_id") == "u2")
    assert forget(tmp_path, "u1") == 3
    after = read(tmp_path, *ALWAYS)
    assert after.equals(before) and before.height == 6
    (kept,) = read_features(tmp_path, AT - 99_999 * HOUR, AT + 99_999 * HOUR)
    assert kept.table.user_id.tolist() == [b"u2"] and kept.table.request_id.tolist() == [
        theirs.request.request_id.encode()
    ]
    np.testing.assert_array_equal(kept.table.item_num, theirs.features.item_num)
    assert not [f for f in tmp_path.rglob("*") if f.is_file() and b"u1" in f.read_bytes()]
    assert forget(tmp_path, "u1") == 0
    assert forget(tmp_path / "nowhere", "u1") == 0


def test_forgetting_removes_a_file_that_nobody_can_read_because_it_may_hold_the_user(tmp_path):
    _, answer = with_features(0, "u1")
    write(tmp_path, answer)
    damaged = files(tmp_path) + files(tmp_path, suffix=".npz")
    for file in damaged:
        file.write_bytes(file.read_bytes()[:-50])
    assert forget(tmp_path, "u1") == 0 and not any(f.exists() for f in damaged)
