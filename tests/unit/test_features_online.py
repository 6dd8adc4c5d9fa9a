"""What serving reads is what training read: the same values, expiry included, for every user and item."""

import json
from datetime import timedelta

import numpy as np
import polars as pl
import pytest

from engagement.errors import EvergreenError
from engagement.store import EngagementStore
from engagement.table import MISSING, hash_id
from feature_repo.generations import directories, served
from feature_repo.repo import FeatureRepo
from tests.features_world import AS_OF, DAY, START, history, import_synth, scratch, us, world

HOUR = timedelta(hours=1)


@pytest.fixture(scope="module")
def busy():
    """Nine busy days, materialised at the instant at which a probe request of every user shows up in the log."""
    world()  # Feast is imported once for all
    home = scratch()
    store = import_synth(home, users=30, items=60, days=9, late_share=0.1)
    return home, store, FeatureRepo(home / "features")


def _assert_same(offline, online):
    for name in ("request_cat", "request_num"):
        np.testing.assert_array_equal(getattr(offline, name), getattr(online, name), err_msg=name)
    order = {item: i for i, item in enumerate(online.item_id)}
    rows = [order[item] for item in offline.item_id]
    for name in ("item_cat", "item_num"):
        np.testing.assert_array_equal(getattr(offline, name), getattr(online, name)[rows], err_msg=name)
    span = slice(offline.history_start[0], offline.history_end[0])
    assert (online.history_start[0], online.history_end[0]) == (0, span.stop - span.start)
    for name in ("history_time", "history_item", "history_actions"):
        np.testing.assert_array_equal(getattr(offline, name)[span], getattr(online, name), err_msg=name)


def test_online_values_equal_the_offline_table_at_every_requests_own_instant(busy):
    # Each request in turn is the present: the store is materialised as of it, and read for it.
    home, store, repo = busy
    whole = repo.table(store.snapshot(START + 9 * DAY), START + 3 * DAY, START + 9 * DAY, home / "whole")
    log = pl.DataFrame(pl.from_arrow(store.snapshot(START + 9 * DAY).engagements()))
    surface = dict(log.select("request_id", "surface").unique().iter_rows())
    chosen = np.random.default_rng(0).choice(whole.requests, 5, replace=False)
    for r in sorted(chosen):
        request = whole.select(np.array([r]))
        at = START + timedelta(microseconds=int(request.time[0]) - us(START))
        repo.materialize(store.snapshot(at))
        reader = repo.online()
        assert reader.as_of == at
        context = {"surface": surface[request.request_id[0].decode()]}
        items = [i.decode() for i in request.item_id]
        _assert_same(request, reader.read(request.user_id[0].decode(), items[::-1], context, at))


def test_online_values_equal_the_offline_table_for_hundreds_of_users_and_items_at_once(busy):
    home, store, repo = busy
    at = START + 7 * DAY + 3 * HOUR
    repo.materialize(store.snapshot(at))
    reader, rng = repo.online(), np.random.default_rng(1)
    table = _offline_at(repo, store.snapshot(at), at, [f"u{u}" for u in range(30)], rng)
    assert table.rows == 300
    for r in range(table.requests):
        request = table.select(np.array([r]))
        items = [i.decode() for i in request.item_id]
        _assert_same(request, reader.read(request.user_id[0].decode(), items, {"surface": "home"}, at))


def _offline_at(repo, snapshot, at, users, rng):
    """A table of made-up requests at `at`, joined as `FeatureRepo.table` does it."""
    from feature_repo.requests import Requests
    from feature_repo.views import Inputs

    inputs = Inputs(snapshot)
    requests = pl.DataFrame({"request_id": users, "user_id": users, ":time": us(at), "context__surface": "home"})
    items = [sorted(f"i{i}" for i in rng.choice(60, 10, replace=False)) for _ in users]
    rows = pl.DataFrame({":request": range(len(users)), "item_id": items}).explode("item_id")
    made = rows.with_columns(pl.lit(us(at)).alias(":time"), sampled=False, save=False, click=False, hide=False)
    found = Requests(requests, made)
    return repo._raw_table(inputs, found).table()


def test_numbers_expire_online_as_they_do_offline():
    w = world()
    reader = w.repo.online()
    spec = reader.spec
    names = [f.name for f in spec.of("request", hashed=False)]
    column = names.index("user_stats__impressions_30d")
    # u0's last numbers are those of midnight 55; they live through day 62, both ends included.
    for at, alive in ((AS_OF, True), (START + 62 * DAY, True), (START + 62 * DAY + timedelta(microseconds=1), False)):
        value = reader.read("u0", ["i1"], {}, at).request_num[0, column]
        assert np.isfinite(value) == alive, at


def test_numbers_of_a_quiet_user_are_served_until_they_expire():
    w = world()
    store = EngagementStore(w.home / "data")
    try:
        # u1's last row before that is the closing one of midnight 42, three days old.
        w.repo.materialize(store.snapshot(START + 45 * DAY))
        table = w.repo.online().read("u1", ["i1"], {}, START + 45 * DAY)
    finally:
        w.repo.materialize(w.snapshot)
    column = [f.name for f in table.spec.of("request", hashed=False)].index("user_stats__impressions_30d")
    assert table.request_num[0, column] == 0.0


def test_the_served_history_is_the_last_hundred_actions_by_the_definition():
    w, lengths = world(), []
    known = [r for r in w.rows if r["created_timestamp"] < AS_OF and r["event_timestamp"] < AS_OF]
    for user in ("u0", "u1", "u2", "u3", "u4", "stranger"):
        served = w.repo.online().read(user, ["i1"], {}, AS_OF)
        columns = (served.history_time, served.history_item, served.history_actions)
        expected = [(t, hash_id("item_id", i), mask) for t, i, mask in history(known, user, AS_OF)]
        assert list(zip(*columns, strict=True)) == expected
        lengths.append(len(expected))
    assert max(lengths) == 100 and min(lengths) == 1


def test_unknown_users_items_and_contexts_have_no_values():
    w = world()
    table = w.repo.online().read("nobody", ["i1", "nothing", "i1"], {"weather": "wet"}, AS_OF)
    spec = table.spec
    assert table.requests == 1 and table.rows == 3 and len(table.history_time) == 0
    assert table.request_cat[0, 0] == hash_id("user_id", "nobody")
    surface = [f.name for f in spec.of("request", hashed=True)].index("context__surface")
    assert table.request_cat[0, surface] == MISSING
    assert table.item_cat[1, 0] == hash_id("item_id", "nothing")
    assert np.isnan(table.item_num[1]).all() and (table.item_cat[1, 1:] == MISSING).all()
    np.testing.assert_array_equal(table.item_num[0], table.item_num[2])
    of_item = [f.name.startswith("item_") for f in spec.of("candidate", hashed=False) for _ in range(f.width)]
    assert np.isfinite(table.item_num[0, of_item]).all()
    assert not table.labels.any()


def test_feasts_history_view_shows_an_action_only_after_the_instant_at_which_it_became_known():
    import pandas as pd

    from feature_repo.definitions import open_store

    at = START + 47 * DAY - timedelta(microseconds=1)  # the instant of u2's only action of that day
    entities = pd.DataFrame({"user_id": ["u2", "u2"], "event_timestamp": [at, at + timedelta(microseconds=1)]})
    job = open_store(world().repo.root).get_historical_features(entities, ["user_history:time"])
    before, after = (times[-1] for times in job.to_arrow().column("time").to_pylist())
    assert before < us(START + 13 * DAY) and after == us(at)


def test_a_replayed_request_does_not_see_what_came_after_it():
    w = world()
    shown = START + 45 * DAY + timedelta(hours=10, minutes=5)
    table = w.repo.online().read("u0", ["i1"], {}, shown)
    assert len(table.history_time) and table.history_time.max() < us(shown)


def test_a_request_without_candidates_and_a_home_without_features_are_told_in_one_line(tmp_path):
    with pytest.raises(EvergreenError, match="without candidates"):
        world().repo.online().read("u0", [], {}, AS_OF)
    with pytest.raises(EvergreenError, match="no features were materialised"):
        FeatureRepo(tmp_path).online()


def test_an_open_reader_moves_on_when_a_version_is_published_and_old_ones_go(busy):
    home, store, repo = busy
    early, late = (store.snapshot(START + d * DAY + HOUR) for d in (5, 8))
    repo.materialize(early)
    reader = repo.online()
    before = reader.read("u1", ["i1"], {}, early.as_of)
    repo.materialize(late)
    after = reader.read("u1", ["i1"], {}, late.as_of)
    assert reader.as_of == late.as_of
    assert after.history_time[-1] > before.history_time[-1]
    repo.materialize(early)  # back in time: nothing of the later version shines through
    again = reader.read("u1", ["i1"], {}, early.as_of)
    for name in ("request_num", "item_num", "history_time"):
        np.testing.assert_array_equal(getattr(before, name), getattr(again, name))
    assert len(directories(repo.root)) == 1


def test_a_materialisation_that_was_killed_is_made_whole_by_the_next(busy):
    home, store, repo = busy
    snapshot = store.snapshot(START + 6 * DAY + HOUR)
    repo.materialize(snapshot)
    done = served(repo.root)
    expected = repo.online().read("u2", ["i2"], {}, snapshot.as_of)
    # Half a generation, a served one that lost its record, and a view that Feast's registry holds for busy.
    from feast.feature_view import FeatureViewState

    from feature_repo.definitions import open_store

    feast = open_store(repo.root)
    view = feast.get_feature_view("user_stats")
    view.state = FeatureViewState.MATERIALIZING
    feast.registry.apply_feature_view(view, feast.project, commit=True)
    half = done.with_name("20240101T000000-half")
    half.mkdir()
    (half / "online.db").write_bytes((done / "online.db").read_bytes()[:5000])
    (done / "version.json").unlink()
    repo.materialize(snapshot)
    assert directories(repo.root) == [served(repo.root)] != [done]
    got = repo.online().read("u2", ["i2"], {}, snapshot.as_of)
    np.testing.assert_array_equal(got.item_num, expected.item_num)
    assert json.loads((served(repo.root) / "version.json").read_text())["snapshot"] == snapshot.digest


def test_the_same_version_is_not_written_twice(busy):
    home, store, repo = busy
    snapshot = store.snapshot(START + 4 * DAY + HOUR)
    repo.materialize(snapshot)
    file = served(repo.root) / "version.json"
    written = file.stat().st_mtime_ns
    repo.materialize(snapshot)
    assert served(repo.root) == file.parent and file.stat().st_mtime_ns == written
