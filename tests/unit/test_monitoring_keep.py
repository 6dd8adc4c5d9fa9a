"""What is kept of a year of checks: the policy on its boundaries, applied again, killed, and on the disk."""

import json
from datetime import UTC, datetime, timedelta

import pytest

from monitoring import keep
from monitoring.keep import Level, plan, stamp
from monitoring.verdict import DriftVerdict
from tests.drift_lab import FIRST, column, pairs, verdict, write_check

HOUR = timedelta(hours=1)


def hours(count, end=FIRST + timedelta(days=400)):
    """Stamps of hourly checks, oldest first, that end at an instant."""
    return [stamp(end - HOUR * back) for back in reversed(range(count))]


def test_each_tier_keeps_what_the_policy_says():
    names = hours(24 * 400)
    levels = plan(dict.fromkeys(names, False))
    age = {name: HOUR * (len(names) - 3 - i) for i, name in enumerate(names)}
    assert [levels[n] for n in names[-3:]] == [Level.PLOTS] * 3
    paged = [n for n in names[:-3] if age[n] <= keep.PAGED]
    assert {levels[n] for n in paged} == {Level.PAGE} and len(paged) == 24
    recent = [n for n in names[:-3] if keep.PAGED < age[n] <= keep.ALL]
    assert {levels[n] for n in recent} == {Level.TABLES} and len(recent) == 24
    sixes = [n for n in names if keep.ALL < age[n] <= keep.BLOCKS and levels[n] == Level.TABLES]
    assert {n[9:11] for n in sixes} == {"00", "06", "12", "18"}
    assert len(sixes) in (47, 48, 49)
    days = [n for n in names if keep.BLOCKS < age[n] <= keep.YEAR and levels[n] == Level.TABLES]
    assert {n[9:11] for n in days} <= {"00"} | {days[0][9:11]}
    assert 350 <= len(days) <= 353
    assert all((levels[n] == Level.GONE) == (age[n] > keep.YEAR) for n in names)


def test_hour_after_hour_keeps_the_same_as_all_at_once():
    names, held = hours(24 * 40), {}
    for i, name in enumerate(names):
        held[name] = i % 97 == 0
        levels = plan(held)
        held = {n: e for n, e in held.items() if levels[n] > Level.THIN}
    at_once = plan({n: i % 97 == 0 for i, n in enumerate(names)})
    assert set(held) == {n for n, level in at_once.items() if level > Level.THIN}
    assert set(plan(held).values()) == {Level.PLOTS, Level.PAGE, Level.TABLES}  # applied again, it changes nothing


def test_events_are_kept_up_to_their_bound_the_newest_first():
    names = hours(24 * 200)
    happened = {n: n[9:11] in ("05", "17") for n in names}  # two a day, never the first of a block
    old = [n for n, level in plan(happened).items() if level > Level.THIN and happened[n]]
    assert len(old) == keep.EVENTS == len([n for n in names if happened[n]][-keep.EVENTS :])
    assert old == [n for n in names if happened[n]][-keep.EVENTS :]
    whole = [n for n, level in plan(happened).items() if happened[n] and level >= Level.PAGE]
    assert len(whole) == keep.PAGES


def test_one_check_by_a_wrong_clock_ages_nothing():
    names = hours(200)
    calm = plan(dict.fromkeys(names, False))
    skewed = plan(dict.fromkeys([*names, stamp(FIRST + timedelta(days=9000))], False))
    assert skewed[names[0]] >= calm[names[0]] > Level.GONE
    assert sum(level > Level.THIN for level in skewed.values()) >= sum(level > Level.THIN for level in calm.values())


@pytest.mark.parametrize("count", [0, 1, 2])
def test_few_checks_are_all_kept(count):
    assert set(plan(dict.fromkeys(hours(count), False)).values()) <= {Level.PLOTS}


def test_a_check_made_just_now_of_long_ago_keeps_its_page():
    names = hours(24 * 30)
    assert plan(dict.fromkeys(names, False), spared=names[1])[names[1]] == Level.PAGE
    assert plan(dict.fromkeys(names, False))[names[1]] == Level.THIN


def small_check(checks, as_of, **changed):
    out = checks / stamp(as_of)
    out.mkdir(parents=True)
    text = DriftVerdict.from_json(verdict(as_of=as_of).to_json())
    text = type(text)(**{**vars(text), **changed})
    (out / "drift.json").write_text(text.to_json())
    (out / "snapshot.json").write_text('{"metadata": {}}')
    (out / "drift.html").write_text("page")
    return out


def test_events_are_what_began_changed_or_ended(tmp_path):
    outs = [small_check(tmp_path, FIRST + HOUR * i, **c) for i, c in enumerate([
        {}, {"drifted": True, "kind": "population"}, {"drifted": True, "kind": "population"},
        {"drifted": True, "kind": "behaviour"}, {}, {"broken": {"age": "gone"}, "kind": "broken"}, {}, {},
    ])]  # fmt: skip
    (outs[7] / "decision.json").write_text(json.dumps({"action": "retrain"}))
    assert list(keep.events(tmp_path).values()) == [False, True, False, True, True, True, True, True]


def test_thinned_checks_keep_their_numbers_and_their_decision(tmp_path):
    start = FIRST
    for i in range(60):
        small_check(tmp_path, start + HOUR * i)
    (tmp_path / stamp(start + HOUR) / "decision.json").write_text('{"action": "none"}')
    before = DriftVerdict.load(tmp_path / stamp(start + HOUR) / "drift.json")
    keep.thin(tmp_path, plan(keep.events(tmp_path)))
    thinned = tmp_path / stamp(start + HOUR)
    assert sorted(p.name for p in thinned.iterdir()) == ["decision.json", "drift.json"]
    after = DriftVerdict.load(thinned / "drift.json")
    assert (after.share, after.reason, after.outcome.hit3) == (before.share, before.reason, before.outcome.hit3)
    assert [c.score for c in after.columns] == pytest.approx([c.score for c in before.columns], rel=1e-3)
    stands = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    keep.thin(tmp_path, plan(keep.events(tmp_path)))
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == stands


def test_a_year_old_check_goes_whole_and_what_a_kill_left_of_it_too(tmp_path):
    old, left = small_check(tmp_path, FIRST), tmp_path / ".gone-20200101T000000"
    left.mkdir()
    (left / "drift.html").write_text("")
    for i in range(4):
        small_check(tmp_path, FIRST + timedelta(days=366) + HOUR * i)
    keep.thin(tmp_path, plan(keep.events(tmp_path)))
    assert not old.exists() and not left.exists()
    assert len(keep.stamps(tmp_path)) == 4


def test_kept_checks_lose_their_plots_with_age_and_damage_stops_nothing(tmp_path):
    whole = write_check(tmp_path, FIRST, pairs(0.0, rows=2000))
    size = (whole / "drift.html").stat().st_size
    unfinished = small_check(tmp_path, FIRST + HOUR)
    (unfinished / "drift.json").unlink()
    for i in range(60):
        small_check(tmp_path, FIRST + HOUR * (i + 2))
    torn = tmp_path / stamp(FIRST + HOUR * 2)
    (torn / "drift.json").write_text("{")
    keep.thin(tmp_path, plan(keep.events(tmp_path)))
    page = (whole / "drift.html").read_text()
    assert size > 3_000_000 > 30_000 > len(page)
    assert "No column is above its threshold" in page and "thinned out" in page
    assert "ValueDrift" not in (whole / "snapshot.json").read_text()
    assert not (unfinished / "snapshot.json").exists()


def test_small_verdicts_of_a_year_fit_their_share():
    wide = verdict()
    columns = tuple(column(f"user_stats__impressions_{i}", i / 300, note="median 1 → 2") for i in range(50))
    text = type(wide)(**{**vars(wide), "columns": columns}).to_json()
    assert len(keep.small(text)) * 8760 < 120_000_000
    assert len(keep.small(text)) < len(text) * 0.7


def test_stamp_is_utc_whatever_the_zone():
    from datetime import timezone

    assert stamp(datetime(2026, 3, 2, 5, tzinfo=timezone(timedelta(hours=2)))) == stamp(FIRST.astimezone(UTC))
