"""Feast's own calls on packed rows, streamed histories, forgetting, and stores that are damaged or gone."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pytest
from feast.data_source import PushMode

from engagement.errors import EvergreenError
from feature_repo.definitions import open_store
from feature_repo.features import views
from feature_repo.generations import served
from feature_repo.online import OnlineReader
from feature_repo.online_cache import HITS, KNOWN_SECONDS, RowCache
from feature_repo.packed import Codec, row_keys
from feature_repo.repo import FeatureRepo
from tests.features_world import DAY, START, us
from tests.online_lab import HOUR, ITEMS, assert_same, at, built, fresh, online, rewrite_past
from tests.redis_lab import redis_server


@pytest.fixture(scope="module")
def store():
    return built()[0]


@pytest.fixture(params=["sqlite", "redis"])
def repo(request):
    with online(request.param) as found:
        yield found


def _streamed(user, when):
    history = {"time": [[us(when)]], "known": [[us(when)]], "actions": [[1]], "item": [["i3"]]}
    known = [pd.Timestamp(when) + pd.Timedelta(microseconds=1)]
    return pd.DataFrame({"user_id": [user], "event_timestamp": known, "created_timestamp": known, **history})


def test_a_pushed_history_is_served_and_outlives_an_older_materialisation_in_place_and_anew(store, repo):
    repo.materialize(at(store, 5))
    reader, now = repo.online(), START + 6 * DAY
    feast = open_store(repo.root, url=repo._url)
    feast.push("user_history_push", _streamed("u1", now), to=PushMode.ONLINE)
    feast.push(
        "user_history_push", _streamed("u1", now - 3 * HOUR), to=PushMode.ONLINE
    )  # late: older than what is there

    def newest():
        return reader.read("u1", ["i1"], {}, now + DAY).history_time.tolist()

    assert newest() == [us(now)]
    repo.materialize(at(store, 5, 9))  # in place
    assert newest() == [us(now)]
    anew = served(repo.root)
    rewrite_past(repo)
    repo.materialize(at(store, 5, 10))
    assert served(repo.root) != anew and newest() == [us(now)]
    feast.push("user_history_push", _streamed("u2", now), to=PushMode.ONLINE)  # the open store follows the link
    assert reader.read("u2", ["i1"], {}, now + DAY).history_time.tolist() == [us(now)]
    repo.materialize(at(store, 4))  # back in time: what was streamed since is not yet known
    assert us(now) not in newest()


def test_feasts_own_reads_and_writes_agree_with_the_reader(store, repo):
    when = START + 6 * DAY + HOUR
    repo.materialize(store.snapshot(when))
    feast = open_store(repo.root, url=repo._url)
    rows, spec = repo.rows()
    for view in views(spec):
        codec, registered = Codec(view), feast.get_feature_view(view.name)
        some = [_texts(view, key) for key in next(rows.scan(view.name))[0][:2]]
        ids = {name: [*(t[i] for t in some), "nobody"] for i, name in enumerate(view.keys)}
        table = codec.unpack(rows.get([(view.name, row_keys(view, ids))])[0])
        refs = [f"{view.name}:{n}" for n, _ in view.columns]
        got = feast.get_online_features(refs, ids).to_dict()
        for name, _ in view.columns:
            assert got[name] == table.column(name).to_pylist(), (view.name, name)
        frame = table.slice(0, 1).to_pandas().assign(**dict.fromkeys(view.keys, "written"))
        frame["event_timestamp"] = frame["created_timestamp"] = pd.Timestamp(when)
        feast.write_to_online_store(view.name, frame)
        other, provider = frame.assign(**dict.fromkeys(view.keys, "protos")), feast._get_provider()
        protos = provider._prep_rows_to_write_for_ingestion(registered, other)
        provider.online_write_batch(feast.config, registered, protos, None)
        wanted = row_keys(view, {name: ["written", "protos"] for name in view.keys})
        ((one, two),) = rows.get([(view.name, wanted)])
        assert one == two and one is not None
        assert codec.unpack([one]).drop(["event_timestamp"]) == table.slice(0, 1).drop(["event_timestamp"])


def _texts(view, key):
    """The join keys that an online key was made of."""
    found = []
    for _ in view.keys[1:]:
        size = int.from_bytes(key[:4], "little")
        found.append(key[4 : 4 + size].decode())
        key = key[4 + size :]
    return [*found, key.decode()]


def test_a_forgotten_user_leaves_no_row(store, repo):
    repo.materialize(at(store, 6))
    rows, spec = repo.rows()
    mine = [v for v in views(spec) if "user" in v.entities]

    def left():
        return [sum(_texts(v, k)[0] == "u1" for keys, _ in rows.scan(v.name) for k in keys) for v in mine]

    count = sum(left())
    assert all(left()) and count >= len(mine)
    others = repo.online().read("u2", ITEMS, {}, START + 7 * DAY)
    assert repo.forget_user("u1") == count and repo.forget_user("u1") == 0
    assert not any(left())
    assert not len(repo.online().read("u1", ["i1"], {}, START + 7 * DAY).history_time)
    assert_same(repo.online().read("u2", ITEMS, {}, START + 7 * DAY), others)


def test_a_store_that_lost_its_rows_says_so_and_is_filled_again(store):
    import redis

    with redis_server() as url:
        repo = fresh(url)
        repo.materialize(at(store, 5))
        reader = repo.online()
        before = reader.read("u1", ITEMS, {}, START + 6 * DAY)
        redis.Redis.from_url(url).flushall()
        with pytest.raises(EvergreenError, match="has lost the rows"):
            reader.read("u1", ITEMS, {}, START + 6 * DAY)
        repo.materialize(at(store, 5))
        assert_same(reader.read("u1", ITEMS, {}, START + 6 * DAY), before)
        with pytest.raises(EvergreenError, match="into another store"):
            FeatureRepo(repo.root).online()
    with pytest.raises(EvergreenError, match="does not answer"):
        reader.read("u1", ITEMS, {}, START + 6 * DAY)


def test_a_damaged_version_is_told_and_made_anew(store):
    repo = fresh()
    repo.materialize(at(store, 5))
    version = served(repo.root) / "version.json"
    text = version.read_text()
    for damage in (text[:100], "{}", text.replace('"layout": "', '"layout": "x')):
        version.write_text(damage)
        with pytest.raises(EvergreenError, match="damaged|another version"):
            repo.online()
    repo.materialize(at(store, 5))
    assert repo.online().read("u1", ["i1"], {}, START + 6 * DAY).rows == 1


NUMBER = np.dtype([("value", "<i8")])


def put(cache, state, **values):
    cache.put([k.encode() for k in values], np.array([(v,) for v in values.values()], NUMBER), state)


def fresh_rows(found, keys):
    """The values that were found, by key."""
    rows, there = found
    return {k: v for k, v, ok in zip(keys, rows["value"].tolist(), there.tolist(), strict=True) if ok}


def test_the_cache_answers_until_its_time_is_over_and_holds_no_more_than_it_may():
    now = [0.0]
    cache = RowCache("item", NUMBER, capacity=2, clock=lambda: now[0])

    def got(*keys, state=7):
        return fresh_rows(cache.get(keys, state), keys)

    put(cache, 7, a=1, b=2)
    before = HITS.labels("item")._value.get()
    assert got(b"a", b"a", b"c") == {b"a": 1}
    assert HITS.labels("item")._value.get() == before + 2
    put(cache, 7, c=3)  # b was asked for longest ago
    assert got(b"a", b"b", b"c") == {b"a": 1, b"c": 3}
    assert got(b"a", b"b", b"c", state=8) == {}  # not for a reader of another state of the store
    now[0] = 30.0
    assert got(b"a") == {b"a": 1}  # being asked for does not make a row younger
    now[0] = 30.1
    assert got(b"a") == {}
    put(cache, 8, a=4)
    assert got(b"a", b"c", state=8) == {b"a": 4}
    off = RowCache("item", NUMBER, capacity=0)
    put(off, 7, a=1)
    assert not off.get([b"a"], 7)[1].any() and not off.known([b"a"])[1].any()


def test_more_keys_than_the_cache_may_hold_push_out_no_key_of_their_own():
    cache = RowCache("item", NUMBER, capacity=16)
    for start in range(0, 96, 12):
        keys = [f"k{i}" for i in range(start, start + 12)]
        put(cache, 1, **{k: i for i, k in enumerate(keys, start)})
        asked = [k.encode() for k in keys]
        assert fresh_rows(cache.get(asked, 1), asked) == dict(zip(asked, range(start, start + 12), strict=True))
    many = {f"m{i}": i for i in range(40)}
    put(cache, 1, **many)
    asked = [k.encode() for k in many]
    assert len(fresh_rows(cache.get(asked, 1), asked)) == 16


def test_a_row_is_known_long_after_it_was_fresh_and_then_forgotten():
    now = [0.0]
    cache = RowCache("user", NUMBER, clock=lambda: now[0])
    keys = [b"a", b"b", b"c"]
    put(cache, 7, a=1, b=2)
    now[0] = KNOWN_SECONDS
    assert fresh_rows(cache.known(keys), keys) == {b"a": 1, b"b": 2}
    now[0] += 0.1
    assert fresh_rows(cache.known(keys), keys) == {}


def test_remembered_items_expire_at_the_instant_of_the_request_and_not_when_they_were_read(store):
    repo = fresh()
    repo.materialize(at(store, 5))
    warm, early, late = repo.online(), START + 6 * DAY, START + 20 * DAY
    for when in (early, late, early):
        assert_same(warm.read("u1", ITEMS, {}, when), repo.online().read("u1", ITEMS, {}, when))
    known = warm.remembered("u1", [*ITEMS, "nothing"], {}, late).table
    assert_same(known, warm.read("u1", [*ITEMS, "nothing"], {}, late))
    assert np.isfinite(warm.read("u1", ITEMS, {}, early).item_num).sum() > np.isfinite(known.item_num).sum()


def test_threads_that_push_each_others_items_out_of_a_small_cache_read_what_one_alone_does(store):
    repo, when = fresh(), START + 6 * DAY
    repo.materialize(at(store, 5))
    asked = [(f"u{i}", ITEMS[i : i + 30]) for i in range(30)]
    alone, shared = OnlineReader(repo.root, cache_rows=0), OnlineReader(repo.root, cache_rows=40)
    expected = [alone.read(user, items, {}, when) for user, items in asked]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda a: shared.read(*a, {}, when), asked * 4))
    for one, two in zip(expected * 4, found, strict=True):
        assert_same(one, two)
