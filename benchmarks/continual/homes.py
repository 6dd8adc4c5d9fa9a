"""The homes in which replays run, each with its own data; made once, under the cache of the benchmarks."""

import shutil
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.ranker.data import KUAIRAND, cache
from engagement.contract import Dataset
from engagement.errors import EvergreenError
from engagement.importers import contract_dir, kuairand, movielens
from engagement.simulate import worlds, write
from engagement.store import EngagementStore
from evergreen.settings import Settings

USERS, DAYS, IMPRESSIONS = 300, 112, 67_200  # of a simulated world


@dataclass(frozen=True)
class Range:
    """The slots of a replay, as instants; the history before the first trains the first model."""

    start: datetime
    end: datetime


def _at(day: str) -> datetime:
    return datetime.fromisoformat(day).replace(tzinfo=UTC)


# MovieLens and the worlds: 17 slots, 16 updates; a world has eight weeks before its first slot. KuaiRand: two weeks.
_WORLD = Range(_at("2020-03-02"), _at("2020-04-28"))
RANGES = {
    "movielens": Range(_at("1998-02-20"), _at("1998-04-20T12:00")),
    "kuairand": Range(_at("2022-04-28"), _at("2022-05-09T12:00")),
    "recurring": _WORLD,
    "drift": _WORLD,
    "shock": _WORLD,
}


def settings(name: str) -> Settings:
    """The settings of a data set's home, which is made if it is not there.

    Raises:
        EvergreenError: The KuaiRand files are not there.
    """
    found = Settings(home=cache() / "continual" / name)
    if not EngagementStore(found.data).exists():
        found.root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=found.root) as room:
            building = Path(room) / "data"
            EngagementStore(building).append(_dataset(name, Path(room) / "feed"))
            shutil.move(building, found.data)  # whole or absent
    return found


def _dataset(name: str, room: Path) -> Dataset:
    if name == "movielens":
        return movielens.read(movielens.fetch(cache() / "movielens"))
    if name == "kuairand":
        if not KUAIRAND.exists():
            raise EvergreenError(f"no KuaiRand data at {KUAIRAND}", "Put the two weeks of KuaiRand-Pure there")
        return kuairand.read(KUAIRAND)
    write.simulate(worlds.world(name), worlds.Scale.of(USERS, DAYS, IMPRESSIONS), room)
    return contract_dir.read(room)
