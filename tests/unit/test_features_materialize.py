"""Publishing: in place where only the future was added, anew where the past changed, and never a gap for a reader."""

import threading

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from engagement.importers import contract_dir
from engagement.store import EngagementStore
from feature_repo import packed
from feature_repo.generations import directories, served
from feature_repo.packed import Codec
from feature_repo.repo import FeatureRepo
from tests.features_world import ACTIONS, DAY, START, scratch
from tests.online_lab import HOUR, ITEMS, assert_same, at, built, everyone, fresh, online, rewrite_past
from tests.redis_lab import redis_server
from tests.synth import write_contract_dir


@pytest.fixture(scope="module")
def store():
    return built()[0]


@pytest.fixture(params=["sqlite", "redis"])
def repo(request):
    with online(request.param) as found:
        yield found


def test_values_moved_on_in_place_equal_those_published_at_once(store, repo):
    reader = None
    for days, hours in ((5, 1), (5, 7), (7, 2), (8, 0)):
        repo.materialize(at(store, days, hours))
        reader = reader or repo.online()
        place = served(repo.root)
    assert directories(repo.root) == [place] and place.name.startswith("20240106T01")
    when = START + 8 * DAY
    assert reader.read("u1", ITEMS, {}, when) is not None and reader.as_of == when
    at_once = fresh()
    at_once.materialize(at(store, 8, 0))
    for mine, theirs in zip(everyone(repo, when), everyone(at_once, when), strict=True):
        assert_same(mine, theirs)
    assert_same(reader.read("u1", ITEMS, {}, when), at_once.online().read("u1", ITEMS, {}, when))


def test_an_update_that_dies_half_way_shows_nothing_and_is_made_whole_by_the_next(store, monkeypatch):
    repo = fresh()
    repo.materialize(at(store, 5))
    reader, place = repo.online(), served(repo.root)
    before = reader.read("u1", ITEMS, {}, START + 8 * DAY)
    packs, pack = [], Codec.pack

    def dies(self, table):
        packs.append(self.view.name)
        if len(packs) == 4:
            raise KeyboardInterrupt
        return pack(self, table)

    monkeypatch.setattr(packed.Codec, "pack", dies)
    with pytest.raises(KeyboardInterrupt):
        repo.materialize(at(store, 8))
    monkeypatch.setattr(packed.Codec, "pack", pack)
    assert reader.as_of == START + 5 * DAY + HOUR
    assert_same(reader.read("u1", ITEMS, {}, START + 8 * DAY), before)
    repo.materialize(at(store, 8))
    assert served(repo.root) == place
    whole = fresh()
    whole.materialize(at(store, 8))
    assert_same(reader.read("u1", ITEMS, {}, START + 9 * DAY), whole.online().read("u1", ITEMS, {}, START + 9 * DAY))


def test_what_an_update_may_have_written_before_it_died_does_not_shine_through_an_earlier_instant(store, monkeypatch):
    with redis_server() as url:
        repo = fresh(url)
        repo.materialize(at(store, 5))
        place = served(repo.root)
        monkeypatch.setattr("feature_repo.materialize.stamp", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            repo.materialize(at(store, 8))
        monkeypatch.undo()
        repo.materialize(at(store, 6))
        assert served(repo.root) != place
        clean = fresh()
        clean.materialize(at(store, 6))
        when = START + 8 * DAY
        for mine, theirs in zip(everyone(repo, when), everyone(clean, when), strict=True):
            assert_same(mine, theirs)


def test_late_data_make_a_new_generation_with_their_effect():
    home = scratch()
    store = EngagementStore(home / "data")
    source = write_contract_dir(home / "source", users=10, items=20, days=6)
    store.append(contract_dir.read(source))
    repo = FeatureRepo(home / "features")
    snapshot = store.snapshot(START + 5 * DAY)
    repo.materialize(snapshot)
    place, count = served(repo.root), _impressions(repo, "u1", START + 5 * DAY)
    shown = START + 2 * DAY + HOUR
    row = {
        "request_id": ["late"],
        "user_id": ["u1"],
        "item_id": ["i1"],
        "event_timestamp": pa.array([shown], pa.timestamp("us", "UTC")),
        "created_timestamp": pa.array([shown], pa.timestamp("us", "UTC")),
        "position": pa.array([0], pa.int16()),
        **{a: [a == "save"] for a in ACTIONS},
        "surface": ["home"],
    }
    for file in (source / "engagements").iterdir():
        file.unlink()
    pq.write_table(pa.table(row), source / "engagements" / "late.parquet")
    store.append(contract_dir.read(source))
    repo.materialize(store.snapshot(START + 5 * DAY))
    assert served(repo.root) != place and directories(repo.root) == [served(repo.root)]
    assert _impressions(repo, "u1", START + 5 * DAY) == count + 1


def _impressions(repo, user, when):
    table = repo.online().read(user, ["i1"], {}, when)
    column = [f.name for f in table.spec.of("request", hashed=False)].index("user_stats__impressions_7d")
    return round(np.expm1(table.request_num[0, column]))


def test_no_reader_sees_a_gap_an_error_or_an_older_value_while_materialisations_run(store, repo):
    repo.materialize(at(store, 3))
    reader, wanted = repo.online(), START + 9 * DAY
    seen, failed, done = [], [], threading.Event()

    def read():
        try:
            while not done.is_set():
                table = reader.read("u1", ITEMS[:20], {}, wanted)
                names = [f.name for f in table.spec.of("candidate", hashed=False)]
                assert np.isfinite(table.item_num[:, names.index("item_age_days")]).all()
                seen.append(int(table.history_time[-1]))
        except Exception as error:  # noqa: BLE001 (a thread's failure is the test's)
            failed.append(error)

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    for days in (4, 5, 6, 7):
        if days % 2:
            rewrite_past(repo)
        repo.materialize(at(store, days))
    done.set()
    for thread in threads:
        thread.join()
    assert not failed, failed
    assert len(set(seen)) > 1 and len(directories(repo.root)) == 1
    each = reader.read("u1", ["i1"], {}, wanted).history_time[-1]
    assert max(seen) <= each


def test_an_update_in_place_reads_no_file_of_days_before_the_last_instant(store):
    repo = fresh()
    repo.materialize(at(store, 5))
    past = [
        f
        for v in ("user_stats", "item_stats", "user_history")
        for f in (repo.root / "views" / v).glob("*-0[1-4].parquet")
    ]
    assert len(past) > 6
    for file in past:
        # The footer with the statistics stays; whoever reads a page finds rubbish.
        content = file.read_bytes()
        size = int.from_bytes(content[-8:-4], "little") + 8
        file.write_bytes(content[:4] + bytes(len(content) - size - 4) + content[-size:])
    with_rubbish, place = everyone_at(repo, store, 6), served(repo.root)
    assert place.name.startswith("20240106T01")
    for mine, theirs in zip(with_rubbish, everyone_at(fresh(), store, 6), strict=True):
        assert_same(mine, theirs)


def everyone_at(repo, store, days):
    repo.materialize(at(store, days))
    return everyone(repo, START + days * DAY + HOUR)
