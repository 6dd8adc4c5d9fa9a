"""Every feature of every candidate, compared with a computation from the definitions in plain Python."""

import math
from datetime import timedelta

import numpy as np
import pyarrow as pa
import pytest

from engagement.errors import EvergreenError
from engagement.table import MISSING, hash_id
from tests.features_world import ACTIONS, AS_OF, DAY, EPOCH, HOUR, START, WINDOW, history, logged, stats, us, world

KEYS = {  # of each stats view
    "user_stats": ("user_id",),
    "item_stats": ("item_id",),
    "category_stats": ("category",),
    "user_category_stats": ("user_id", "category"),
}


def _expected_requests(rows):
    known = [r for r in rows if r["created_timestamp"] < AS_OF and r["event_timestamp"] < AS_OF]
    by_request = {}
    for row in known:
        by_request.setdefault(row["request_id"], []).append(row)
    found = []
    for request, members in by_request.items():
        first = min(members, key=lambda r: (r["event_timestamp"], r["item_id"]))
        if WINDOW[0] <= first["event_timestamp"] < WINDOW[1]:
            found.append((first["event_timestamp"], request, first, sorted(members, key=lambda r: r["item_id"])))
    return sorted(found, key=lambda f: (f[0], f[1])), known


def test_every_candidate_of_every_request_is_there_once_and_in_order():
    w = world()
    expected, _ = _expected_requests(w.rows)
    assert [r.decode() for r in w.table.request_id] == [e[1] for e in expected]
    assert list(w.table.time) == [us(e[0]) for e in expected]
    assert [i.decode() for i in w.table.item_id] == [m["item_id"] for e in expected for m in e[3]]
    labels = [[m[a] for a in ACTIONS] for e in expected for m in e[3]]
    assert (w.table.labels == np.array(labels)).all()
    assert w.table.rows == len(w.sample) > 300
    assert {"gap-1", "tie-2", "late-1", "edge"} <= {e[1] for e in expected}
    assert "hidden" not in {e[1] for e in expected}


def _column(w, name):
    """Values of a column by request id; of its first candidate."""
    ids, values = (w.sample.column(n).to_pylist() for n in ("request_id", name))
    return dict(zip(reversed(ids), reversed(values), strict=True))


def test_statistics_of_all_four_views_equal_the_definition_at_every_request():
    w = world()
    expected, known = _expected_requests(w.rows)
    items = {i["item_id"]: i for i in w.snapshot.items().to_pylist()}
    rows = logged(known, items.values())
    names = [f.name for f in w.table.spec.features if "_stats__" in f.name]
    assert len(names) == 4 * (3 * 4 + 2)
    columns = {view: [n for n in names if n.split("__")[0] == view] for view in KEYS}
    got = {n: w.sample.column(n).to_pylist() for n in names}
    cache, empty, without, row = {}, 0, 0, 0
    for at, _, first, members in expected:
        for member in members:
            item = items[member["item_id"]]
            tags = item["tags"] if item["created_timestamp"] <= at else None
            values = {"user_id": first["user_id"], "item_id": member["item_id"], "category": (tags or [None])[0]}
            for view, keys in KEYS.items():
                wanted = {k: values[k] for k in keys}
                # The numbers change at whole hours and when they expire only.
                key = (view, *wanted.values(), at if at > START + 40 * DAY else at.replace(minute=0, second=0))
                if key not in cache:
                    cache[key] = {} if None in wanted.values() else stats(rows, wanted, at)
                empty += not cache[key]
                without += None in wanted.values()
                for name in columns[view]:
                    mine, theirs = got[name][row], cache[key].get(name.split("__")[1])
                    assert mine == theirs or mine == pytest.approx(theirs, rel=1e-12), (name, wanted, at)
            row += 1
    assert row == len(w.sample)
    assert without >= 4  # the item without a category, and one that was not available yet
    assert empty > 10  # never seen, or expired


def test_numbers_expire_right_after_seven_days_and_not_before():
    w = world()
    column = _column(w, "user_stats__impressions_30d")
    # Both users were last active on day 11: their closing zeros are of the hour at which that left the last window.
    assert column["ttl-1"] == 0.0
    assert column["ttl-2"] is None


def test_a_row_exactly_at_a_tick_counts_from_the_next_one_and_leaves_after_its_window():
    w = world()
    shown, saved = (_column(w, f"user_stats__{n}_1h") for n in ("impressions", "count_save"))
    # At 5:00 the first row is shown; at 6:00 it counts, the one shown at that instant and the one known then do not.
    assert (shown["tick-1"], shown["tick-2"], saved["tick-2"]) == (None, 1, 1)
    # At 7:00 those of [6:00, 7:00) count; the one of 5:30 became known at 6:00, too late for the hour.
    assert (shown["tick-4"], saved["tick-4"]) == (2, 1)
    day = _column(w, "user_stats__impressions_1d")
    assert (day["tick-4"], day["tick-6"]) == (4, 3)  # a day later those before 6:00 have left, and that of 7:00 counts


def test_a_category_of_one_item_has_that_items_numbers():
    w = world()
    for name in ("impressions_30d", "count_save_1d", "rate_hide_30d"):
        category, item = (_column(w, f"{view}__{name}") for view in ("category_stats", "item_stats"))
        # Before its item was available the category did not exist, though the item was shown.
        assert category["fresh-1"] is None
        assert category["fresh-2"] == item["fresh-2"] is not None


def test_late_rows_enter_the_numbers_only_after_they_were_known():
    w = world()
    _, known = _expected_requests(w.rows)
    assert len([r for r in known if r["request_id"] == "late-1"]) == 5
    rows = logged(known, w.snapshot.items().to_pylist())
    before = stats(rows, {"user_id": "u3"}, START + 48 * DAY)
    assert before["impressions_7d"] == 0  # the closing row of the days before
    assert stats(rows, {"user_id": "u3"}, START + 49 * DAY) != stats(rows, {"user_id": "u3"}, START + 49 * DAY + HOUR)
    after = stats(rows, {"user_id": "u3"}, START + 50 * DAY)
    assert (after["impressions_7d"], after["count_save_7d"]) == (5, 3)


def test_profiles_ages_and_times_equal_the_definition():
    w = world()
    expected, _ = _expected_requests(w.rows)
    items = {r["item_id"]: r for r in w.snapshot.items().to_pylist()}
    users = w.snapshot.users().to_pylist()
    data = {f.name: w.sample.column(f.name).to_pylist() for f in w.table.spec.features}
    row = 0
    for at, _, first, members in expected:
        versions = [u for u in users if u["user_id"] == first["user_id"] and u["event_timestamp"] <= at]
        user = max(versions, key=lambda u: u["event_timestamp"]) if versions else {}
        for member in members:
            item = items[member["item_id"]] if items[member["item_id"]]["created_timestamp"] <= at else {}
            assert data["user_profile__country"][row] == user.get("country")
            assert data["user_profile__age"][row] == user.get("age")
            assert data["context__surface"][row] == first["surface"]
            for name in ("category", "tags", "length"):
                assert data[f"item_profile__{name}"][row] == item.get(name)
            age = (at - item["created_timestamp"]) / DAY if item else None
            assert data["item_age_days"][row] == (None if age is None else pytest.approx(age))
            assert data["hour_of_day"][row] == str(at.hour)
            assert data["day_of_week"][row] == str(at.weekday())
            row += 1
    assert "at" in data["user_profile__country"]
    assert "future" not in data["user_profile__country"]
    assert None in data["user_profile__country"] and None in data["item_age_days"]


def test_history_pointers_equal_the_definition_and_never_show_a_request_its_own_actions():
    w = world()
    expected, known = _expected_requests(w.rows)
    longest = 0
    for i, (at, _, first, _) in enumerate(expected):
        span = slice(w.table.history_start[i], w.table.history_end[i])
        columns = (w.table.history_time, w.table.history_item, w.table.history_actions)
        mine = list(zip(*(c[span] for c in columns), strict=True))
        theirs = history(known, first["user_id"], at)
        assert mine == [(t, hash_id("item_id", item), mask) for t, item, mask in theirs]
        assert all(t < us(at) for t, _, _ in mine)
        last = None if not theirs else (us(at) - theirs[-1][0]) / 86_400e6
        column = w.sample.column("days_since_action")[int(w.table.offsets[i])].as_py()
        assert column == last or column == pytest.approx(last)
        longest = max(longest, len(theirs))
    assert longest == 100


def test_an_action_known_at_the_very_instant_of_a_request_is_not_seen_by_it():
    w = world()
    requests = [r.decode() for r in w.table.request_id]
    shown = {}
    for name in ("tie-1", "tie-2", "tie-3"):
        i = requests.index(name)
        shown[name] = set(w.table.history_item[w.table.history_start[i] : w.table.history_end[i]][-4:])
    i3, i4, i6 = (hash_id("item_id", i) for i in ("i3", "i4", "i6"))
    assert i4 not in shown["tie-1"] and i3 not in shown["tie-2"]
    assert {i3, i4} <= shown["tie-3"]
    assert i6 not in shown["tie-3"]  # shown five minutes earlier, known at the request's own instant


def test_encoded_columns_equal_hashes_and_transforms_of_the_raw_values():
    w = world()
    spec = w.table.spec
    owner = w.table.request_of_row
    for level, hashed, block in (
        ("request", True, w.table.request_cat[owner]),
        ("request", False, w.table.request_num[owner]),
        ("candidate", True, w.table.item_cat),
        ("candidate", False, w.table.item_num),
    ):
        at = 0
        for feature in spec.of(level, hashed):
            raw, mine = w.sample.column(feature.name).to_pylist(), block[:, at : at + feature.width]
            at += feature.width
            for value, got in zip(raw, mine, strict=True):
                if feature.kind == "categories":
                    hashes = [hash_id(feature.name, v) for v in (value or [])[:8]]
                    assert list(got) == hashes + [MISSING] * (8 - len(hashes))
                elif feature.kind == "categorical":
                    assert got[0] == (MISSING if value is None else hash_id(feature.name, value))
                else:
                    number = math.nan if value is None else value
                    want = math.log1p(number) if feature.transform == "log1p" else number
                    np.testing.assert_allclose(got[0], np.float32(want), rtol=1e-6)
        assert at == block.shape[1]


def test_a_window_without_requests_is_told_in_one_line():
    w = world()
    silent = (START + 20 * DAY, START + 30 * DAY)
    with pytest.raises(EvergreenError, match="no requests between 2024-01-21 00:00 and 2024-01-31 00:00"):
        w.repo.table(w.snapshot, *silent, w.home / "nothing")
    assert not (w.home / "nothing").exists()


def test_a_window_takes_its_start_and_leaves_its_end():
    w = world()
    times = np.unique(w.table.time)
    first, last = (EPOCH + timedelta(microseconds=int(t)) for t in (times[10], times[20]))
    part = w.repo.table(w.snapshot, first, last, w.home / "part")
    assert (part.time.min(), part.time.max()) == (times[10], times[19])
    # The same requests give the same features whatever the window.
    whole = w.table.between(us(first), us(last))
    assert (part.request_id == whole.request_id).all()
    for name in ("request_cat", "request_num", "item_cat", "item_num", "labels"):
        np.testing.assert_array_equal(getattr(part, name), getattr(whole, name))
    for i in range(part.requests):
        mine = part.history_time[part.history_start[i] : part.history_end[i]]
        np.testing.assert_array_equal(mine, whole.history_time[whole.history_start[i] : whole.history_end[i]])
    assert part.history_time.max() < part.time.max()


def test_the_same_table_twice_has_the_same_digest(tmp_path):
    w = world()
    w.repo.table(w.snapshot, *WINDOW, tmp_path / "again")
    assert (tmp_path / "again" / "table.json").read_text() == (w.home / "table" / "table.json").read_text()
    assert isinstance(w.sample, pa.Table)
