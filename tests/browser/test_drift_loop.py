"""The whole loop of drift in a real browser: a new market arrives, and nobody has to do anything.

Everything is real: `evergreen up` with every service, Chromium, Evidently's UI, the figures for Prometheus, a webhook
for alerts, the early retrain with its canary. The feed is simulated; each row becomes known at its own instant, so
checks walk through it by `--as-of`. With EVERGREEN_SCREENSHOTS=DIR the pages are kept as pictures (docs/images).
"""

import json
import shutil
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from monitoring import workspace
from tests.alert_receiver import Receiver, receiving
from tests.browser_lab import MARKS, browsing, picture, sync_api
from tests.commands import evergreen, evergreen_json, left_over
from tests.serving_lab import service_port

pytestmark = [*MARKS, pytest.mark.timeout(1800)]  # a retrain and its canary are part of one test

MODEL = "homefeed-ranker"
DAYS, BEFORE = 36, 18  # of the simulated market: its new country joins at half time, on 2020-01-24
UNTIL = 22  # days of it that are delivered
SLOT = "2020-01-23T03:00"  # the first champion
CALM = "2020-01-23T18:00"
DRIFTED = ("2020-01-24T18:00", "2020-01-25T18:00")
RECOVERED = ("2020-01-26T12:00", "2020-01-27T00:00")
SERVICES = ("gateway", "mlflow", "evidently", "promoter", "scheduler", "metrics")


@dataclass(frozen=True)
class House:
    """A home in which everything runs, who gets its alerts, and the feed that is delivered to it bit by bit."""

    root: Path
    feed: Path
    receiver: Receiver
    ports: dict[str, int]

    @property
    def env(self) -> dict[str, str]:
        ports = {f"EVERGREEN_{name.upper()}_PORT": str(port) for name, port in self.ports.items()}
        return {**ports, "EVERGREEN_ALERT_URL": self.receiver.url}

    def run(self, *arguments: str) -> Any:
        return evergreen_json(self.root, *arguments, **self.env)

    def check(self, as_of: str) -> dict[str, Any]:
        """Served features are brought up to the hour, then the hour is checked: as the schedule does it."""
        self.run("refresh", "--as-of", as_of)
        return self.run("monitor", "--as-of", as_of)

    def figure(self, name: str, **labels: str) -> list[float]:
        """The values of a figure that Prometheus would scrape, of those with these labels."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.ports['metrics']}/metrics", timeout=30) as answer:
            families = list(text_string_to_metric_families(answer.read().decode()))
        samples = [s for family in families for s in family.samples if s.name == name]
        return [s.value for s in samples if {**labels, "model": MODEL}.items() <= s.labels.items()]


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """The days before the market, their first champion, and all services."""
    room = tmp_path_factory.mktemp("drift")
    options = ("--users", "400", "--days", str(DAYS), "--world", "market", "--impressions", "200000")
    evergreen(room / "home", "data", "simulate", *options, "--out", str(room / "world"))
    with receiving() as receiver:
        house = House(room / "home", room / "world", receiver, {name: service_port() for name in SERVICES})
        deliver(house, 0, BEFORE)
        house.run("retrain", "--as-of", SLOT)
        house.run("up")
        yield house
        evergreen(house.root, "down", **house.env)
    assert left_over(house.root) == []


def deliver(house: House, first: int, last: int) -> None:
    """Import days [first, last) of the world."""
    part = house.feed.with_name(f"days-{first}-{last}")
    shutil.copytree(house.feed, part, ignore=shutil.ignore_patterns("truth", "engagements"))
    (part / "engagements").mkdir()
    days = sorted((house.feed / "engagements").glob("*.parquet"))
    assert len(days) == DAYS
    for path in days[first:last]:
        shutil.copy(path, part / "engagements")
    house.run("data", "import", str(part))


@pytest.fixture(scope="module")
def page() -> Iterator["sync_api.Page"]:
    with browsing() as page:
        yield page


def panel(page: "sync_api.Page", house: House) -> dict[str, list[float | None]]:
    """Open the model's dashboard; gives the series that its panels were drawn from, by name."""
    answers: list[sync_api.Response] = []

    def keep(answer: "sync_api.Response") -> None:
        answers.append(answer)

    project = workspace.project_id_of(MODEL)
    page.on("response", keep)
    page.goto("about:blank")
    page.goto(f"http://127.0.0.1:{house.ports['evidently']}/projects/{project}")
    page.locator("[class*=MuiMarkElement]").first.wait_for()
    page.wait_for_load_state("networkidle")
    page.remove_listener("response", keep)
    series = [s for a in answers if "data_series" in a.url for s in a.json()["series"]]
    return {s["params"]["column"]: s["values"] for s in series}


def bars(page: "sync_api.Page") -> int:
    """Bars that can be seen in the panel `Kind of drift`."""
    boxes = [bar.bounding_box() for bar in page.locator("[class*=MuiBarElement]").all()]
    return sum(1 for box in boxes if box and box["height"] > 1)


def told(receiver: Receiver, status: str) -> list[dict[str, Any]]:
    """The alerts that were delivered with a status."""
    return [alert for body in receiver.got for alert in body["alerts"] if alert["status"] == status]


def decisions(house: House) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (house.root / "monitoring" / "decisions.jsonl").read_text().splitlines()]


def test_a_calm_check_leaves_the_panel_calm_and_tells_nobody(page, house):
    found = house.check(CALM)
    assert (found["drift"]["drifted"], found["drift"]["kind"]) == (False, "none")
    assert (found["decision"]["action"], found["alerts"], found["retrain"]) == ("none", [], None)
    series = panel(page, house)
    assert series["share of drifted features"][-1] == 0 and bars(page) == 0
    picture(page, "drift-loop-1-calm")
    assert house.figure("evergreen_drifted_features_ratio") == [0]
    assert house.receiver.got == []


def test_a_new_market_turns_the_panel_fires_the_alert_and_starts_one_early_retrain(page, house):
    deliver(house, BEFORE, UNTIL)
    first = house.check(DRIFTED[0])
    assert first["drift"]["drifted"] and first["drift"]["kind"] == "population"
    assert (first["decision"]["action"], first["alerts"]) == ("none", [])  # once is not yet
    series = panel(page, house)
    assert series["population"][-1] == 1 and series["share of drifted features"][-1] > 0 and bars(page) == 1
    country = series["user_profile__country (drift / threshold)"]
    assert country[-1] >= 1 > country[-2]
    assert house.figure("evergreen_drift_kind", kind="population") == [1]
    assert house.figure("evergreen_drifted", column="user_profile__country") == [1]

    second = house.check(DRIFTED[1])
    assert (second["decision"]["action"], second["decision"]["cause"]) == ("retrain", "drift")
    assert [a["name"] for a in second["alerts"]] == ["EvergreenDrift"]
    panel(page, house)
    assert bars(page) == 2
    picture(page, "drift-loop-2-turned")
    page.locator("a, button").filter(has_text="Reports").first.click()
    page.get_by_role("row").filter(has_text="kind:population").first.get_by_role("link", name="View").click()
    page.get_by_text("Columns, the furthest above its threshold first").wait_for()
    body = page.inner_text("body")
    assert "user_profile__country" in body and "HIT@3/save" in body  # the monitor's look, not that of the retrain
    picture(page, "drift-loop-3-report")
    page.goto(Path(second["report"]).as_uri())
    page.locator(".js-plotly-plot").first.wait_for()
    assert "population" in page.locator(".tile.wrong").first.inner_text()
    picture(page, "drift-loop-4-page")

    (alert,) = told(house.receiver, "firing")
    assert alert["labels"]["alertname"] == "EvergreenDrift"
    said = alert["annotations"]["description"]
    assert "user_profile__country" in said and "Likely kind: population" in said and "Slice: new users" in said
    assert house.figure("evergreen_alert_firing", alert="EvergreenDrift", severity="ticket") == [1]


def test_the_early_retrain_passed_its_canary_and_the_new_champion_serves(house):
    asked = [d for d in decisions(house) if d.get("action") == "retrain"]
    assert [(d["cause"], d["champion"], d["as_of"][:16]) for d in asked] == [("drift", "1", DRIFTED[1])]
    assert sum("taken" in d for d in decisions(house)) == 1
    state = house.run("status")
    early = state["runs"][-1]
    assert (early["reason"], early["champion"], early["version"], early["outcome"]) == ("drift", "1", "2", "champion")
    assert early["also_scratch"] == "asked for by drift"
    assert early["canary"][-1]["percent"] == 100 and all(s["verdict"] == "pass" for s in early["canary"])
    assert (state["champion"], state["previous"], state["serving"]["champion"]) == ("2", "1", "2")


def test_the_new_champion_is_at_home_the_panel_recovers_and_the_alert_is_resolved(page, house):
    for as_of in RECOVERED:
        found = house.check(as_of)
        assert (found["drift"]["model_version"], found["drift"]["drifted"]) == ("2", False), found["drift"]["reason"]
        assert found["decision"]["action"] == "none"
    assert found["alerts"] == []
    series = panel(page, house)
    assert series["share of drifted features"][-2:] == [0, 0] and series["population"][-2:] == [0, 0]
    assert bars(page) == 2
    picture(page, "drift-loop-5-recovered")
    (resolved,) = told(house.receiver, "resolved")
    assert resolved["labels"]["alertname"] == "EvergreenDrift"
    assert datetime.fromisoformat(resolved["endsAt"]) > datetime.fromisoformat(resolved["startsAt"])
    assert house.figure("evergreen_drifted_features_ratio") == [0]
    assert house.figure("evergreen_model_info", version="2") == [1]
