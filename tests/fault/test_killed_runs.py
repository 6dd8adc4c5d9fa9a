"""One home that runs unbroken: another one, killed in every stage, must equal it; then a new market arrives there.

`kill -9` in the middle of every stage, then the same command: the same end, nothing registered or promoted twice. And
a new market: the monitor sees it, retrains early, and does so once. A whole retrain is the dearest thing that tests
do, so the two share one.
"""

import json
from pathlib import Path

import polars as pl
import pytest

from tests.commands import evergreen, evergreen_json, kill_when, left_over
from tests.synth import write_contract_dir

STAGES = [
    "make-plan",
    "build-features",
    "train-ranker",
    "judge-challenger",
    "check-drift",
    "register-model",
    "run-canary",
]
BEFORE, AFTER = "2024-01-15T03:00", "2024-01-20T12:00"  # a slot; later, between two slots
COMMAND = ["retrain", "--as-of", BEFORE]


@pytest.fixture(scope="module")
def feed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_contract_dir(tmp_path_factory.mktemp("feed"), users=40, items=80, days=15)


@pytest.fixture(scope="module")
def whole(feed: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """A home in which the slot ran and nothing was killed, and the run's result."""
    home = tmp_path_factory.mktemp("whole")
    evergreen(home, "data", "import", str(feed))
    return home, finish(home)


def new_market(feed: Path, out: Path) -> Path:
    """The days after the slot: other people (older, elsewhere), other items (longer, of a new kind), a new surface."""
    write_contract_dir(out, users=40, items=80, days=21, seed=1, first=15)
    (out / "manifest.json").write_text((feed / "manifest.json").read_text())
    renamed = [pl.concat_str(pl.lit("new-"), pl.col("user_id")).alias("user_id")]
    item = pl.concat_str(pl.lit("new-"), pl.col("item_id")).alias("item_id")
    for path in (out / "engagements").glob("*.parquet"):
        pl.read_parquet(path).with_columns(*renamed, item, pl.lit("lens").alias("surface")).write_parquet(path)
    users, items = out / "users" / "users.parquet", out / "items" / "items.parquet"
    pl.read_parquet(users).with_columns(
        *renamed, pl.col("age") + 60, pl.lit("elsewhere").alias("country")
    ).write_parquet(users)
    pl.read_parquet(items).with_columns(item, pl.col("length") * 30, pl.lit("garden").alias("category")).write_parquet(
        items
    )
    return out


def finish(home: Path) -> dict:
    return json.loads(evergreen(home, *COMMAND, "--json", code=None))[0]


@pytest.mark.slow
def test_run_killed_in_every_stage_ends_as_if_never_killed(feed: Path, whole: tuple[Path, dict], tmp_path: Path):
    from evergreen.settings import Settings
    from serving.registry import Registry

    home = tmp_path / "killed"
    evergreen(home, "data", "import", str(feed))

    killed = []
    for i, stage in enumerate(STAGES):
        # Every other time the children die too, as when the machine goes down; else they must notice by themselves.
        if kill_when(home, COMMAND, lambda line, s=stage: s in line, after=0.8, whole_group=bool(i % 2)):
            killed.append(stage)
    assert len(killed) >= len(STAGES) - 1, killed  # a stage may be quicker than the kill

    end, unbroken = finish(home), whole[1]
    for key in ("run_key", "snapshot", "train_start", "train_end", "version", "outcome"):
        assert end[key] == unbroken[key], key
    assert end["gate"]["metrics"] == unbroken["gate"]["metrics"]
    assert end["train"]["digest"] == unbroken["train"]["digest"]  # bitwise the same weights

    registry = Registry(Settings(home=home))
    assert [v.version for v in registry.versions()] == ["1"]
    assert registry.aliases()["champion"] == "1"
    assert finish(home)["repeated"] is True
    assert left_over(home) == []


@pytest.mark.slow
def test_drift_starts_one_early_retrain(feed: Path, whole: tuple[Path, dict], tmp_path: Path):
    home, before = whole
    assert before["outcome"] == "champion"
    evergreen(home, "data", "import", str(new_market(feed, tmp_path / "new")))
    first = evergreen_json(home, "monitor", "--as-of", AFTER)
    assert first["drift"]["drifted"] and first["decision"]["action"] == "retrain"
    status = evergreen_json(home, "status")
    assert [r["reason"] for r in status["runs"]] == ["slot", "drift"]
    assert status["runs"][1]["champion"] == "1" and status["runs"][1]["version"] == "2"

    again = evergreen_json(home, "monitor", "--as-of", AFTER)
    assert again["decision"]["action"] in ("retrain", "none")
    assert len(evergreen_json(home, "status")["runs"]) == 2
    asked = [json.loads(line) for line in (home / "monitoring" / "decisions.jsonl").read_text().splitlines()]
    assert sum(d.get("action") == "retrain" for d in asked) == 1
    assert sum("taken" in d for d in asked) == 1
