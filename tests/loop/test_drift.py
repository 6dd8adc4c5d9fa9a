"""A new market arrives: the monitor sees it, retrains early, and does so once."""

import json
from pathlib import Path

import polars as pl
import pytest

from tests.commands import evergreen, evergreen_json
from tests.synth import write_contract_dir

BEFORE, AFTER = "2024-01-15T03:00", "2024-01-20T12:00"  # a slot; later, between two slots


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


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("drift")
    feed = write_contract_dir(root / "feed", users=40, items=80, days=15)
    evergreen(root / "home", "data", "import", str(feed))
    first = evergreen_json(root / "home", "retrain", "--as-of", BEFORE)
    assert first[0]["outcome"] == "champion"
    evergreen(root / "home", "data", "import", str(new_market(feed, root / "new")))
    return root / "home"


def test_drift_starts_one_early_retrain(home):
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
