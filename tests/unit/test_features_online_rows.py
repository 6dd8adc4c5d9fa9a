"""The two stores of packed rows keep the newer row, whatever comes in whatever order, and fail in one line."""

import struct
import threading
from contextlib import contextmanager

import pytest

from engagement.errors import EvergreenError
from feature_repo.online_rows import RedisRows, SQLiteRows
from tests.redis_lab import redis_server


@contextmanager
def _sqlite(path):
    yield SQLiteRows(path / "online.db")


@contextmanager
def _redis(path):
    with redis_server() as url:
        yield RedisRows(url, "evergreen:g1")


@pytest.fixture(params=[_sqlite, _redis], ids=["sqlite", "redis"])
def rows(request, tmp_path):
    with request.param(tmp_path) as found:
        yield found


def row(event, created, content=b""):
    return struct.pack("<qq", event, created) + content


def test_an_older_row_never_takes_the_place_of_a_newer_one(rows):
    rows.put("v", [b"a", b"b", b"c"], [row(5, 5, b"new"), row(5, 5, b"new"), row(-5, 3, b"new")])
    rows.put("v", [b"a", b"b", b"c"], [row(4, 9, b"old"), row(5, 4, b"old"), row(-6, 9, b"old")])
    assert rows.get([("v", [b"a", b"b", b"c"])]) == [[row(5, 5, b"new"), row(5, 5, b"new"), row(-5, 3, b"new")]]
    rows.put("v", [b"a", b"b"], [row(5, 6, b"newer"), row(6, 0, b"newer")])
    assert rows.get([("v", [b"b", b"a"])]) == [[row(6, 0, b"newer"), row(5, 6, b"newer")]]


def test_duplicates_change_nothing_and_of_equal_times_the_last_written_counts(rows):
    for _ in range(2):
        rows.put("v", [b"a", b"a", b"a"], [row(2, 2, b"x"), row(3, 3, b"y"), row(1, 1, b"z")])
        assert rows.get([("v", [b"a"])]) == [[row(3, 3, b"y")]]
    rows.put("v", [b"a"], [row(3, 3, b"completed")])
    assert rows.get([("v", [b"a"])]) == [[row(3, 3, b"completed")]]


def test_one_read_answers_several_views_in_order_with_repeats_and_gaps(rows):
    rows.put("v", [b"a", b""], [row(1, 1, b"va"), row(1, 1, b"empty key")])
    rows.put("w", [b"a"], [row(1, 1, b"wa")])
    found = rows.get([("v", [b"a", b"x", b"a"]), ("w", [b"a"]), ("w", []), ("v", [b""])])
    assert found == [[row(1, 1, b"va"), None, row(1, 1, b"va")], [row(1, 1, b"wa")], [], [row(1, 1, b"empty key")]]
    assert rows.get([]) == []


def test_more_keys_than_a_statement_has_variables_are_read_and_written(rows):
    keys = [f"{i}".encode() for i in range(70_000)]
    rows.put("v", keys, [row(i, i) for i in range(70_000)])
    first, second = rows.get([("v", keys), ("w", keys[:10])])
    assert first == [row(i, i) for i in range(70_000)] and second == [None] * 10


def test_rows_are_scanned_by_prefix_and_time_deleted_and_cleared(rows):
    keys = [b"", b"*a", b"*b", b"ca", b"[x]", b"\xff"]
    rows.put("v", keys, [row(i, 0) for i in range(6)])
    rows.put("w", [b"*a"], [row(9, 9)])

    def scanned(**options):
        return sorted(k for block, _ in rows.scan("v", **options) for k in block)

    assert scanned() == sorted(keys)
    assert scanned(prefix=b"*") == [b"*a", b"*b"] and scanned(prefix=b"[x]") == [b"[x]"]
    assert scanned(after_us=3) == [b"[x]", b"\xff"]
    assert rows.delete("v", [b"*a", b"gone", b"ca"]) == 2 and rows.delete("v", []) == 0
    assert scanned() == [b"", b"*b", b"[x]", b"\xff"] and rows.get([("w", [b"*a"])]) == [[row(9, 9)]]
    rows.clear()
    assert scanned() == [] and rows.get([("w", [b"*a"])]) == [[None]]


def test_threads_share_the_rows(rows):
    rows.put("v", [b"a"], [row(0, 0)])
    seen, failed = [], []

    def read():
        try:
            last = 0
            while last < 200:
                found = struct.unpack("<q", rows.get([("v", [b"a"])])[0][0][:8])[0]
                assert found >= last
                last = found
            seen.append(last)
        except Exception as error:  # noqa: BLE001 (a thread's failure is the test's)
            failed.append(error)

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    for i in range(1, 201):
        rows.put("v", [b"a"], [row(i, i)])
    for thread in threads:
        thread.join()
    assert not failed and seen == [200] * 3


def test_a_sqlite_transaction_shows_nothing_until_its_end_and_nothing_of_a_failed_one(tmp_path):
    mine, other = SQLiteRows(tmp_path / "online.db"), SQLiteRows(tmp_path / "online.db")
    with mine.transaction():
        mine.put("v", [b"a"], [row(1, 1)])
        mine.put("w", [b"a"], [row(1, 1)])
        assert other.get([("v", [b"a"]), ("w", [b"a"])]) == [[None], [None]]
    assert other.get([("v", [b"a"]), ("w", [b"a"])]) == [[row(1, 1)], [row(1, 1)]]
    with pytest.raises(KeyError), mine.transaction():
        mine.put("v", [b"a"], [row(2, 2)])
        raise KeyError
    assert other.get([("v", [b"a"])]) == [[row(1, 1)]]


def test_two_generations_in_one_redis_do_not_meet(tmp_path):
    with redis_server() as url:
        one, two = RedisRows(url, "evergreen:g1"), RedisRows(url, "evergreen:g2")
        one.put("v", [b"a"], [row(1, 1)])
        two.put("v", [b"a"], [row(2, 2)])
        one.clear()
        assert one.get([("v", [b"a"])]) == [[None]] and two.get([("v", [b"a"])]) == [[row(2, 2)]]


def test_a_redis_that_is_down_a_wrong_address_and_a_damaged_file_are_told_in_one_line(tmp_path):
    with redis_server() as url:
        rows = RedisRows(url.replace("redis://", "redis://:secret@"), "g")
    for call in (lambda: rows.get([("v", [b"a"])]), lambda: rows.put("v", [b"a"], [row(1, 1)]), rows.clear):
        with pytest.raises(EvergreenError, match=r"Redis at 127.0.0.1:\d+ does not answer") as told:
            call()
        assert "secret" not in str(told.value) and "\n" not in str(told.value)
    with pytest.raises(EvergreenError, match="is none of a Redis"):
        RedisRows("http://somewhere", "g")
    (tmp_path / "online.db").write_bytes(b"no database at all, but long enough to look like one" * 20)
    with pytest.raises(EvergreenError, match="online.db cannot be used"):
        SQLiteRows(tmp_path / "online.db")
