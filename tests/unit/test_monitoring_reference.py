"""What travels with a model: it is small, adds up over updates, and says clearly when it cannot be read."""

from dataclasses import replace
from datetime import timedelta

import numpy as np
import pyarrow as pa
import pytest

from engagement.errors import EvergreenError
from engagement.table import Feature, hash_id
from monitoring import rules
from monitoring.compare import Window, compare
from monitoring.frame import names_of
from monitoring.like import ends
from monitoring.reference import OLD, Reference, window_hours
from tests.feed_world import SPEC, START, TRAINED, feed, hashed, put, window

TABLE = feed()
DAY = timedelta(days=1)


@pytest.fixture(scope="module")
def reference():
    return Reference.of(window(TABLE, START, TRAINED, {"user_profile__country": {1: "nl"}}), None)


def test_what_is_saved_is_read_back_and_compares_the_same(reference, tmp_path):
    reference.save(tmp_path)
    read = Reference.load(tmp_path)
    for name in ("spec", "start", "end", "hours", "users", "rows", "usual", "names", "centres", "slot", "holidays"):
        assert getattr(read, name) == getattr(reference, name), name
    current = window(TABLE, TRAINED + DAY, TRAINED + 2 * DAY)
    ours, theirs = compare(reference, current).columns, compare(read, current).columns
    assert [(c.name, c.drifted) for c in ours] == [(c.name, c.drifted) for c in theirs]
    assert [c.score for c in ours] == pytest.approx([c.score for c in theirs], abs=2e-3)


def test_same_window_gives_the_same_bytes_and_digest(reference, tmp_path):
    again = Reference.of(window(TABLE, START, TRAINED, {"user_profile__country": {1: "nl"}}), None)
    for name, made in (("a", reference), ("b", again)):
        made.save(tmp_path / name)
    files = sorted(f.name for f in (tmp_path / "a").iterdir())
    assert files and all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)
    assert reference.digest == again.digest == Reference.load(tmp_path / "a").digest
    assert sum((tmp_path / "a" / f).stat().st_size for f in files) < 1_000_000


def test_update_keeps_what_its_parent_knew_but_not_its_parents_predictions(reference):
    child = Reference.of(window(TABLE, TRAINED, TRAINED + 3 * DAY), reference)
    assert child.start == child.end - timedelta(days=rules.KEEP_DAYS)
    assert all(ends(cell) > child.start for cell in child.cells)
    kept = [k for k in child.cells if k in reference.cells]
    assert len(kept) == 4 * 25 and all(child.cells[k].requests == reference.cells[k].requests for k in kept)
    assert set(child.predictions) == {k for k in child.cells if k not in reference.cells}
    for name, scores in child.usual.items():
        held = reference.usual.get(name, ())
        assert scores[: len(held)] == held or len(scores) == rules.PAST_WINDOWS
    assert len(child.usual["user_profile__age"]) > len(reference.usual["user_profile__age"])


def test_words_that_only_a_grandparent_learned_are_known(reference):
    grandchild = reference
    for turn in range(3):
        start = TRAINED + 4 * turn * DAY
        grandchild = Reference.of(put(window(TABLE, start, start + 4 * DAY), "user_id", 77), grandchild)
    known = set(grandchild.vocabularies["user_id"].hashes.tolist())
    assert set(hashed("user_id", ["u0", "u399"]).tolist()) | {77} <= known


def test_hours_that_were_learned_in_two_parts_are_one_cell(reference):
    middle = TRAINED - 2 * DAY + timedelta(hours=3)
    first = Reference.of(window(TABLE, START, middle), None)
    both = Reference.of(window(TABLE, middle, TRAINED), first)
    assert {k: s.requests for k, s in both.cells.items()} == {k: s.requests for k, s in reference.cells.items()}


def test_model_with_other_features_begins_its_reference_anew(reference):
    other = replace(SPEC, features=(*SPEC.features[:-1], Feature("item_profile__other", "candidate", "numeric")))
    late = window(TABLE, TRAINED, TRAINED + 3 * DAY)
    tables = {"table": replace(late.table, spec=other), "part": replace(late.part, spec=other)}
    made = Reference.of(replace(late, **tables), reference)
    assert made.start == TRAINED and "item_profile__fixed" not in made.usual


def test_empty_training_window_gives_a_reference_that_compares_nothing():
    made = Reference.of(Window.empty(SPEC, START, TRAINED), None)
    assert not made.cells and not made.usual
    found = compare(made, window(TABLE, TRAINED, TRAINED + DAY))
    assert found.columns == () and found.broken == {} and found.skipped


def test_windows_are_the_shortest_that_usually_hold_enough_rows_and_users():
    hours, users, rows = window_hours(TABLE, START, TRAINED)
    assert hours == 24 and users > rules.ENOUGH_USERS and rows > rules.ENOUGH_ROWS  # 64 rows an hour, 400 people
    assert window_hours(TABLE.select(np.arange(0, TABLE.requests, 200)), START, TRAINED)[0] == rules.HOURS[-1]
    assert window_hours(TABLE.select(np.arange(0)), START, TRAINED)[0] == rules.HOURS[-1]


def test_bundle_of_an_earlier_release_says_in_one_line_to_retrain(tmp_path):
    (tmp_path / OLD).write_bytes(b"PAR1")
    with pytest.raises(EvergreenError, match="of an earlier release. Retrain"):
        Reference.load(tmp_path / "reference")


def test_reference_that_is_gone_half_written_or_of_another_format_says_so(reference, tmp_path):
    with pytest.raises(EvergreenError, match="holds no drift reference"):
        Reference.load(tmp_path / "nowhere")
    reference.save(tmp_path)
    told = (tmp_path / "reference.json").read_text()
    (tmp_path / "reference.json").write_text(told.replace('"format": 1', '"format": 99'))
    with pytest.raises(EvergreenError, match="format 99, not 1"):
        Reference.load(tmp_path)
    (tmp_path / "reference.json").write_text(told)
    cells = tmp_path / "cells.parquet"
    cells.write_bytes(cells.read_bytes()[:1000])
    with pytest.raises(EvergreenError, match="cells.parquet"):
        Reference.load(tmp_path)


def test_names_of_categories_come_from_raw_values_and_ids_stay_unnamed():
    sample = pa.table(
        {
            "user_id": ["u1", "u2", "u3"],
            "user_profile__country": ["nl", None, "de"],
            "item_profile__tags": [["a", "b"], None, ["a"]],
            "item_profile__price": [1.0, 2.0, 3.0],
        }
    )
    names = names_of(sample, SPEC)
    country = "user_profile__country"
    assert names[country] == {hash_id(country, "nl"): "nl", hash_id(country, "de"): "de"}
    assert set(names["item_profile__tags"].values()) == {"a", "b"}
    assert set(names) == {country, "item_profile__tags"}
