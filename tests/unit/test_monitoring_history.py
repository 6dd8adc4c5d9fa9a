"""Past checks: found quickly among a year of them, and a damaged one costs a line, not the answer."""

import logging
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone

import pytest

from monitoring import history
from monitoring.history import BACK, recent, verdicts
from monitoring.verdict import DriftVerdict
from tests.verdicts import AS_OF, verdict


def keep(checks, *found):
    for check in found:
        directory = checks / f"{datetime.fromisoformat(check.as_of).astimezone(UTC):%Y%m%dT%H%M%S}"
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "drift.json").write_text(check.to_json())


def test_recent_checks_of_a_model_newest_first(tmp_path):
    mine = [verdict(hours) for hours in (-4, -3, -2, -1)]
    keep(tmp_path, *mine, verdict(-1.5, version="8"), verdict(-2.5, version="77"), verdict(0), verdict(1))
    assert recent(tmp_path, "7", AS_OF, 2) == [mine[3], mine[2]]
    assert recent(tmp_path, "7", AS_OF, 9) == mine[::-1]
    assert recent(tmp_path, "8", AS_OF, 2) == [verdict(-1.5, version="8")]
    assert recent(tmp_path, "9", AS_OF, 2) == []


def test_instants_of_another_zone_are_the_same_instants(tmp_path):
    keep(tmp_path, verdict(-1), verdict(0))
    there = timezone(timedelta(hours=5, minutes=30))
    assert recent(tmp_path, "7", AS_OF.astimezone(there), 2) == [verdict(-1)]
    assert verdicts(tmp_path, AS_OF.astimezone(there)) == [verdict(0)]


def test_checks_of_long_ago_confirm_nothing(tmp_path):
    old = -BACK.total_seconds() / 3600
    keep(tmp_path, verdict(old - 1 / 3600))
    assert recent(tmp_path, "7", AS_OF, 2) == []
    keep(tmp_path, verdict(old))
    assert recent(tmp_path, "7", AS_OF, 2) == [verdict(old)]


def test_checks_since_an_instant_oldest_first(tmp_path):
    keep(tmp_path, verdict(1, version="8"), verdict(-1), verdict(0))
    assert verdicts(tmp_path, AS_OF) == [verdict(0), verdict(1, version="8")]


def test_no_check_yet_is_no_fault(tmp_path, caplog):
    assert recent(tmp_path / "none", "7", AS_OF, 2) == verdicts(tmp_path / "none", AS_OF) == []
    assert not caplog.records


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"model_version": "7"}',
        verdict(-2).to_json()[:400],
        "\x00" * 900,
        "null",
        verdict(-2, as_of="soon").to_json(),
    ],
)
def test_damaged_check_is_passed_over_with_one_line(tmp_path, caplog, text):
    keep(tmp_path, verdict(-3), verdict(-2), verdict(-1))
    damaged = tmp_path / "20260303T100000" / "drift.json"
    damaged.write_text(text)
    with caplog.at_level(logging.WARNING):
        assert recent(tmp_path, "7", AS_OF, 2) == [verdict(-1), verdict(-3)]
    [line] = caplog.messages
    assert line.startswith(f"{damaged} is passed over: it holds no drift verdict") and "\n" not in line
    assert verdicts(tmp_path, AS_OF - timedelta(days=1)) == [verdict(-3), verdict(-1)]


def test_check_under_way_and_foreign_names_are_passed_over_in_silence(tmp_path, caplog):
    keep(tmp_path, verdict(-2))
    (tmp_path / "20260303T110000").mkdir()  # no verdict yet
    for name in ("20260303T1100001", "2026-03-03", ".20260303T110000.tmp", "20260303T11000x"):
        (tmp_path / name).mkdir()
    (tmp_path / "20260303T113000").write_text("a file")
    assert recent(tmp_path, "7", AS_OF, 2) == [verdict(-2)]
    assert [m for m in caplog.messages if "20260303T113000" not in m] == []


def test_last_checks_of_a_model_among_a_year_of_hourly_ones_cost_a_month_of_files_and_one_parse(tmp_path, monkeypatch):
    """The names of 8,760 checks are listed, but only the files of the last month are opened, and its own parsed."""
    for hours in range(-8760, -720):
        (tmp_path / f"{AS_OF + timedelta(hours=hours):%Y%m%dT%H%M%S}").mkdir()
    columns = tuple(replace(verdict(0).columns[0], name=f"feature {n}") for n in range(100))
    other = verdict(0, columns=columns, version="6").to_json()
    for hours in range(-720, -1):
        directory = tmp_path / f"{AS_OF + timedelta(hours=hours):%Y%m%dT%H%M%S}"
        directory.mkdir()
        (directory / "drift.json").write_text(other)
    keep(tmp_path, verdict(-1))
    opened, parsed, read, parse = [], [], history._read, DriftVerdict.from_json
    monkeypatch.setattr(history, "_read", lambda check, mark: opened.append(check) or read(check, mark))
    monkeypatch.setattr(DriftVerdict, "from_json", staticmethod(lambda text: parsed.append(text) or parse(text)))
    assert recent(tmp_path, "7", AS_OF, 2) == [verdict(-1)]  # the new champion has one check only
    assert len(opened) == 720 and len(parsed) == 1
