"""Tables and windows that every ranker benchmark uses.

A table holds every request of its data set, built by the project's own importers and feature repository. It is built
once into a cache directory: the environment variable EVERGREEN_BENCH, or `.evergreen/bench`.
"""

import os
import shutil
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from engagement.errors import EvergreenError
from engagement.importers import kuairand, movielens
from engagement.store import EngagementStore
from engagement.table import RankingTable, micros
from feature_repo.repo import FeatureRepo

ROOT = Path(__file__).parents[2]
KUAIRAND = ROOT.parent / "shared" / "data" / "kuairand-pure-2w"


@dataclass(frozen=True)
class Window:
    """Training ends where evaluation starts; both are days, UTC."""

    start: str
    end: str


# Everything that is chosen (a learning rate, an epoch, a variant) is chosen on the tuning window; the test window is
# for the published numbers alone. Training takes all requests before the evaluation window.
WINDOWS = {
    "movielens": {"tuning": Window("1998-02-23", "1998-03-23"), "test": Window("1998-03-23", "1998-04-24")},
    "kuairand": {"tuning": Window("2022-05-03", "2022-05-06"), "test": Window("2022-05-06", "2022-05-09")},
}


def cache() -> Path:
    """Where tables, environments and results are kept."""
    return ROOT / os.environ.get("EVERGREEN_BENCH", ".evergreen/bench")


def table_path(name: str) -> Path:
    """Directory of a built table."""
    return cache() / "tables" / name


def tables(name: str) -> RankingTable:
    """The ranking table of all requests of `movielens` or `kuairand`, built when it is not in the cache.

    Raises:
        EvergreenError: The name is unknown, or the KuaiRand files are not there.
    """
    if name not in WINDOWS:
        raise EvergreenError(f"there is no benchmark data set {name!r}", f"Choose one of {', '.join(WINDOWS)}")
    path = table_path(name)
    if not (path / "table.json").exists():
        _build(name, path)
    return RankingTable.load(path)


def split(name: str, which: str) -> tuple[RankingTable, RankingTable]:
    """Training and evaluation requests of the window `which`: `tuning` or `test`."""
    window = WINDOWS[name][which]
    table = tables(name)
    start, end = (micros(datetime.fromisoformat(day).replace(tzinfo=UTC)) for day in (window.start, window.end))
    return table.between(0, start), table.between(start, end)


def _build(name: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as room:
        store = EngagementStore(Path(room) / "data")
        if name == "movielens":
            store.append(movielens.read(movielens.fetch(cache() / "movielens")))
        elif KUAIRAND.exists():
            store.append(kuairand.read(KUAIRAND))
        else:
            raise EvergreenError(f"no KuaiRand data at {KUAIRAND}", "Put the two weeks of KuaiRand-Pure there")
        first, last = store.time_range()
        end = last + timedelta(days=1)
        repo = FeatureRepo(Path(room) / "features")
        repo.table(store.snapshot(end), first, end, Path(room) / "table")
        # A table in the cache is complete: a killed build leaves none behind.
        shutil.move(Path(room) / "table", path)
