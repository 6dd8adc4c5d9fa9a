"""The Parquet behind the views: the same whether built at once, day by day, after a kill, or after late data."""

import dataclasses
import signal
import subprocess
import sys
from datetime import datetime, timedelta
from pathlib import Path

import polars as pl
import pyarrow.parquet as pq
import pytest

from engagement.files import write_part
from engagement.importers import contract_dir
from engagement.index import Part
from engagement.store import EngagementStore
from feature_repo.partials import Partials
from feature_repo.views import Inputs, build_views
from tests.features_world import DAY, import_synth, us
from tests.synth import START, dataset, write_contract_dir

SMALL = {"users": 6, "items": 25, "late_share": 0.1}


def _content(root: Path, until: datetime) -> dict:
    """Bytes of every dated file up to `until`, rows of the others."""
    found = {}
    for path in sorted(root.glob("*/*.parquet")):
        dated = path.stem not in ("all", "partial")
        if not dated or datetime.fromisoformat(f"{path.stem}T00:00:00+00:00") <= until:
            found[str(path.relative_to(root))] = path.read_bytes() if dated else pl.read_parquet(path)
    return found


def _same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(x == b[k] if isinstance(x, bytes) else x.equals(b[k]) for k, x in a.items())


def test_day_by_day_gives_the_same_bytes_as_all_at_once(tmp_path):
    store = import_synth(tmp_path, users=3, items=12, days=34, late_share=0.1)
    last = store.snapshot(START + 34 * DAY + timedelta(hours=3))
    backfill, steps = tmp_path / "backfill" / "views", tmp_path / "steps" / "views"
    build_views(backfill, Inputs(last))
    written = []
    for hours in (3 * 24 + 3, 4 * 24 + 3, 4 * 24 + 9, 25 * 24, 34 * 24 + 3):  # the last looks back over a whole window
        written.append(build_views(steps, Inputs(store.snapshot(START + timedelta(hours=hours)))))
    assert _same(_content(backfill, last.as_of), _content(steps, last.as_of))
    # One more day costs the four views' numbers and the histories, those of the unfinished day, and the two profiles.
    assert written[1] == (4 + 1) * 2 + 2
    assert written[2] == (4 + 1) + 2
    assert build_views(steps, Inputs(last)) == 0


def test_an_increment_reads_nothing_of_the_log_but_its_new_parts(tmp_path):
    store = import_synth(tmp_path, days=9, **SMALL)
    early, late = (store.snapshot(START + d * DAY + timedelta(hours=3)) for d in (6, 9))
    build_views(tmp_path / "fresh" / "views", Inputs(late))
    build_views(tmp_path / "steps" / "views", Inputs(early))
    old = early.parts("engagements")
    for part in old:  # whoever reads one of them fails
        (tmp_path / "data" / part.path).write_bytes(b"read already")
    assert 6 <= len(old) < len(late.parts("engagements"))
    build_views(tmp_path / "steps" / "views", Inputs(late))
    mine, fresh = (_content(tmp_path / n / "views", late.as_of) for n in ("steps", "fresh"))
    assert _same(mine, fresh)


def test_partials_of_parts_that_left_the_store_go(tmp_path):
    store = import_synth(tmp_path, days=2, **SMALL)
    snapshot = store.snapshot(START + 2 * DAY)
    partials = Partials(tmp_path / "partials", snapshot)
    assert partials.update() == 2
    (tmp_path / "partials" / f"{'0' * 64}-actions.parquet").write_bytes(b"of somebody who is to be forgotten")
    assert partials.update() == 0
    assert {p.name[:64] for p in (tmp_path / "partials").iterdir()} == {p.sha256 for p in snapshot.parts("engagements")}


def test_a_merged_part_changes_no_file_of_the_views(tmp_path):
    store = import_synth(tmp_path, days=4, **SMALL)
    day = START + DAY
    later = write_contract_dir(tmp_path / "later", days=4, **{**SMALL, "users": 7})
    for path in (later / "engagements").iterdir():
        if path.stem == "day-0001":
            pl.read_parquet(path).with_columns(pl.col("request_id") + "x").write_parquet(path)
        else:
            path.unlink()
    store.append(contract_dir.read(later))
    snapshot = store.snapshot(START + 4 * DAY)
    assert build_views(tmp_path / "views", Inputs(snapshot)) > 20
    two = [p for p in snapshot.parts("engagements") if p.first >= us(day) and p.last < us(day + DAY)]
    assert len(two) == 2
    merged = _merge(tmp_path / "data", two)
    files = tuple(sorted([*(p for p in snapshot.files if p not in two), merged], key=lambda p: p.path))
    compacted = dataclasses.replace(snapshot, files=files)
    before = _content(tmp_path / "views", snapshot.as_of)
    assert build_views(tmp_path / "views", Inputs(compacted)) == 0
    build_views(tmp_path / "fresh" / "views", Inputs(compacted))
    assert _same(before, _content(tmp_path / "fresh" / "views", snapshot.as_of))


def _merge(root: Path, parts: list) -> Part:
    """One part in place of several."""
    table = pl.concat([pl.read_parquet(root / p.path) for p in parts]).sort("event_timestamp", "request_id").to_arrow()
    table = table.cast(pq.read_schema(root / parts[0].path))
    path, digest, size = write_part((root / parts[0].path).parent, table)
    values = {**parts[0].to_json(), "path": str(path.relative_to(root)), "sha256": digest, "size": size}
    values |= {"rows": table.num_rows, "last": max(p.last for p in parts), "first": min(p.first for p in parts)}
    values["known_from"] = min(p.known_from for p in parts)
    return Part(**values, merged=tuple(leaf for p in parts for leaf in p.leaves))


def test_a_later_delivery_with_late_rows_repairs_exactly_what_it_changes(tmp_path):
    whole = write_contract_dir(tmp_path / "whole", days=9, **SMALL)
    first = write_contract_dir(tmp_path / "first", days=6, **SMALL)
    for day in (2, 3, 4, 5):  # the first delivery lacks requests of these days, most of which were known at once
        path = first / "engagements" / f"day-{day:04d}.parquet"
        pl.read_parquet(path).filter(pl.col("request_id").str.ends_with("3").not_()).write_parquet(path)
    store = EngagementStore(tmp_path / "data")
    store.append(contract_dir.read(first))
    assert build_views(tmp_path / "views", Inputs(store.snapshot(START + 6 * DAY))) > 15
    store.append(contract_dir.read(whole))
    inputs = Inputs(store.snapshot(START + 9 * DAY))
    build_views(tmp_path / "views", inputs)
    build_views(tmp_path / "fresh", inputs)
    mine, fresh = (_content(tmp_path / n, inputs.snapshot.as_of) for n in ("views", "fresh"))
    assert _same(mine, fresh)


def test_an_older_instant_after_a_newer_one_leaves_nothing_wrong_behind(tmp_path):
    store = import_synth(tmp_path, days=10, **SMALL)
    early, late = (Inputs(store.snapshot(START + d * DAY + timedelta(hours=5))) for d in (4, 9))
    build_views(tmp_path / "views", late)
    build_views(tmp_path / "views", early)
    build_views(tmp_path / "fresh", early)
    midnight = START + 4 * DAY
    # Of the unfinished day only what was known is there; the days after it may stay as they are.
    mine, fresh = (_content(tmp_path / n, midnight) for n in ("views", "fresh"))
    assert _same(mine, fresh)
    assert build_views(tmp_path / "views", late) == (4 + 1) * 2 + 2  # that day, the last one, the profiles


def test_another_dataset_in_the_same_home_replaces_every_file(tmp_path):
    old = import_synth(tmp_path / "a", days=9, **SMALL)
    build_views(tmp_path / "views", Inputs(old.snapshot(START + 9 * DAY)))
    new = import_synth(tmp_path / "b", days=4, user_features=False, item_features=False, actions=("like",), **SMALL)
    inputs = Inputs(new.snapshot(START + 4 * DAY))
    build_views(tmp_path / "views", inputs)
    build_views(tmp_path / "fresh", inputs)
    assert _same(_content(tmp_path / "views", START + 400 * DAY), _content(tmp_path / "fresh", START + 400 * DAY))
    assert not (tmp_path / "views" / "user_profile" / "all.parquet").exists()


# A build that is killed by SIGKILL as soon as it has written so many files.
_BUILD_AND_DIE = """
import os, signal, sys
from datetime import datetime
from pathlib import Path
from engagement.store import EngagementStore
from feature_repo import views
home, as_of, files = Path(sys.argv[1]), datetime.fromisoformat(sys.argv[2]), int(sys.argv[3])
write, done = views._write, []
def write_and_die(path, table):
    write(path, table)
    done.append(path)
    if len(done) == files:
        os.kill(os.getpid(), signal.SIGKILL)
views._write = write_and_die
views.build_views(home / "views", views.Inputs(EngagementStore(home / "data").snapshot(as_of)))
"""


@pytest.mark.parametrize("files", [2, 14])
def test_killed_at_any_file_the_next_build_gives_the_same_bytes_at_whatever_instant(tmp_path, files):
    store = import_synth(tmp_path, days=9, **{**SMALL, "items": 60})  # half of them appear while the log runs
    early, late = (store.snapshot(START + d * DAY + timedelta(hours=3)) for d in (4, 9))
    build_views(tmp_path / "views", Inputs(early))
    before = len(list((tmp_path / "views").glob("*/*.parquet")))
    command = [sys.executable, "-c", _BUILD_AND_DIE, str(tmp_path), late.as_of.isoformat(), str(files)]
    assert subprocess.run(command).returncode == -signal.SIGKILL
    assert before <= len(list((tmp_path / "views").glob("*/*.parquet"))) <= before + files
    for name, snapshot in (("early", early), ("late", late)):
        build_views(tmp_path / "views", Inputs(snapshot))
        build_views(tmp_path / name, Inputs(snapshot))
        mine, fresh = (_content(tmp_path / n, START + 3 * DAY) for n in ("views", name))
        assert _same(mine, fresh)
    assert _same(_content(tmp_path / "views", late.as_of), _content(tmp_path / "late", late.as_of))


def test_a_file_that_was_lost_and_a_damaged_state_are_made_again(tmp_path):
    store = import_synth(tmp_path, days=4, **SMALL)
    inputs = Inputs(store.snapshot(START + 4 * DAY))
    build_views(tmp_path / "views", inputs)
    before = _content(tmp_path / "views", inputs.snapshot.as_of)
    (tmp_path / "views" / "item_stats" / "2024-01-03.parquet").unlink()
    assert build_views(tmp_path / "views", inputs) == 1
    (tmp_path / "views" / "state.json").write_text('{"user_stats/2024')
    assert build_views(tmp_path / "views", inputs) == len(before)
    assert _same(before, _content(tmp_path / "views", inputs.snapshot.as_of))


def test_drawn_candidates_are_no_impressions(tmp_path):
    store = import_synth(tmp_path, days=5, exposure="positives", **SMALL)
    snapshot = store.snapshot(START + 5 * DAY)
    log = pl.DataFrame(pl.from_arrow(snapshot.engagements()))
    assert log["sampled"].sum() > 100
    build_views(tmp_path / "views", Inputs(snapshot))
    rows = pl.read_parquet(tmp_path / "views" / "item_stats" / "partial.parquet")
    real = log.filter(~pl.col("sampled"))
    assert rows["impressions_30d"].sum() == len(real)
    assert rows["count_save_30d"].sum() == real["save"].sum()


@pytest.mark.parametrize("names", [("impressions", "shown", "known"), ("age", "midnight", "n")])
def test_actions_may_have_the_names_that_we_use_ourselves(tmp_path, names):
    store = import_synth(tmp_path, days=3, actions=names, **SMALL)
    build_views(tmp_path / "views", Inputs(store.snapshot(START + 3 * DAY)))
    log = store.snapshot(START + 3 * DAY).engagements()
    rows = pq.read_table(tmp_path / "views" / "user_stats" / "partial.parquet").to_pydict()
    assert sum(rows["impressions_30d"]) == log.num_rows
    assert sum(rows[f"count_{names[0]}_30d"]) == sum(log.column(names[0]).to_pylist())


def test_compaction_of_the_log_makes_no_view_stale(tmp_path):
    store = EngagementStore(tmp_path / "store")
    for n in range(6):
        store.append(dataset([{"request_id": f"r{n}", "at": 5 * n, "known": 5 * n + 20 * (n % 2), "save": True}]))
    as_of = START + timedelta(hours=60)
    assert build_views(tmp_path / "views", Inputs(store.snapshot(as_of)))
    assert store.compact().merged
    assert build_views(tmp_path / "views", Inputs(store.snapshot(as_of))) == 0
