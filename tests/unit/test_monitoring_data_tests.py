"""What holds a retrain, fault by fault, and that healthy days, thin days and ended logs do not."""

from dataclasses import replace
from datetime import timedelta

import numpy as np
import polars as pl
import pytest

from engagement.importers import contract_dir
from engagement.store import EngagementStore
from engagement.table import MISSING, TableSpec, micros
from monitoring import data_tests
from monitoring.data_tests import HISTORY, LATE_RISE, QUARANTINED, failed
from monitoring.days import Day, Log, read_log
from monitoring.looks import look, looks_of
from monitoring.sketch import sketch
from tests.synth import START, dataset, write_contract_dir
from tests.unit.model_synth import SPEC, make

DAYS, REQUESTS = 28, 90  # of the feed, and a day
END = START + timedelta(days=DAYS, hours=3)
WINDOW = (END - timedelta(days=4), END)
LAST = WINDOW[1].date() - timedelta(days=1)


def table_of(days=DAYS, users=40):
    """A healthy table with as many requests each day."""
    made = make(requests=days * REQUESTS, users=users, size=8)
    return replace(made, time=micros(START) + (np.arange(made.requests) * 86_400_000_000) // REQUESTS)


def log_of(users=40, **days):
    """A healthy log; `days` changes single ones, by `d<number>`."""
    rng = np.random.default_rng(0)
    held = {}
    for i in range(DAYS + 1):
        rows = int(1000 * (1.5 if i % 7 > 4 else 1.0) * rng.normal(1, 0.03))
        acted = {"save": int(rows * rng.normal(0.2, 0.01)), "click": int(rows * 0.3), "hide": int(rows * 0.05)}
        hours = frozenset(range(24)) if i < DAYS else frozenset(range(3))
        held[(START + timedelta(days=i)).date()] = Day(rows, users, acted, int(rows * 0.02), hours)
    for name, change in days.items():
        day = (START + timedelta(days=int(name[1:]))).date()
        if change is None:
            del held[day]
        else:
            held[day] = replace(held[day], **change)
    return Log(held, ("save", "click", "hide"), 400, 0, {})


def wrong(table=None, log=None, usual=(), expected=None, window=WINDOW):
    found = data_tests.test_window(table or table_of(), log or log_of(), window, usual, expected)
    return {t.name: t.text for t in failed(found)}


def changed(table, column, day, values):
    """The table with other values in one block from a day of the feed on."""
    rows = table.request_of_row if len(getattr(table, column)) == table.rows else np.arange(table.requests)
    block = getattr(table, column).copy()
    from_then = np.asarray(table.time)[rows] >= micros(START + timedelta(days=day))
    block[from_then] = values(block[from_then])
    return replace(table, **{column: block})


def test_healthy_data_holds_nothing_and_everything_is_judged():
    tests = data_tests.test_window(table_of(), log_of(), WINDOW)
    assert failed(tests) == []
    assert [t.name for t in tests if "not judged" in t.text] == []


@pytest.mark.parametrize("rows, held", [(990, False), (300, True), (0, True)])
def test_a_day_that_lost_most_of_its_rows_is_named(rows, held):
    log = log_of(d25={"rows": rows} if rows else None)
    assert ("volume" in wrong(log=log)) == held
    if held:
        assert f"{START + timedelta(days=25):%Y-%m-%d} has {rows:,} rows" in wrong(log=log)["volume"]


def test_quiet_weekdays_are_compared_with_weekdays_not_with_weekends():
    """1,000 rows are usual on a Thursday and would be a third too few on a Sunday; 55 % of a Sunday is too few."""
    assert "volume" not in wrong(log=log_of(d26={"rows": 950}))  # a Saturday with a weekday's rows: unusual, no fault
    assert "volume" in wrong(log=log_of(d26={"rows": 600}))
    assert "volume" not in wrong(log=log_of(d25={"rows": 800}))


def test_feeds_too_thin_to_tell_are_not_held_for_an_empty_day():
    log = log_of(users=6, d25={"rows": 1, "users": 1, "acted": {"save": 0, "click": 0, "hide": 0}}, d26=None)
    assert wrong(log=log) == {}


def test_an_ended_log_is_no_fault():
    log = log_of(d28=None, d27=None, d26=None, d25={"rows": 200, "hours": frozenset(range(6))})
    assert wrong(log=log) == {}


def test_first_days_of_a_young_log_are_not_judged():
    young = {k: v for k, v in log_of().days.items() if k >= (START + timedelta(days=23)).date()}
    assert wrong(log=replace(log_of(), days=young | {LAST: replace(young[LAST], rows=10)})) == {}


@pytest.mark.parametrize("saves, held", [(0, True), (1000, True), (205, False), (150, False)])
def test_lost_or_stuck_labels_of_one_day_hold(saves, held):
    log = log_of(d25={"rows": 1000, "acted": {"save": saves, "click": 300, "hide": 50}})
    assert ("rate of save" in wrong(log=log)) == held


def test_window_without_any_positive_holds_even_with_nothing_to_compare_it_with():
    table = table_of(days=4)
    nobody = replace(table, labels=np.zeros_like(table.labels))
    empty = Log({}, ("save",), 0, 0, {})
    assert set(wrong(nobody, empty, window=(START, START + timedelta(days=4)))) == {"labels"}


def test_ten_silent_hours_hold_and_three_do_not():
    busy = frozenset(range(24))
    assert "nothing was shown for 10 h from" in wrong(log=log_of(d25={"hours": busy - set(range(8, 18))}))["gaps"]
    assert wrong(log=log_of(d25={"hours": busy - {8, 9, 10}})) == {}


def test_nights_that_are_always_silent_are_no_gap():
    day = {"hours": frozenset(range(8, 17))}
    assert wrong(log=log_of(**{f"d{i}": day for i in range(DAYS)})) == {}


def test_rows_of_yesterday_that_mostly_came_late_hold_at_the_limit():
    day = log_of().days[LAST]
    usual = float(np.median([d.late / d.rows for k, d in log_of().days.items() if k < LAST]))
    late = int(np.ceil((usual + LATE_RISE) * day.rows)) + 1
    assert "late rows" in wrong(log=log_of(d27={"late": late}))
    assert "late rows" not in wrong(log=log_of(d27={"late": late - 20}))


def test_a_feature_that_vanishes_holds_and_is_named():
    for column, name, values in (
        ("item_cat", "topics", lambda b: np.column_stack([b[:, :1], np.full_like(b[:, 1:], MISSING)])),
        ("item_num", "item_rate", lambda b: np.column_stack([np.full(len(b), np.nan), b[:, 1:]])),
        ("item_num", "content", lambda b: np.column_stack([b[:, :1], np.full_like(b[:, 1:], np.nan)])),
    ):
        found = wrong(changed(table_of(), column, 26, values))
        assert set(found) == {f"missing: {name}"}
        assert f"{name} is missing in 100%" in found[f"missing: {name}"]


def test_a_feature_that_few_rows_have_holds_when_none_has_it():
    rare = lambda b: np.column_stack([np.where(np.arange(len(b)) % 5 > 0, np.nan, b[:, 0]), b[:, 1:]])  # noqa: E731
    sparse = changed(table_of(), "item_num", 0, rare)
    assert wrong(sparse) == {}
    lost = changed(sparse, "item_num", 26, lambda b: np.column_stack([np.full(len(b), np.nan), b[:, 1:]]))
    assert set(wrong(lost)) == {"missing: item_rate"}


def test_a_feature_that_froze_holds():
    frozen = changed(table_of(), "item_num", 26, lambda b: np.column_stack([np.full(len(b), 7.0), b[:, 1:]]))
    assert set(wrong(frozen)) == {"stuck: item_rate"}


def test_a_feature_that_is_often_constant_is_not_stuck():
    season = changed(table_of(), "item_num", 0, lambda b: np.column_stack([np.full(len(b), 7.0), b[:, 1:]]))
    assert wrong(changed(season, "item_num", 26, lambda b: b + 1)) == {}


def test_infinite_numbers_count_as_missing():
    broken = changed(table_of(), "item_num", 26, lambda b: np.column_stack([np.full(len(b), np.inf), b[:, 1:]]))
    assert set(wrong(broken)) == {"missing: item_rate"}


def test_update_windows_are_compared_with_what_the_champion_learned():
    """The table of an update begins where the champion's ended, so the days before it are known from the reference."""
    whole = table_of()
    day = 86_400_000_000
    parts = {d: whole.between(micros(START) + d * day, micros(START) + (d + 1) * day) for d in range(24)}
    cells = {(f"w{d // 7}", (d % 7) * 4): sketch(part, {}) for d, part in parts.items()}
    usual = looks_of(SPEC, cells)
    for d, seen in enumerate(usual):
        there = look(parts[d])
        assert seen["item_rate"].missing == pytest.approx(there["item_rate"].missing)
        assert seen["topics"].missing == pytest.approx(there["topics"].missing)
    update = whole.between(micros(WINDOW[0]), micros(WINDOW[1]))
    assert wrong(update, usual=usual) == {}
    broken = changed(update, "item_num", 26, lambda b: np.column_stack([np.full(len(b), np.nan), b[:, 1:]]))
    assert set(wrong(broken, usual=usual)) == {"missing: item_rate"}


def test_a_feature_or_action_that_the_champion_reads_is_gone():
    fewer = TableSpec(tuple(f for f in SPEC.features if f.name != "topics"), SPEC.actions, "save", ("hide",))
    more = replace(SPEC, actions=(*SPEC.actions, "share"))
    assert wrong(expected=SPEC) == {} and wrong(expected=fewer) == {}
    assert wrong(expected=more) == {"schema": "share is gone"}


def test_labels_that_are_no_labels_hold():
    table = table_of()
    labels = table.labels.copy()
    labels[-1, 1] = 2
    assert set(wrong(replace(table, labels=labels))) == {"schema"}


def test_quarantine_holds_above_its_share_only():
    rows = table_of().between(micros(WINDOW[0]), micros(WINDOW[1])).rows
    most = int(QUARANTINED * rows / (1 - QUARANTINED))
    assert wrong(log=replace(log_of(), quarantined={"bad_type": most})) == {}
    found = wrong(log=replace(log_of(), quarantined={"bad_type": most + 1}))
    assert set(found) == {"quarantined"} and f"{most + 1:,} bad_type" in found["quarantined"]
    assert set(wrong(log=replace(log_of(), quarantined={"unknown_item": most + 1}))) == {"quarantined", "unknown items"}
    assert set(wrong(log=replace(log_of(), quarantined={"future_timestamp": most // 2}))) == {"clock"}


def test_a_delivery_that_came_twice_under_new_ids_holds():
    table = table_of()
    day = table.select(np.arange(table.requests - REQUESTS, table.requests))
    order = np.argsort(np.concatenate([table.time, day.time]), kind="stable")
    index = np.concatenate([np.arange(table.requests), np.arange(table.requests - REQUESTS, table.requests)])[order]
    assert set(wrong(table.select(index))) == {"duplicates"}


def test_an_empty_window_holds_for_want_of_labels_and_does_not_crash():
    empty = table_of().between(0, 1)
    assert set(wrong(empty, Log({}, ("save",), 0, 0, {}))) == {"labels"}


def test_log_is_read_from_the_store_day_by_day(tmp_path):
    feed = write_contract_dir(tmp_path / "feed", users=12, items=40, days=10, late_share=0.2)
    store = EngagementStore(tmp_path / "data")
    store.append(contract_dir.read(feed))
    as_of = START + timedelta(days=10, hours=3)
    rows = pl.read_parquet(feed / "engagements").filter(pl.col("created_timestamp") < as_of)
    log = read_log(store.snapshot(as_of), table_of(1), as_of - timedelta(days=3), as_of, HISTORY)
    assert sum(d.rows for d in log.days.values()) == rows.height
    assert sum(d.acted["save"] for d in log.days.values()) == rows["save"].sum()
    late = rows.filter(pl.col("created_timestamp") - pl.col("event_timestamp") > timedelta(hours=1))
    assert sum(d.late for d in log.days.values()) == late.height > 0
    assert {d.users for d in log.days.values()} == {12}
    assert log.actions == ("save", "click", "hide") and log.quarantined == {} and log.stretched == 0


def test_bad_rows_count_until_they_are_delivered_again_and_good(tmp_path):
    store = EngagementStore(tmp_path)
    hours = [{"request_id": f"r{i}", "at": i} for i in range(40)]
    bad = [
        {"request_id": "b1", "item_id": "nowhere", "at": 30},
        {"request_id": "b2", "at": 50},  # the clock is ten hours ahead of the import
        {"request_id": "b3", "item_id": "nowhere", "at": -300},  # of another window
    ]
    now = START + timedelta(hours=40)
    store.append(dataset([*hours, *bad]), now)
    window = (START, now)

    def counted(table):
        return dict(read_log(store.snapshot(now), table, *window, HISTORY).quarantined)

    table = table_of(1)
    assert counted(table) == {"future_timestamp": 1, "unknown_item": 1}
    repaired = table.select(np.arange(2))
    repaired = replace(repaired, request_id=np.array([b"b1", b"r1"]), item_id=np.full(repaired.rows, b"nowhere"))
    assert counted(repaired) == {"future_timestamp": 1}


def test_requests_whose_rows_lie_days_apart_are_stretched(tmp_path):
    store = EngagementStore(tmp_path)
    torn = [{"request_id": "torn", "item_id": "i1", "at": 1}, {"request_id": "torn", "item_id": "i2", "at": 30}]
    store.append(dataset([{"request_id": "r", "at": 2}, *torn]))
    as_of = START + timedelta(hours=48)
    log = read_log(store.snapshot(as_of), table_of(1), START, as_of, HISTORY)
    assert (log.requests, log.stretched) == (2, 1)
    assert "clock within requests" in wrong(log=replace(log_of(), stretched=5))
    assert wrong(log=replace(log_of(), stretched=4)) == {}
