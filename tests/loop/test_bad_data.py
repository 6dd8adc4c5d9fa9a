"""A retrain on broken data is held with the report, registers nothing, and runs once the data was repaired."""

import json
import shutil
from datetime import datetime, timedelta
from pathlib import Path

import polars as pl
import pytest

from components.plan import name_run
from engagement.store import EngagementStore
from evergreen.settings import Settings
from serving.registry import Registry
from tests.commands import evergreen, evergreen_json
from tests.synth import write_contract_dir

SLOT = "2024-01-18T03:00"
DAYS = 17
LOST = 3  # days at the end of which nobody's saves arrived

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def feed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_contract_dir(tmp_path_factory.mktemp("feed"), users=40, items=80, days=DAYS)


@pytest.fixture(scope="module")
def home(feed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home whose label pipeline broke three days before the slot."""
    room = tmp_path_factory.mktemp("bad")
    broken = shutil.copytree(feed, room / "feed")
    for path in sorted((broken / "engagements").glob("*.parquet"))[-LOST:]:
        pl.read_parquet(path).with_columns(pl.lit(False).alias("save")).write_parquet(path)
    evergreen(room / "home", "data", "import", str(broken))
    return room / "home"


@pytest.fixture(scope="module")
def held(home: Path) -> dict:
    return evergreen_json(home, "retrain", "--as-of", SLOT, code=3)[0]


def test_lost_labels_hold_the_run_with_the_report_and_nothing_is_registered(home, held):
    assert (held["outcome"], held["version"], held["gate"]["verdict"]) == ("held", "", "hold")
    assert held["gate"]["reason"].startswith("bad data: on 2024-01-1") and "have save" in held["gate"]["reason"]
    assert held["drift"] is None and held["train"] is None and held["rollout"] is None
    report = Path(held["data"]["report"]).read_text()
    assert "rate of save" in report and "deliver" in report.lower()
    assert Registry(Settings(home=home)).versions() == []
    assert not (home / "runs" / held["run_key"] / "gate.json").exists()


def test_people_are_told_in_the_table_and_in_status(home, held):
    shown = evergreen(home, "retrain", "--as-of", SLOT, code=3)  # asked again, it looks at the data again
    assert "bad data" in shown and "the data is bad" in shown.replace("\n", " ")
    state = evergreen_json(home, "status")
    assert state["champion"] is None and state["drift"] is None
    (run,) = state["runs"]
    assert (run["outcome"], run["version"], run["report"]) == ("held", "", held["data"]["report"])
    assert "No champion yet" in evergreen(home, "status")


def test_a_person_can_answer_for_data_that_is_not_as_usual(home, held):
    """The world did change: `--trust-data` trains, tells of the tests, and the run is then done."""
    trusted = json.loads(evergreen(home, "retrain", "--as-of", SLOT, "--trust-data", "--json", code=None))[0]
    assert (trusted["run_key"], trusted["version"]) == (held["run_key"], "1")
    assert trusted["data"]["trusted"] and "in spite of" in trusted["data"]["reason"]
    assert json.loads(evergreen(home, "retrain", "--as-of", SLOT, "--json", code=None))[0]["repeated"]


def test_repaired_days_are_another_run(feed, home, held):
    """By the way that the report names: the days' files are deleted, the store is checked, the days come again."""
    store, as_of = EngagementStore(home / "data"), datetime.fromisoformat(held["as_of"])
    settings = Settings(home=home, recipe="debug")
    assert name_run(settings, store.snapshot(as_of), held["strategy"]) == held["run_key"]
    days = sorted((home / "data" / "engagements").glob("day=*"))[-LOST:]
    for part in (p for day in days for p in day.glob("*.parquet")):
        part.unlink()
    evergreen(home, "data", "check", code=None)
    evergreen(home, "data", "import", str(feed))
    snapshot = store.snapshot(as_of)
    assert name_run(settings, snapshot, held["strategy"]) != held["run_key"]
    rows = pl.DataFrame(snapshot.engagements(as_of - timedelta(days=LOST + 1)))
    assert rows.group_by(pl.col("event_timestamp").dt.date()).agg(pl.col("save").sum())["save"].min() > 0
