"""Bad rows: each reason, that nothing crashes, and the boundary of the allowed share."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from engagement.contract import Manifest
from engagement.errors import EvergreenError
from engagement.index import from_us
from engagement.store import EngagementStore
from engagement.validate import MAX_BAD_SHARE, check_engagements
from tests.synth import START, UTC_US, dataset

US = int(START.timestamp() * 1e6)
NOW = US + 10**6
LIKES = Manifest(name="x", actions=("save",), primary_action="save", exposure="impressions")


def reasons(**columns):
    """Reasons of three rows whose columns are replaced by those given; None for a good row."""
    import polars as pl

    base = {
        "request_id": ["a", "b", "c"],
        "user_id": ["u", "u", "u"],
        "item_id": ["1", "2", "1"],
        "event_timestamp": pa.array([US] * 3, UTC_US),
        "save": [True, False, True],
    }
    checked = check_engagements(pa.table(base | columns), LIKES, pl.DataFrame({"item_id": ["1", "2"]}), NOW)
    found = dict(zip(checked.bad["row_number"], checked.bad["reason"], strict=True))
    assert sorted([*found, *checked.good["_row"]]) == [0, 1, 2]
    return [found.get(n) for n in range(3)]


def instants(values, unit="us", zone="UTC"):
    return pa.array(values, pa.timestamp(unit, tz=zone))


INVALID_UTF8 = pa.StringArray.from_buffers(
    3, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0\3\0\0\0"), pa.py_buffer(b"a\xffb")
)
OK, NULL, TYPE = None, "null_key", "bad_type"


@pytest.mark.parametrize(
    ("column", "values", "expected"),
    [
        ("item_id", ["1", None, ""], [OK, NULL, NULL]),
        ("item_id", ["1", "2", "9"], [OK, OK, "unknown_item"]),
        ("item_id", [1, 2, 1], [OK, OK, OK]),
        ("item_id", [1.0, 2.0, float("nan")], [OK, OK, NULL]),
        ("item_id", [1.0, 1.5, None], [OK, TYPE, NULL]),
        ("item_id", pa.array(["1", "2", None]).dictionary_encode(), [OK, OK, NULL]),
        ("user_id", [b"u", b"\xff", None], [OK, TYPE, NULL]),
        ("user_id", INVALID_UTF8, [OK, TYPE, OK]),
        ("user_id", [[1], [2], None], [TYPE, TYPE, NULL]),
        ("user_id", [{"a": 1}, {"a": 2}, None], [TYPE, TYPE, NULL]),
        ("user_id", pa.array([1, 2, 3], pa.decimal128(9, 0)), [OK, OK, OK]),
        ("request_id", ["", "b", "c"], [NULL, OK, OK]),
        ("event_timestamp", instants([US, None, NOW]), [OK, NULL, OK]),
        ("event_timestamp", instants([NOW, NOW + 1, -1]), [OK, "future_timestamp", "before_1970"]),
        ("event_timestamp", instants([US * 1000 + 999] * 3, "ns"), [OK, OK, OK]),
        ("event_timestamp", instants([US // 1000, US, US * 1000], "ms"), [OK, "future_timestamp", TYPE]),
        ("event_timestamp", instants([US // 10**6] * 3, "s", "Asia/Tokyo"), [OK, OK, OK]),
        ("event_timestamp", instants([US] * 3, zone=None), [OK, OK, OK]),
        ("event_timestamp", [US, US, US], [TYPE, TYPE, TYPE]),
        ("event_timestamp", ["2024-01-01T00:00:00Z", "2024-01-01 00:00:00", "soon"], [OK, OK, TYPE]),
        ("event_timestamp", ["2024-01-01T01:00:00.5+01:00", "2024-01-01", ""], [OK, OK, TYPE]),
        ("created_timestamp", instants([None, US - 5, NOW + 1]), [OK, OK, "future_timestamp"]),
        ("created_timestamp", ["2024-01-01", "x", None], [OK, TYPE, OK]),
        ("position", [0, -1, 40_000], [OK, OK, TYPE]),
        ("position", [1.0, None, 0.5], [OK, OK, TYPE]),
        ("save", [1, 0, 2], [OK, OK, TYPE]),
        ("save", ["true", "0", "maybe"], [OK, OK, TYPE]),
        ("save", [True, None, False], [OK, "null_action", OK]),
        ("save", [1.0, float("nan"), 0.0], [OK, "null_action", OK]),
        ("save", pa.array([1, 0, 1], pa.duration("s")), [TYPE, TYPE, TYPE]),
    ],
)
def test_each_value_is_read_or_blamed(column, values, expected):
    assert reasons(**{column: values}) == expected


def test_text_and_numbers_give_the_same_instants_and_ids(tmp_path):
    rows = [{"request_id": 7, "user_id": 3.0, "item_id": 1, "save": 1}]
    store = EngagementStore(tmp_path)
    store.append(dataset(rows, items=pa.table({"item_id": [1.0], "created_timestamp": ["2023-12-31"]})))
    (row,) = store.snapshot(from_us(NOW)).engagements().to_pylist()
    assert (row["request_id"], row["user_id"], row["item_id"], row["save"]) == ("7", "3", "1", True)


def test_a_row_is_never_known_before_it_was_shown(tmp_path):
    store = EngagementStore(tmp_path)
    store.append(
        dataset(
            [{"at": 5, "known": 2}, {"at": 6, "known": 9, "item_id": "i2"}, {"at": 7, "known": None, "item_id": "i3"}]
        )
    )
    rows = store.snapshot(from_us(US + 10**12)).engagements().to_pylist()
    assert [(r["created_timestamp"] - r["event_timestamp"]).total_seconds() for r in rows] == [0, 3 * 3600, 0]


def test_rows_that_need_other_rows_to_be_judged(tmp_path):
    first = {"request_id": "r1", "user_id": "u1", "item_id": "i1", "at": 1}
    rows = [
        first,
        first,  # exact duplicate
        first | {"save": True},  # same item in the request, other content: the first row is kept
        first | {"item_id": "i3"},
        first | {"user_id": "u2", "item_id": "i2"},  # the request belongs to u1
        *({"request_id": f"x{n}", "at": 2} for n in range(40)),
    ]
    report = EngagementStore(tmp_path).append(dataset(rows, file="july.parquet"))
    assert report.quarantined == {"duplicate": 1, "other_user": 1, "repeated_item": 1}
    assert (report.read, report.imported) == (45, 42)
    kept = pq.read_table(report.quarantine).to_pylist()
    assert [(r["reason"], r["row_number"], r["file"]) for r in kept] == [
        ("duplicate", 1, "july.parquet"),
        ("repeated_item", 2, "july.parquet"),
        ("other_user", 4, "july.parquet"),
    ]
    assert '"item_id":"i2"' in kept[2]["row"]


def test_columns_that_differ_only_in_a_null_are_not_duplicates(tmp_path):
    rows = [{"surface": None}, {"surface": "home"}, {"surface": None}, *({"request_id": f"x{n}"} for n in range(40))]
    report = EngagementStore(tmp_path).append(dataset(rows, context_features=("surface",)))
    assert report.quarantined == {"duplicate": 1, "repeated_item": 1}


@pytest.mark.parametrize("feature", ["reason", "file", "row", "request", "item", "table"])
def test_a_feature_may_have_the_name_of_an_inner_column(tmp_path, feature):
    rows = [{"request_id": f"x{n}", feature: "home"} for n in range(20)] + [{"request_id": None, feature: "home"}]
    store = EngagementStore(tmp_path)
    report = store.append(dataset(rows, context_features=(feature,)))
    assert report.quarantined == {"null_key": 1}
    assert store.snapshot(from_us(NOW)).engagements()[feature].to_pylist() == ["home"] * 20


def bad_and_good(bad, total):
    return dataset([{"request_id": f"x{n}", "item_id": "none" if n < bad else "i1"} for n in range(total)])


@pytest.mark.parametrize("total", [10, 30, 70, 1_000])
def test_exactly_the_allowed_share_of_bad_rows_passes(tmp_path, total):
    assert MAX_BAD_SHARE == 0.10
    report = EngagementStore(tmp_path).append(bad_and_good(total // 10, total))
    assert report.quarantined == {"unknown_item": total // 10}


@pytest.mark.parametrize("total", [10, 30, 70, 1_000])
def test_one_bad_row_above_the_share_stops_the_import_and_keeps_the_evidence(tmp_path, total):
    store = EngagementStore(tmp_path)
    with pytest.raises(EvergreenError, match="unknown_item") as caught:
        store.append(bad_and_good(total // 10 + 1, total))
    assert not store.exists() and not (tmp_path / "engagements").exists()
    (kept,) = (tmp_path / "quarantine").iterdir()
    assert str(kept) in str(caught.value)
    assert pq.read_metadata(kept).num_rows == total // 10 + 1


def test_a_stopped_import_leaves_the_store_as_it_was(tmp_path):
    store = EngagementStore(tmp_path)
    store.append(bad_and_good(0, 20))
    before = (tmp_path / "index.json").read_bytes()
    with pytest.raises(EvergreenError, match="are bad"):
        store.append(bad_and_good(20, 20))
    assert (tmp_path / "index.json").read_bytes() == before


def profiles(**columns):
    times = pa.array([US] * 3, UTC_US)
    return pa.table({"item_id": ["i1", "i2", "i3"], "created_timestamp": times} | columns)


def test_bad_items_are_quarantined_and_their_rows_unknown(tmp_path):
    names = [f"i{n}" for n in range(20)] + [None]
    items = pa.table({"item_id": names, "created_timestamp": pa.array([US] * 21, UTC_US)})
    rows = [{"request_id": f"x{n}", "item_id": f"i{n % 20}"} for n in range(60)]
    report = EngagementStore(tmp_path).append(dataset(rows, items=items))
    assert report.quarantined_items == {"null_key": 1} and report.items == 20 and report.imported == 60


def test_embeddings_of_another_width_or_with_a_nan_are_bad(tmp_path):
    vectors = [[1.0, 2.0]] * 37 + [[1.0], [1.0, float("nan")], None]
    items = pa.table(
        {
            "item_id": [f"i{n}" for n in range(40)],
            "created_timestamp": pa.array([US] * 40, UTC_US),
            "embedding": vectors,
        }
    )
    store = EngagementStore(tmp_path)
    report = store.append(dataset([{"item_id": "i0"}], items=items))
    assert report.quarantined_items == {"bad_type": 2}
    stored = store.snapshot(from_us(NOW)).items()
    assert stored.schema.field("embedding").type == pa.list_(pa.float32()) and stored["embedding"].null_count == 1


def test_more_than_the_share_of_bad_items_stops_too(tmp_path):
    with pytest.raises(EvergreenError, match="1 of 3 rows of items are bad"):
        EngagementStore(tmp_path).append(dataset([{}], items=profiles(item_id=["i1", "i2", None])))


def test_a_changed_profile_keeps_its_first_version_and_is_shown(tmp_path):
    store = EngagementStore(tmp_path)
    some = {"item_features": ("kind",)}
    store.append(dataset([{}], items=profiles(kind=["a", "b", "c"]), **some))
    report = store.append(dataset([{}], items=profiles(kind=["a", "X", "c"]), **some))
    assert report.quarantined_items == {"changed": 1} and report.already_present == 1
    assert store.snapshot(from_us(NOW)).items()["kind"].to_pylist() == ["a", "b", "c"]


def test_a_feature_that_changes_its_type_is_named(tmp_path):
    store = EngagementStore(tmp_path)
    some = {"item_features": ("kind",)}
    store.append(dataset([{}], items=profiles(kind=[1, 2, 3]), **some))
    store.append(dataset([{}], items=profiles(kind=pa.nulls(3)), **some))
    with pytest.raises(EvergreenError, match="column 'kind' of items is string, and double in the store"):
        store.append(dataset([{}], items=profiles(kind=["a", "b", "c"]), **some))


def test_no_items_and_no_rows_are_told_apart(tmp_path):
    with pytest.raises(EvergreenError, match="no items"):
        EngagementStore(tmp_path).append(dataset([{}], items=()))
    with pytest.raises(EvergreenError, match="no engagement rows"):
        EngagementStore(tmp_path).append(dataset([]))


def test_an_action_column_that_is_missing_is_named(tmp_path):
    made = dataset([{}], actions=("save",), file="a.parquet")
    made.engagements[0] = made.engagements[0].drop_columns("save")
    with pytest.raises(EvergreenError, match="a.parquet lacks the column 'save'"):
        EngagementStore(tmp_path).append(made)
