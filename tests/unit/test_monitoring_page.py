"""The page of a check: the whole verdict first, Evidently's part from the same data, nothing of the data as markup."""

import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest

from monitoring import page, panels, summary
from monitoring.compare import Pair
from monitoring.counts import Counts, categories, numbers
from monitoring.verdict import DataTest, ServingHealth
from tests.drift_lab import FIRST, outcome, pairs, score, verdict

HOSTILE = "</script><script>window.hit=1</script><img src=x onerror='window.hit=1'>"


def snapshot(out):
    return json.loads((out / "snapshot.json").read_text())


def series(out):
    """The numbers of a snapshot by the name under which panels ask for them."""
    where = [
        (r["metric_value_location"]["metric"]["params"], r["value"]) for r in snapshot(out)["metric_results"].values()
    ]
    return {p["column"]: value for p, value in where if p["type"].endswith(":MeanValue")}


def evidently_scores(out):
    where = [
        (r["metric_value_location"]["metric"]["params"], r["value"]) for r in snapshot(out)["metric_results"].values()
    ]
    return {p["column"]: value for p, value in where if p["type"].endswith(":ValueDrift")}


@pytest.mark.parametrize("shift", [0.0, 0.3, 0.8])
def test_evidently_s_scores_of_the_drawn_values_agree_with_ours_of_all_rows(tmp_path, shift):
    drawn = pairs(shift, rows=200_000)
    page.save(verdict(drawn), drawn, tmp_path)
    theirs = evidently_scores(tmp_path)
    assert set(theirs) == {"spend", "age_years", "country"}
    for pair in drawn:  # heavy tails lose a little of their spread in 10,000 values
        assert theirs[pair.name] == pytest.approx(score(pair), rel=0.03, abs=0.003), pair.name


def test_of_many_columns_the_worst_are_drawn_and_every_prediction_and_all_are_in_the_table(tmp_path):
    number = pairs(0.8)[0]
    drawn = [replace(number, name=f"spend_{i}") for i in range(page.PLOTS + 5)] + [replace(number, name="score_save")]
    found = verdict(drawn)
    groups = ["user"] * (len(drawn) - 1) + ["prediction"]
    columns = [replace(c, score=i / 10, group=g) for i, (c, g) in enumerate(zip(found.columns, groups, strict=False))]
    columns[-1] = replace(columns[-1], score=0.0)
    page.save(replace(found, columns=tuple(columns)), drawn, tmp_path)
    assert set(evidently_scores(tmp_path)) == {f"spend_{i}" for i in range(5, page.PLOTS + 5)} | {"score_save"}
    text = (tmp_path / "drift.html").read_text()
    assert f"plots of the {page.PLOTS} worst of {page.PLOTS + 5} features and of the predictions" in text
    assert all(f"<td>{p.name}</td>" in text for p in drawn)


def test_columns_that_evidently_cannot_draw_are_in_the_table_alone(tmp_path):
    nothing = np.full(500, np.nan, np.float32)
    gone = Pair("spend", "numeric", 0.0, numbers(np.arange(500, dtype=np.float32), 0.0), numbers(nothing, 0.0), {})
    constant = Pair("age_years", "numeric", 3.0, *[numbers(np.full(500, 3, np.float32), 3.0)] * 2, {})
    empty = Pair("country", "categorical", 0.0, Counts.none(), categories(np.arange(9)), {})
    page.save(verdict(pairs()), [gone, constant, empty], tmp_path)
    assert evidently_scores(tmp_path) == {"age_years": 0.0}
    text = (tmp_path / "drift.html").read_text()
    assert all(f"<td>{name}</td>" in text for name in ("spend", "age_years", "country", "new item_id"))


def test_1e5_categories_are_a_plot_of_the_most_frequent_and_the_rest(tmp_path):
    draw = np.random.default_rng(0)
    sides = [categories(1 + draw.zipf(1.3, 100_000) % 100_000) for _ in range(2)]
    wide = Pair("topic", "categorical", 0.0, *sides, {2: "cats & dogs"})
    page.save(verdict([wide]), [wide], tmp_path)
    assert evidently_scores(tmp_path)["topic"] == pytest.approx(0, abs=0.03)
    text = (tmp_path / "snapshot.json").read_text()
    assert "cats & dogs" in text and "(other)" in text
    assert len(text) < 200_000


def all_wrong():
    """A verdict with something wrong of every sort."""
    found = verdict(pairs(0.8))
    return replace(
        found,
        broken={"age_years": "90 % missing, 1 % before"},
        kind="broken",
        outcome=outcome(0.21, lost=True),
        serving=ServingHealth(2500, 0.07, 0.0, {}, 8.0, 480.0, ("7 % of the requests failed",)),
        data=(DataTest("volume", False, 12, "≥ 120", "12 requests, 120 are needed"), *found.data),
        skew={"spend": "30 of 300 values differ (stale)"},
        skew_share=0.1,
    )


def test_the_page_says_everything_that_is_wrong_before_the_tables(tmp_path):
    page.save(all_wrong(), (), tmp_path)
    top = (tmp_path / "drift.html").read_text().partition("<table>")[0]
    for said in ("90 % missing", "below expected", "7 % of the requests failed", "120 are needed", "30 of 300 values"):
        assert said in top
    tiles = re.findall(r'<div class="tile (\w+)"><b>([^<]*)', top)
    assert all(state == "wrong" for state, _ in tiles)
    assert [name for _, name in tiles] == ["Data", "Drift", "Quality", "Serving", "Train/serve skew", "Data tests"]
    states = [t["state"] for t in snapshot(tmp_path)["tests_widgets"][1]["params"]["tests"]]
    assert states[:6] == ["fail"] * 6


def test_a_calm_check_is_green_and_says_so(tmp_path):
    page.save(verdict(pairs()), pairs(), tmp_path)
    text = (tmp_path / "drift.html").read_text()
    assert '<div class="check right">' in text and 'class="tile wrong"' not in text
    assert "drawn evenly from up to 40,000 rows" in text
    tests = snapshot(tmp_path)["tests_widgets"][1]["params"]["tests"]
    assert {t["state"] for t in tests} == {"success"}
    assert snapshot(tmp_path)["tests_widgets"][0]["params"]["counters"][1] == {"label": "Fail", "value": "0"}


def test_nothing_of_the_data_becomes_markup(tmp_path):
    drawn = [replace(p, names={3: HOSTILE, 7: "de", 11: "<b>fr</b>"}) for p in pairs(0.8)]
    found = verdict(drawn)
    columns = tuple(replace(c, note=HOSTILE) for c in found.columns)
    found = replace(found, reason=HOSTILE, evidence=(HOSTILE,), columns=columns, broken={HOSTILE: HOSTILE})
    found = replace(
        found, skew={"spend": HOSTILE}, skipped={"x": HOSTILE}, data=(DataTest("x", False, 1, "y", HOSTILE),)
    )
    page.save(found, drawn, tmp_path)
    text = (tmp_path / "drift.html").read_text()
    assert "window.hit" in text  # it is told, as text
    assert not re.search(r"<script>window\.hit|<img src=x", text)
    assert "<script>window.hit" not in (tmp_path / "snapshot.json").read_text()
    assert "<script>window.hit" not in page.without_plots(found, HOSTILE)


def test_an_empty_check_has_a_page_and_a_run_without_plots(tmp_path):
    empty = replace(verdict(), columns=(), reason="No requests in the window", requests=(900, 0), rows=(9000, 0))
    page.save_empty(replace(empty, outcome=None, serving=None, skew_share=None), tmp_path)
    text = (tmp_path / "drift.html").read_text()
    assert "No requests in the window" in text and len(text) < 30_000
    assert series(tmp_path)["requests"] == 0
    assert not {"HIT@3/save", "skew", "errors"} & set(series(tmp_path))


def test_numbers_that_are_not_known_are_absent_and_never_nan(tmp_path):
    found = verdict(pairs())
    unknown = replace(outcome(math.nan), calibration={}, expected=None)
    page.save(replace(found, outcome=unknown, skew_share=None), (), tmp_path)
    assert {"HIT@3/save", "HIT@3 expected", "calibration save", "skew"}.isdisjoint(series(tmp_path))
    assert "NaN" not in (tmp_path / "snapshot.json").read_text()
    assert series(tmp_path) == pytest.approx(panels.numbers(replace(found, outcome=unknown, skew_share=None)))


def test_a_run_is_tagged_with_model_slot_and_kind_at_a_naive_instant(tmp_path):
    page.save(verdict(pairs(0.8)), (), tmp_path, tags=["early"])
    data = snapshot(tmp_path)
    assert data["tags"] == ["kind:population", "model:7", "slot:2026-02-27T03:00:00+00:00", "early"]
    assert data["timestamp"] == FIRST.replace(tzinfo=None).isoformat()


def test_a_trimmed_snapshot_keeps_summary_tests_and_every_panel_s_number(tmp_path):
    drawn = pairs(0.8)
    page.save(verdict(drawn), drawn, tmp_path)
    before, text = series(tmp_path), (tmp_path / "snapshot.json").read_text()
    trimmed = page.trimmed(text)
    (tmp_path / "snapshot.json").write_text(trimmed)
    assert series(tmp_path) == before
    assert page.has_plots(text) and not page.has_plots(trimmed) and page.trimmed(trimmed) == trimmed
    assert snapshot(tmp_path)["tests_widgets"] == json.loads(text)["tests_widgets"]
    titles = [w["title"] for w in snapshot(tmp_path)["widgets"]]
    assert titles[-1] == "The page of this check" and any(t.startswith("Columns") for t in titles)
    assert len(trimmed) < 40_000 < len(text)


def test_tables_without_rows_are_left_out():
    bare = replace(verdict(), columns=(), outcome=None, serving=None, data=(), skipped={})
    assert [t.title for t in summary.tables(bare)] == ["The check"]
