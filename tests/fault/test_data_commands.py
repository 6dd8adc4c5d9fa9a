"""The commands that keep the data whole or let it go, run as a user runs them."""

from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from tests.commands import evergreen, evergreen_json
from tests.synth import write_contract_dir


@pytest.fixture
def home(tmp_path: Path) -> Path:
    write_contract_dir(tmp_path / "feed", users=10, items=40, days=6)
    evergreen(tmp_path / "home", "data", "import", str(tmp_path / "feed"))
    return tmp_path / "home"


def test_check_sets_damage_aside_with_exit_1_and_the_import_brings_it_back(home):
    assert evergreen_json(home, "data", "check")["damaged"] == []
    part = sorted((home / "data" / "engagements").rglob("part-*"))[2]
    part.write_bytes(part.read_bytes()[:-50])
    text = evergreen(home, "data", "check", code=1)
    assert "1 of 8 files are damaged" in text and "Import the dataset again" in text
    assert "All 7 files are whole" in evergreen(home, "data", "check")
    assert "Imported" in evergreen(home, "data", "import", str(home.parent / "feed"))
    assert part.exists()


def test_compact_merges_days_and_lets_old_ones_go(home):
    assert "Nothing to merge in 6 files" in evergreen(home, "data", "compact")
    for file in (home.parent / "feed" / "engagements").iterdir():
        table = pq.read_table(file)
        others = pc.binary_join_element_wise("second", table["request_id"], "-")
        pq.write_table(table.set_column(table.column_names.index("request_id"), "request_id", others), file)
    evergreen(home, "data", "import", str(home.parent / "feed"))
    assert "Merged 12 files of 6 days: 6 are left" in evergreen(home, "data", "compact")
    report = evergreen_json(home, "data", "compact", "--retain-days", "2")
    assert report["retained"]["days_left_out"] == 4 and report["compacted"]["parts_left"] == 2


def test_forget_removes_the_user_and_keeps_an_import_from_bringing_them_back(home):
    assert "holds nothing of user nobody" in evergreen(home, "data", "forget", "nobody")
    report = evergreen_json(home, "data", "forget", "u3")
    assert report["known"] and report["rows"]["engagements"] > 0 and report["models"] == []
    again = evergreen_json(home, "data", "import", str(home.parent / "feed"))
    assert (again["imported"], again["forgotten"]) == (0, report["rows"]["engagements"])
    assert evergreen_json(home, "data", "forget", "u3")["rows"] == {"engagements": 0, "users": 0, "quarantine": 0}
