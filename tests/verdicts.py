"""Verdicts of checks, for tests of what reads them."""

from datetime import UTC, datetime, timedelta

from monitoring.verdict import ColumnDrift, DataTest, DriftVerdict, Outcome, SliceDrift

AS_OF = datetime(2026, 3, 3, 12, tzinfo=UTC)  # a Tuesday


def verdict(hours=0.0, drifted=(), version="7", **changes):
    """A check so many hours after `AS_OF`; of its columns `age`, `genre` and `score_save`, these drifted."""
    names = sorted({"age", "genre", "score_save", *drifted})
    columns = [_column(name, name in drifted) for name in names]
    fields = {
        "as_of": (AS_OF + timedelta(hours=hours)).isoformat(),
        "model_version": version,
        "slot": (AS_OF - timedelta(days=1)).isoformat(),
        "window": ((AS_OF - timedelta(hours=24)).isoformat(), AS_OF.isoformat()),
        "drifted": bool(drifted),
        "kind": "population" if drifted else "none",
        "evidence": ("the users are older",) if drifted else (),
        "reason": f"{len(drifted)} of {len(names)} columns drifted",
        "columns": tuple(columns),
        "slices": (SliceDrift("country=nl", "age", 0.9, 0.12),) if drifted else (),
        "broken": {},
        "skipped": {},
        "requests": (4000, 2000),
        "rows": (40_000, 20_000),
        "users": (200, 100),
    }
    return DriftVerdict(**{**fields, **changes})


def outcome(lost):
    """Matured labels that say whether quality is lost."""
    return Outcome(
        requests=500,
        immature=20,
        hit3={"save": 0.31},
        interval={"save": (0.28, 0.34)},
        predicted={"save": 0.1},
        observed={"save": 0.1},
        calibration={"save": 1.0},
        age_hours=40.0,
        expected=0.4,
        lost=lost,
        reason="HIT@3/save is 0.31, 0.40 is expected",
    )


def data_test(passed):
    return DataTest("volume", passed, 12.0, "≥ 120", "12 rows came, at least 120 are usual")


def _column(name, moved):
    group = "prediction" if name.startswith("score_") else "user"
    note = "median 31 → 44" if moved else ""
    return ColumnDrift(name, "numeric", group, 0.62 if moved else 0.1, 0.08, 0.31, moved, (0.0, 0.0), note)
