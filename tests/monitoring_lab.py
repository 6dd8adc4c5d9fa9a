"""A home as the monitors leave it: checks, decisions, alerts and runs, written as they write them."""

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

from evergreen.settings import Settings
from monitoring.alerts import SEVERITY, Alert
from monitoring.notify import Alerts
from monitoring.verdict import ColumnDrift, DataTest, DriftVerdict, Outcome, ServingHealth, SliceDrift

COLUMNS = (
    ColumnDrift("country", "categorical", "user", 0.31, 0.05, 0.2, True, (0.0, 0.02), "nl 10 % -> 40 %"),
    ColumnDrift("item_age", "numeric", "item", 0.1, 0.06, 0.3, False, (0.0, 0.0)),
    ColumnDrift("new item_id", "vocabulary", "item", 0.12, 0.1, 0.4, False, (0.0, 0.0)),
    ColumnDrift("score_save", "numeric", "prediction", 0.2, 0.1, 0.3, False, (0.0, 0.0)),
)


def verdict(at: datetime, **changes) -> DriftVerdict:
    """One check of version 7 in which one column of four drifted."""
    made = DriftVerdict(
        as_of=at.isoformat(),
        model_version="7",
        slot=(at - timedelta(days=2)).isoformat(),
        window=((at - timedelta(hours=24)).isoformat(), at.isoformat()),
        drifted=True,
        kind="population",
        evidence=("country moved",),
        reason="1 of 3 features drifted",
        columns=COLUMNS,
        slices=(SliceDrift("surface=lens", "country", 0.5, 0.25),),
        broken={},
        skipped={"user_id": "an id"},
        requests=(20_000, 400),
        rows=(400_000, 8_000),
        users=(5_000, 120),
        late=0.01,
        data=(DataTest("volume", True, 400.0, ">= 120", "400 requests"),),
        outcome=Outcome(
            requests=300,
            immature=100,
            hit3={"save": 0.9, "hide": 0.1},
            interval={"save": (0.8, 1.0), "hide": (0.05, 0.15)},
            predicted={"save": 0.11},
            observed={"save": 0.1},
            calibration={"save": 1.1},
            age_hours=50.0,
            expected=0.95,
            lost=False,
            reason="as expected",
            random={"save": 0.6, "hide": 0.2},
        ),
        serving=ServingHealth(
            requests=500,
            errors=0.002,
            shed=0.01,
            fallbacks={"cached": 0.03, "popularity": 0.0},
            p50_ms=12.0,
            p99_ms=80.0,
        ),
        skew={},
        skew_share=0.0,
    )
    return replace(made, **changes)


def write_check(settings: Settings, found: DriftVerdict | str, at: datetime) -> Path:
    """Where a check leaves its verdict; a text is written as it is."""
    path = settings.monitoring / "checks" / f"{at:%Y%m%dT%H%M%S}" / "drift.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(found if isinstance(found, str) else found.to_json())
    return path


def decision(action: str, cause: str = "", at: str = "2026-01-01T00:00:00+00:00") -> dict[str, str]:
    return {"action": action, "cause": cause, "reason": "because", "champion": "7", "as_of": at, "key": at, "check": at}


def write_decisions(settings: Settings, entries: list[dict[str, str]]) -> Path:
    path = settings.monitoring / "decisions.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(e) + "\n" for e in entries))
    return path


def write_run(
    settings: Settings, at: datetime, outcome: str, ended: datetime | None = None, version: str = "7"
) -> None:
    path = settings.runs / f"{at:%Y%m%dT%H%M}-{outcome}" / "result.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    ended = ended or at + timedelta(hours=1)
    path.write_text(
        json.dumps({"as_of": at.isoformat(), "outcome": outcome, "version": version, "finished_at": ended.isoformat()})
    )


def write_alerts(settings: Settings, *names: str) -> Path:
    """These fire."""
    at = datetime(2026, 1, 1, tzinfo=UTC)
    found = [Alert(n, SEVERITY[n], {"alertname": n}, n, "", f"docs/runbooks/{n}.md", at.isoformat()) for n in names]
    path = settings.monitoring / "alerts.json"
    path.unlink(missing_ok=True)
    Alerts(path, settings.model_name).update(found, at)
    return path
