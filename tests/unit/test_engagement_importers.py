"""Importers: any directory in the contract, MovieLens 100K, KuaiRand."""

import os
import sys
from datetime import UTC, datetime
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from engagement.errors import EvergreenError
from engagement.importers import contract_dir, kuairand, movielens
from engagement.store import EngagementStore
from tests.synth import write_contract_dir

LATER = datetime(2030, 1, 1, tzinfo=UTC)
KUAIRAND = Path(__file__).parents[3] / "shared" / "data" / "kuairand-pure-2w"


@pytest.fixture
def directory(tmp_path):
    return write_contract_dir(tmp_path / "d", users=10, items=40, days=3)


def refused(directory, match, stored=None):
    """The directory is refused with an error that matches, and an existing store does not change."""
    store = EngagementStore(stored or directory / "store")
    before = (store.root / "index.json").read_bytes() if store.exists() else None
    with pytest.raises(EvergreenError, match=match) as caught:
        store.append(contract_dir.read(directory))
    assert "\n" not in str(caught.value)
    assert ((store.root / "index.json").read_bytes() if store.exists() else None) == before


def replace(file, change):
    pq.write_table(change(pq.read_table(file)), file)


@pytest.mark.parametrize("column", ["request_id", "user_id", "item_id", "event_timestamp", "save", "hide", "surface"])
def test_missing_column_of_one_file_names_file_and_column(directory, column):
    replace(directory / "engagements" / "day-0001.parquet", lambda t: t.drop_columns(column))
    refused(directory, f"day-0001.parquet lacks the column '{column}'")


@pytest.mark.parametrize(("room", "column"), [("items", "created_timestamp"), ("items", "tags"), ("users", "age")])
def test_missing_profile_column_names_file_and_column(directory, room, column):
    replace(directory / room / f"{room}.parquet", lambda t: t.drop_columns(column))
    refused(directory, f"{room}.parquet lacks the column '{column}'")


@pytest.mark.parametrize("damage", ["rubbish", "truncated", "empty", "page"])
@pytest.mark.parametrize("room", ["engagements/day-0002.parquet", "items/items.parquet", "users/users.parquet"])
def test_unreadable_file_is_named_and_what_was_imported_stays(directory, tmp_path, damage, room):
    store = EngagementStore(tmp_path / "kept")
    store.append(contract_dir.read(write_contract_dir(tmp_path / "early", users=10, items=40, days=2)))
    file = directory / room
    whole = file.read_bytes()
    if damage == "page":  # the footer is whole, so the damage shows only while rows are read
        pq.write_table(pq.read_table(file), file, write_page_checksum=True)
        whole = bytearray(file.read_bytes())
        whole[len(whole) // 3] ^= 0xFF
    file.write_bytes({"rubbish": b"rubbish", "truncated": whole[:-50], "empty": b"", "page": bytes(whole)}[damage])
    refused(directory, f"{file.name} cannot be read .* Nothing was imported", store.root)


def test_missing_parts_of_a_directory_are_told(directory, tmp_path):
    with pytest.raises(EvergreenError, match="there is no directory"):
        contract_dir.read(tmp_path / "none")
    for room in ("engagements", "items"):
        for file in (directory / room).iterdir():
            file.rename(file.with_suffix(".away"))
        with pytest.raises(EvergreenError, match=f"{room} holds no Parquet file"):
            contract_dir.read(directory)
        for file in (directory / room).iterdir():
            file.rename(file.with_suffix(".parquet"))


def test_columns_beyond_the_contract_are_ignored_and_said_so(directory, tmp_path):
    replace(
        directory / "engagements" / "day-0000.parquet",
        lambda t: t.append_column("dwell", pa.array([1.0] * t.num_rows)),
    )
    report = EngagementStore(tmp_path / "s").append(contract_dir.read(directory))
    assert report.notes == ("ignored columns of engagements: dwell",)


def test_files_of_different_types_and_integer_ids_are_one_dataset(tmp_path):
    directory = write_contract_dir(tmp_path / "d", users=5, items=30, days=2, item_features=False, user_features=False)

    def integers(name):
        return lambda t: t.set_column(
            t.column_names.index(name), name, pa.array([int(v[1:]) for v in t[name].to_pylist()])
        )

    def texts(table):
        return table.set_column(
            table.column_names.index("item_id"), "item_id", pa.array([v[1:] for v in table["item_id"].to_pylist()])
        )

    replace(directory / "engagements" / "day-0000.parquet", integers("item_id"))
    replace(directory / "engagements" / "day-0001.parquet", texts)
    replace(directory / "items" / "items.parquet", integers("item_id"))
    report = EngagementStore(tmp_path / "s").append(contract_dir.read(directory))
    assert report.imported == report.read and report.items == 30


def test_whole_column_of_a_wrong_type_is_quarantined_not_a_crash(directory, tmp_path):
    for file in (directory / "engagements").iterdir():
        replace(file, lambda t: t.set_column(6, "save", pa.array(["maybe"] * t.num_rows)))
    refused(directory, "bad_type", tmp_path / "s")
    (kept,) = (tmp_path / "s" / "quarantine").iterdir()
    assert set(pq.read_table(kept)["reason"].to_pylist()) == {"bad_type"}


def test_quarantine_says_from_which_file_a_row_came(directory, tmp_path):
    replace(
        directory / "engagements" / "day-0001.parquet",
        lambda t: t.set_column(0, "request_id", pa.array([None, *t["request_id"].to_pylist()[1:]], pa.string())),
    )
    report = EngagementStore(tmp_path / "s").append(contract_dir.read(directory))
    (row,) = pq.read_table(report.quarantine).to_pylist()
    assert row["file"].endswith("day-0001.parquet") and row["reason"] == "null_key"


# MovieLens ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(request):
    try:
        return movielens.fetch(request.config.cache.mkdir("movielens"))
    except EvergreenError as error:
        pytest.skip(str(error))


def test_movielens_is_converted_as_documented(wheel, tmp_path):
    store = EngagementStore(tmp_path)
    report = store.append(movielens.read(wheel))
    assert (report.read, report.imported, report.quarantined) == (100_000, 100_000, {})
    assert (report.requests, report.users, report.items) == (5_847, 943, 1_682)
    snapshot = store.snapshot(LATER)
    rows = pl.from_arrow(snapshot.engagements())
    assert rows.select(pl.col("save", "click", "hide").sum()).row(0) == (21_201, 34_174, 17_480)
    sizes = rows.group_by("request_id").agg(
        pl.len(),
        pl.col("user_id").n_unique().alias("users"),
        pl.col("event_timestamp").sort().diff().max().alias("gap"),
    )
    assert sizes["len"].max() == 25 and sizes["users"].max() == 1 and sizes.filter(pl.col("len") > 3).height == 4_776
    assert sizes["gap"].max().total_seconds() <= 30 * 60
    items = pl.from_arrow(snapshot.items())
    toy_story = items.row(by_predicate=pl.col("item_id") == "1", named=True)
    assert toy_story["genres"] == ["Animation", "Children's", "Comedy"] and toy_story["release_year"] == 1995
    assert toy_story["created_timestamp"] == datetime(1995, 1, 1, tzinfo=UTC)
    early = rows.join(items.select("item_id", "created_timestamp"), on="item_id", suffix="_item")
    assert early.filter(pl.col("created_timestamp_item") > pl.col("event_timestamp")).height == 0
    assert items["release_year"].null_count() == 2
    joined = pl.from_arrow(snapshot.users()).join(
        rows.group_by("user_id").agg(pl.col("event_timestamp").min().alias("first")), on="user_id"
    )
    assert joined.height == 943 and (joined["event_timestamp"] == joined["first"]).all()
    assert joined.filter(pl.col("user_id") == "1").select("age", "gender", "occupation", "region").row(0) == (
        24.0,
        "M",
        "technician",
        "8",
    )
    assert "proxy" in store.manifest.source and "research" in store.manifest.licence


def test_last_days_keep_whole_requests_and_the_rest_can_follow(wheel, tmp_path):
    store = EngagementStore(tmp_path)
    part = store.append(movielens.read(wheel, last_days=30))
    short = pl.from_arrow(store.snapshot(LATER).engagements())
    whole = store.append(movielens.read(wheel))
    assert (whole.already_present, whole.imported) == (part.imported, 100_000 - part.imported)
    rows = pl.from_arrow(store.snapshot(LATER).engagements())
    assert short.equals(rows.join(short.select("request_id").unique(), on="request_id", how="semi"))
    begun = short.group_by("request_id").agg(pl.col("event_timestamp").min())["event_timestamp"]
    assert (begun.max() - begun.min()).days <= 30 and 0 < short.height < 50_000


def test_movielens_sessions_break_after_thirty_minutes_not_at_thirty():
    seconds = [0, 1800, 3601, *(3601 + n for n in range(1, 30))]
    rows = movielens._requests(
        pl.DataFrame(
            {
                "user_id": ["7"] * 32,
                "item_id": [str(n) for n in range(32)],
                "rating": [5.0] * 32,
                "second": [float(s) for s in seconds],
            }
        )
    )
    counts = dict(rows.group_by("request_id").len().iter_rows())
    assert counts == {"u7-0-0": 2, "u7-1-0": 25, "u7-1-1": 5}


def test_cached_wheel_needs_no_network_and_a_corrupt_one_is_fetched_again(wheel, tmp_path, monkeypatch):
    cached = tmp_path / wheel.name
    os.link(wheel, cached)
    monkeypatch.setattr(sys, "executable", "/bin/false")  # no pip from here on
    assert movielens.fetch(tmp_path) == cached
    cached.unlink()
    cached.write_bytes(b"half a download")
    with pytest.raises(EvergreenError, match="pip cannot download recbole==1.2.1"):
        movielens.fetch(tmp_path)
    monkeypatch.undo()
    assert movielens.fetch(tmp_path).read_bytes() == wheel.read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == [wheel.name]


def test_no_index_is_told_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "")
    monkeypatch.setenv("PIP_NO_INDEX", "")
    with pytest.raises(EvergreenError, match="pip cannot download recbole==1.2.1 .* Check the network") as caught:
        movielens.fetch(tmp_path)
    assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []


def test_a_file_that_is_no_wheel_is_told(tmp_path):
    (tmp_path / "x.whl").write_bytes(b"no zip")
    with pytest.raises(EvergreenError, match="does not hold MovieLens 100K"):
        movielens.read(tmp_path / "x.whl")


# KuaiRand -------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not KUAIRAND.exists(), reason=f"no KuaiRand data at {KUAIRAND}")
def test_kuairand_counts_are_exact(tmp_path):
    store = EngagementStore(tmp_path)
    report = store.append(kuairand.read(KUAIRAND))
    assert (report.read, report.imported, report.merged) == (228_329, 221_531, 1_338)
    assert report.quarantined == {"duplicate": 5_460}
    assert (report.requests, report.users, report.items) == (120_496, 25_156, 7_583)
    assert pq.read_metadata(report.quarantine).num_rows == 5_460
    rows = pl.from_arrow(store.snapshot(LATER).engagements())
    sizes = (
        rows.group_by("request_id")
        .agg(pl.len(), pl.col("long_view", "like").any(), pl.col("tab").n_unique())
        .filter(pl.col("len") > 3)
    )
    assert sizes.height == 11_806 and sizes["len"].sum() == 63_594 and sizes["tab"].max() == 1
    assert round(sizes["long_view"].mean(), 3) == 0.718 and round(sizes["like"].mean(), 3) == 0.063


LOG = "user_id,video_id,date,hourmin,time_ms,is_click,is_like,is_hate,long_view,tab"
FILES = {
    "log_standard_a.csv": [
        LOG,
        "1,10,20220425,0,1650816000000,0,0,0,1,4",  # 2022-04-25 00:00 local
        "1,11,20220425,0,1650815000000,0,0,0,0,1",  # shown earlier: the request's tab is 1
        "1,10,20220425,1,1650819600000,1,0,0,0,4",  # the same video again: one row, actions OR-ed
        "1,10,20220425,1,1650819600000,1,0,0,0,4",  # exact duplicate
        *(f"{n},10,20220425,2,1650820000000,0,0,0,0,1" for n in range(100, 150)),
    ],
    "log_standard_b.csv": [
        LOG,
        "1,10,20220426,0,1650902400000,0,1,1,0,2",
        "x,10,20220426,0,1650902400000,0,1,1,0,2",  # no number
        "2,10,20220426,0,,0,0,0,0,2",  # no time
    ],
    "log_random_c.csv": [LOG, "1,10,20220427,0,1650988800000,0,1,1,0,2"],
    "video_features_basic_x.csv": [
        "video_id,upload_dt,video_type,upload_type,music_type,tag,video_duration",
        '10,2022-04-10,NORMAL,Web,9.0,"3,7",1000.0',
        "11,2022-04-11,AD,Web,,,",
    ],
    "user_features_x.csv": [
        ",".join(["user_id", *kuairand.USER_FEATURES]),
        ",".join(["1"] + ["a"] * len(kuairand.USER_FEATURES)),
    ],
}  # fmt: skip


def kuairand_dir(path, **files):
    path.mkdir()
    for name, lines in (FILES | files).items():
        (path / name).write_text("\n".join(lines) + "\n")
    return path


def test_kuairand_day_is_one_request_and_a_repeated_video_one_row(tmp_path):
    store = EngagementStore(tmp_path / "s")
    report = store.append(kuairand.read(kuairand_dir(tmp_path / "k")))
    assert report.quarantined == {"bad_type": 1, "duplicate": 1, "null_key": 1} and report.merged == 1
    assert report.read == 57 == report.imported + 1 + 3
    rows = [r for r in store.snapshot(LATER).engagements().to_pylist() if r["user_id"] == "1"]
    assert [
        (r["request_id"], r["item_id"], r["long_view"], r["click"], r["like"], r["hate"], r["tab"]) for r in rows
    ] == [
        ("1-20220425", "11", False, False, False, False, "1"),
        ("1-20220425", "10", True, True, False, False, "1"),
        ("1-20220426", "10", False, False, True, True, "2"),
    ]
    assert rows[1]["event_timestamp"] == datetime(2022, 4, 24, 16, tzinfo=UTC)  # the first time shown
    first, second = store.snapshot(LATER).items().to_pylist()
    assert first["tag"] == ["3", "7"] and first["music_type"] == "9" and first["video_duration"] == 1000.0
    assert first["created_timestamp"] == datetime(2022, 4, 9, 16, tzinfo=UTC)
    assert second["tag"] is None and second["music_type"] is None and second["video_duration"] is None
    kept = pq.read_table(report.quarantine).to_pylist()
    assert {r["reason"]: r["file"] for r in kept}["bad_type"].startswith("log_standard")


def test_kuairand_without_a_file_or_column_names_it(tmp_path):
    made = kuairand_dir(tmp_path / "k")
    (made / "user_features_x.csv").rename(made / "elsewhere.csv")
    with pytest.raises(EvergreenError, match=r"holds no user_features\*.csv"):
        kuairand.read(made)
    with pytest.raises(EvergreenError, match="log_standard_a.csv lacks the column 'tab'"):
        kuairand.read(kuairand_dir(tmp_path / "l", **{"log_standard_a.csv": [LOG.removesuffix(",tab"), "1"]}))
    with pytest.raises(EvergreenError, match="holds no log_standard"):
        kuairand.read(tmp_path / "nothing")
