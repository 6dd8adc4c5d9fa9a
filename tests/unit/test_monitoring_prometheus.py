"""Rules, alerts, dashboard and runbooks fit each other, the monitor's own alerts and what is really told."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.parse
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import typer
import yaml

from evergreen.cli import app
from evergreen.settings import Settings
from monitoring import alerts, dashboard, figures
from monitoring.dashboard_panels import ROWS
from serving import stack
from serving.breaker import STATE
from serving.processes import Processes, free_port, http_get
from tests import monitoring_lab as lab

ROOT = Path(__file__).parents[2]
RULES = ROOT / "monitoring" / "prometheus"
RUNBOOKS = ROOT / "docs" / "runbooks"
NAME = re.compile(r"\b(?:[a-z]+:)?(?:evergreen|ranker)_[a-z0-9_]+(?::[a-z0-9_]+)?\b")
MODEL = Settings().model_name
PROMETHEUS, PROMTOOL = shutil.which("prometheus"), shutil.which("promtool")
needs_promtool = pytest.mark.skipif(not PROMTOOL, reason="promtool is not installed (Debian's package prometheus)")
needs_prometheus = pytest.mark.skipif(not PROMETHEUS, reason="Prometheus is not installed")


def rules(file):
    return [rule for group in yaml.safe_load((RULES / file).read_text())["groups"] for rule in group["rules"]]


ALERTS = {rule["alert"]: rule for rule in rules("alerts.yaml")}
RECORDED = {rule["record"]: rule["expr"] for rule in rules("recording.yaml")}
COUNTERS = (
    *("ranker_requests_total", "ranker_shed_total", "ranker_request_seconds_bucket", "ranker_stage_seconds_bucket"),
    *("ranker_batch_requests_sum", "ranker_batch_requests_count"),
)


def dashboard_queries():
    for row in ROWS.values():
        for panel in row:
            for query in panel.queries.values():
                yield f"{panel.title}: {query}", query.replace("$model", MODEL).replace("$column", ".*")


# Without a server.


@needs_promtool
@pytest.mark.parametrize(
    "arguments",
    [
        ["check", "rules", "recording.yaml", "alerts.yaml"],
        ["check", "config", "prometheus.yml"],
        ["test", "rules", "tests.yaml"],
    ],
    ids=["rules", "config", "faults"],
)
def test_promtool_finds_nothing_wrong(arguments):
    done = subprocess.run([PROMTOOL, *arguments], cwd=RULES, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_promtool_finds_nothing_wrong_with_the_cluster_s_scrapes_but_that_debian_s_cannot_ask_kubernetes(tmp_path):
    scraped = yaml.safe_load((RULES / "scrape.yaml").read_text())
    for job in scraped["scrape_configs"]:
        job["static_configs"] = [{"targets": ["127.0.0.1:1"]}] if job.pop("kubernetes_sd_configs") else []
    (tmp_path / "scrape.yaml").write_text(yaml.safe_dump(scraped))
    done = subprocess.run(
        [PROMTOOL, "check", "config", tmp_path / "scrape.yaml"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_a_test_that_it_fires_and_one_that_it_does_not():
    fires, rests = set(), set()
    for case in yaml.safe_load((RULES / "tests.yaml").read_text())["tests"]:
        for test in case["alert_rule_test"]:
            (fires if test["exp_alerts"] else rests).add(test["alertname"])
    assert fires == rests == set(ALERTS)


def test_alerts_are_those_of_the_monitor_with_its_severities():
    assert {name: rule["labels"]["severity"] for name, rule in ALERTS.items()} == alerts.SEVERITY


def test_limits_are_those_of_the_monitor():
    def limit(name):
        first = re.split(r"\band\b|\bor\b", ALERTS[name]["expr"])[0]
        return re.search(r"(>=|>) ([\d.]+)(?: \* ([\d.]+))?\s*$", first.strip()).groups()

    assert limit("EvergreenLateData") == (">=", str(alerts.LATE), None)
    assert limit("EvergreenServingErrors") == (">=", str(alerts.ERRORS), None)
    assert limit("EvergreenServingShed") == (">=", str(alerts.SHED), None)
    assert limit("EvergreenServingFallbacks") == (">=", str(alerts.FALLBACKS), None)
    assert limit("EvergreenServingSlow") == (">=", str(alerts.P99_MS / 1000), None)
    assert limit("EvergreenCheckStale") == (">", "3", "3600")
    assert timedelta(seconds=3 * 3600) == alerts.STALE


def test_every_alert_says_what_is_wrong_and_links_its_page():
    for name, rule in ALERTS.items():
        assert set(rule["annotations"]) == {"summary", "description", "runbook_url"}, name
        assert rule["annotations"]["runbook_url"] == f"{alerts.RUNBOOKS}/{name}.md"


def test_every_alert_has_a_runbook_and_every_runbook_an_alert():
    assert {p.stem for p in RUNBOOKS.glob("*.md")} - {"README"} == set(ALERTS)
    index = (RUNBOOKS / "README.md").read_text()
    for name, rule in ALERTS.items():
        assert f"[{name}]({name}.md) | {rule['labels']['severity']}" in index
        text = (RUNBOOKS / f"{name}.md").read_text()
        assert text.startswith(f"# {name}\n")
        assert len(text.splitlines()) <= 40, name
        headings = ["## What it means", "## How to check", "## What to do", "## When to escalate"]
        assert re.findall(r"^## .*$", text, re.MULTILINE) == headings, name


def commands():
    """Every command of the command line with its options: `evergreen data check`."""
    known = {}
    for name, command in typer.main.get_command(app).commands.items():
        for word, sub in getattr(command, "commands", {"": command}).items():
            known[f"{name} {word}".strip()] = {option for p in sub.params for option in p.opts}
    return known


def test_runbooks_call_commands_and_figures_that_exist():
    known, told = commands(), {*(f"evergreen_{name}" for name in figures.GAUGES), "evergreen_decisions_total"}
    for page in RUNBOOKS.glob("*.md"):
        text = page.read_text()
        called = re.findall(r"evergreen ((?:data |schedule )?[a-z]+)([^`\n]*)", " ".join(re.findall(r"`[^`]*`", text)))
        called += re.findall(r"^ {4}evergreen ((?:data |schedule )?[a-z]+)([^#\n]*)", text, re.MULTILINE)
        assert called or page.stem == "README", page.stem
        for name, rest in called:
            assert name in known, f"{page.stem}: evergreen {name}"
            assert set(re.findall(r"--[a-z-]+", rest)) <= known[name] | {"--home"}, f"{page.stem}: {name} {rest}"
        assert set(NAME.findall(text)) <= {*told, *RECORDED, *COUNTERS, STATE.describe()[0].name}, page.stem
        for link in re.findall(r"\]\(([^)#]+)", text):
            assert (RUNBOOKS / link).exists(), f"{page.stem}: {link}"


def test_every_name_in_rules_and_dashboard_is_told_by_somebody():
    told = {*(f"evergreen_{name}" for name in figures.GAUGES), "evergreen_decisions_total", *COUNTERS, *RECORDED}
    text = (RULES / "recording.yaml").read_text() + (RULES / "alerts.yaml").read_text()
    assert set(NAME.findall(text)) - {"ranker_"} <= told
    for title, query in dashboard_queries():
        assert set(NAME.findall(query)) <= told, title


def test_every_figure_is_on_the_dashboard():
    shown = {name for _, query in dashboard_queries() for name in NAME.findall(query)}
    shown |= {name for record in shown & set(RECORDED) for name in NAME.findall(RECORDED[record])}
    assert {f"evergreen_{name}" for name in figures.GAUGES} - shown == {"evergreen_drifted", "evergreen_broken_data"}


def test_dashboard_file_is_current():
    assert dashboard.FILE.read_text() == dashboard.text(), "run `python -m monitoring.dashboard`"


def test_panels_do_not_overlap_and_have_ids_of_their_own():
    panels = dashboard.dashboard()["panels"]
    assert len({p["id"] for p in panels}) == len(panels)
    cells = [
        (x, y)
        for p in panels
        for x in range(p["gridPos"]["x"], p["gridPos"]["x"] + p["gridPos"]["w"])
        for y in range(p["gridPos"]["y"], p["gridPos"]["y"] + p["gridPos"]["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < dashboard.WIDTH


# With a real Prometheus.


@pytest.fixture(scope="module")
def ask(tmp_path_factory):
    """Query of a real Prometheus that scrapes a home's exporter and, found by it, a predictor's counters."""
    home = tmp_path_factory.mktemp("home")
    settings, now = Settings(home=home, metrics_port=free_port()), datetime.now(UTC)
    for hours in range(3):
        at = now - timedelta(hours=hours)
        lab.write_check(settings, lab.verdict(at, broken={"price": "is stuck"} if hours == 2 else {}), at)
    lab.write_decisions(settings, [lab.decision("none"), lab.decision("retrain", "drift")])
    lab.write_alerts(settings, "EvergreenDrift")
    lab.write_run(settings, now - timedelta(hours=9), "champion")
    processes, port, counters = Processes(settings), free_port(), free_port()
    (home / "prometheus.yml").write_text(configuration(settings.metrics_port))
    command = [PROMETHEUS, f"--config.file={home}/prometheus.yml", f"--storage.tsdb.path={home}/prometheus"]
    server = None
    try:
        ranker = [sys.executable, str(ROOT / "tests" / "ranker_counters.py"), str(counters)]
        processes.start("predictor-7", ranker, ready=f"http://127.0.0.1:{counters}/", ports={"http": counters})
        processes.wait(stack.metrics(settings, processes))
        with (home / "prometheus.log").open("wb") as log:
            server = subprocess.Popen([*command, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=log)

        def ask(path, **parameters):
            url = f"http://127.0.0.1:{port}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
            status, text = http_get(url, timeout=10)
            return json.loads(text)["data"] if status == 200 else {"error": text, "result": []}

        deadline = time.monotonic() + 60
        twice = "increase(evergreen_decisions_total[1d])"  # needs a second scrape, of the exporter too
        while not all(ask("query", query=query)["result"] for query in (*RECORDED, twice)):
            assert time.monotonic() < deadline and server.poll() is None, (home / "prometheus.log").read_text()
            time.sleep(0.2)
        yield ask
    finally:
        if server:
            server.send_signal(signal.SIGTERM)
            server.wait(20)
        processes.stop_all()


def configuration(port):
    """The repository's own configuration on this port, in a hurry."""
    text = (RULES / "prometheus.yml").read_text().replace("127.0.0.1:8070", f"127.0.0.1:{port}")
    text = text.replace("15s", "1s").replace("127.0.0.1:9093", f"127.0.0.1:{free_port()}")
    return text.replace("- recording.yaml", f"- {RULES}/recording.yaml").replace(
        "- alerts.yaml", f"- {RULES}/alerts.yaml"
    )


@needs_prometheus
@pytest.mark.slow
def test_every_panel_of_the_dashboard_shows_something(ask):
    exempt = f'evergreen_broken{{model="{MODEL}"}}'  # nothing is broken in this home
    answers = {title: ask("query", query=query) for title, query in dashboard_queries() if query != exempt}
    assert {title: answer for title, answer in answers.items() if not answer["result"]} == {}
    assert ask("query", query="evergreen_drift_scor")["result"] == []  # so is a name that is wrong


@needs_prometheus
@pytest.mark.slow
def test_every_rule_asks_for_names_that_prometheus_has(ask):
    names = {*ask("label/__name__/values"), "evergreen_broken"}
    for name, rule in ALERTS.items():
        assert "error" not in ask("query", query=rule["expr"]), name
        missing = set(NAME.findall(json.dumps(rule))) - names
        assert not missing, (name, missing)
    for record, expression in RECORDED.items():
        assert ask("query", query=expression)["result"], record
    told = {f"evergreen_{name}" for name in figures.GAUGES} - {"evergreen_broken"}
    assert told <= names


@needs_prometheus
@pytest.mark.slow
def test_variables_of_the_dashboard_have_values(ask):
    for variable in dashboard.dashboard()["templating"]["list"]:
        if variable["type"] == "query":
            metric, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["query"]).groups()
            found = {r["metric"].get(label) for r in ask("query", query=metric)["result"]}
            assert found and None not in found


@needs_prometheus
@pytest.mark.slow
def test_drift_fires_and_names_the_columns_and_predictors_are_found_by_the_exporter(ask):
    deadline = time.monotonic() + 60
    while not (firing := {a["labels"]["alertname"]: a for a in ask("alerts")["alerts"] if a["state"] == "firing"}):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert set(firing) == {"EvergreenDrift"}
    assert firing["EvergreenDrift"]["annotations"]["description"].rstrip().endswith(": country")
    jobs = {r["metric"]["job"]: r["value"][1] for r in ask("query", query="up")["result"]}
    assert jobs == {"evergreen": "1", "ranker": "1"}
