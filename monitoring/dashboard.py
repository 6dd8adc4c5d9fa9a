"""`python -m monitoring.dashboard`: writes the Grafana dashboard, `grafana/dashboard.json`.

The panels are listed in `dashboard_panels.py`; the JSON that Grafana provisions is made of them and kept in the
repository, so that a cluster and a person's own Grafana read the same file. A test says when it is not current.
"""

import json
from pathlib import Path
from typing import Any

from monitoring.dashboard_panels import ROWS, Panel

FILE = Path(__file__).parent / "grafana" / "dashboard.json"
SOURCE = {"type": "prometheus", "uid": "${source}"}
WIDTH = 24  # of Grafana's grid


def dashboard() -> dict[str, Any]:
    """The dashboard, as Grafana provisions it."""
    panels: list[dict[str, Any]] = []
    y = 0
    for title, row in ROWS.items():
        panels.append({"id": len(panels) + 1, "type": "row", "title": title, "gridPos": _place(0, y, WIDTH, 1)})
        x, y = 0, y + 1
        for panel in row:
            if x + panel.width > WIDTH:
                x, y = 0, y + 8
            panels.append(_panel(panel, len(panels) + 1, _place(x, y, panel.width, 4 if title == "Now" else 8)))
            x += panel.width
        y += 8
    return {
        "uid": "evergreen",
        "title": "Evergreen",
        "description": "Made by `python -m monitoring.dashboard`.",
        "tags": ["evergreen"],
        "schemaVersion": 39,
        "editable": False,
        "refresh": "1m",
        "time": {"from": "now-7d", "to": "now"},
        "timezone": "utc",
        "templating": {
            "list": [_source(), _variable("model", "drift_score", False), _variable("column", "drift_score")]
        },
        "panels": panels,
    }


def _panel(panel: Panel, number: int, place: dict[str, int]) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [{"color": "green", "value": None}]
    custom = {}
    if panel.limit is not None:
        steps.append({"color": "red", "value": panel.limit})
        custom = {"thresholdsStyle": {"mode": "line"}} if panel.look == "timeseries" else {}
    return {
        "id": number,
        "type": panel.look,
        "title": panel.title,
        "description": panel.says,
        "datasource": SOURCE,
        "gridPos": place,
        "fieldConfig": {
            "defaults": {"unit": panel.unit, "custom": custom, "thresholds": {"mode": "absolute", "steps": steps}},
            "overrides": [],
        },
        "options": {"textMode": "name" if panel.title in ("Model", "What moved") else "auto"}
        if panel.look == "stat"
        else {},
        "targets": [
            {
                "refId": chr(ord("A") + place_),
                "datasource": SOURCE,
                "expr": expression,
                "legendFormat": legend,
                "instant": panel.look in ("stat", "table"),
                "format": "table" if panel.look == "table" else "time_series",
            }
            for place_, (legend, expression) in enumerate(panel.queries.items())
        ],
    }


def _stat(panel: Panel) -> dict[str, Any]:
    """The newest value; of an info metric, which is always 1, its name."""
    told = "name" if panel.title in ("Model", "What moved") else "value_and_name"
    return {"reduceOptions": {"calcs": ["lastNotNull"]}, "textMode": told}


def _place(x: int, y: int, width: int, height: int) -> dict[str, int]:
    return {"x": x, "y": y, "w": width, "h": height}


def _source() -> dict[str, Any]:
    return {"name": "source", "type": "datasource", "query": "prometheus", "label": "Prometheus"}


def _variable(label: str, metric: str, many: bool = True) -> dict[str, Any]:
    return {
        "name": label,
        "type": "query",
        "datasource": SOURCE,
        "query": f"label_values(evergreen_{metric}, {label})",
        "refresh": 2,
        "multi": many,
        "includeAll": many,
        "allValue": ".*" if many else None,
    }


def main() -> None:
    """Write the file."""
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(text())


def text() -> str:
    """The file's content."""
    return json.dumps(dashboard(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    main()
