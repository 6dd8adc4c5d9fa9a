"""`evergreen schedule apply` against an API that remembers: twice changes nothing, killed anywhere loses nothing."""

import dataclasses
import io
import json
import sys

import pytest

from engagement.errors import EvergreenError
from evergreen.cli import main
from pipelines import recurring
from pipelines.compile import compile_all
from pipelines.kubeflow import HOST
from pipelines.schedule import schedule
from tests.kfp_lab import KfpApi

CRONS = {"evergreen-retrain": "0 5 3 * * 1,4", "evergreen-refresh": "0 10 * * * *", "evergreen-monitor": "0 20 * * * *"}


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    return {path.stem: path for path in compile_all(tmp_path_factory.mktemp("ir"))}


@pytest.fixture
def api(monkeypatch, packages):
    """An empty Kubeflow; pipelines are compiled once for all tests (`packages`)."""
    monkeypatch.setattr(recurring, "compile_all", lambda room: list(packages.values()))
    with KfpApi() as api:
        monkeypatch.setenv(HOST, api.url)
        yield api


def yes(changes):
    return True


def apply():
    changes, applied = recurring.apply(yes)
    return {change.entry: change.action for change in changes}, applied


def crons(api):
    return {r["display_name"]: r["trigger"]["cron_schedule"]["cron"] for r in api.recurring.values()}


def test_first_apply_creates_every_entry_and_the_second_changes_nothing(api):
    assert apply() == (dict.fromkeys(CRONS, "create"), True)
    assert crons(api) == CRONS
    for run in api.recurring.values():
        assert (run["mode"], run["no_catchup"], run["max_concurrency"]) == ("ENABLE", True, "1")
        assert "runtime_config" not in run  # the pipelines' own default: an empty as_of
    assert {v["display_name"] for v in api.versions.values()} == {w.version for w in _wanted(api)}
    writes = len(api.writes)
    assert apply() == (dict.fromkeys(CRONS, "none"), False)
    assert len(api.writes) == writes


def _wanted(api):
    return recurring.wanted(None)


def test_each_recurring_run_is_pinned_to_the_pipeline_that_it_names(api):
    apply()
    pipelines = {e.name: e.pipeline for e in schedule()}
    for run in api.recurring.values():
        documents = api.packages[run["pipeline_version_reference"]["pipeline_version_id"]]
        assert documents[0]["pipelineInfo"]["name"] == pipelines[run["display_name"].removeprefix("evergreen-")]


def test_new_code_gets_a_new_version_and_the_old_run_goes_last(api, packages, tmp_path, monkeypatch):
    apply()
    before = dict(api.recurring)
    changed = tmp_path / "monitor.yaml"
    changed.write_text(packages["monitor"].read_text().replace("evergreen-python:0.1.0", "evergreen-python:0.2.0"))
    monkeypatch.setattr(recurring, "compile_all", lambda room: list({**packages, "monitor": changed}.values()))
    api.writes.clear()
    actions, _ = apply()
    assert actions == {"evergreen-retrain": "none", "evergreen-refresh": "none", "evergreen-monitor": "update"}
    assert [w.split("/")[1] for w in api.writes] == ["pipelines", "recurringruns", "recurringruns"]
    assert api.writes[-1].startswith("DELETE") and len(api.recurring) == 3 and len(api.versions) == 4
    gone = set(before) - set(api.recurring)
    assert [before[g]["display_name"] for g in gone] == ["evergreen-monitor"]


@pytest.mark.parametrize(
    "spoil",
    [
        {"status": "DISABLED", "mode": "DISABLE"},
        {"no_catchup": False},
        {"max_concurrency": "5"},
        {"trigger": {"cron_schedule": {"cron": "0 0 3 * * *"}}},
        {"trigger": {"periodic_schedule": {"interval_second": "60"}}},
        {"runtime_config": {"parameters": {"as_of": "2026-01-01T00:00:00+00:00"}}},
    ],
    ids=lambda s: next(iter(s)),
)
def test_what_a_person_changed_is_put_back(api, spoil):
    apply()
    key = next(k for k, r in api.recurring.items() if r["display_name"] == "evergreen-monitor")
    api.recurring[key].update(spoil)
    actions, _ = apply()
    assert actions["evergreen-monitor"] == "update" and key not in api.recurring
    assert crons(api) == CRONS and apply()[1] is False


def test_foreign_recurring_runs_are_never_touched(api):
    apply()
    ours = next(iter(api.recurring.values()))
    foreign = {
        "by-hand": {**ours, "recurring_run_id": "by-hand", "display_name": "nightly"},
        "same-name": {**ours, "recurring_run_id": "same-name", "description": "mine"},
        "same-words": {**ours, "recurring_run_id": "same-words", "display_name": "report"},
    }
    api.experiments["other"] = {"experiment_id": "other", "display_name": "other"}
    foreign["elsewhere"] = {**ours, "recurring_run_id": "elsewhere", "experiment_id": "other"}
    api.recurring.update(foreign)
    assert apply() == (dict.fromkeys(CRONS, "none"), False)
    assert set(foreign) <= set(api.recurring)


def test_entry_that_is_no_longer_wanted_and_duplicates_go(api, monkeypatch):
    apply()
    twin = next(r for r in api.recurring.values() if r["display_name"] == "evergreen-refresh")
    api.recurring["twin"] = {**twin, "recurring_run_id": "twin"}
    monkeypatch.setattr(recurring, "schedule", lambda: tuple(e for e in schedule() if e.name != "monitor"))
    assert apply() == (
        {"evergreen-retrain": "none", "evergreen-refresh": "delete", "evergreen-monitor": "delete"},
        True,
    )
    assert sorted(crons(api)) == ["evergreen-refresh", "evergreen-retrain"] and len(api.recurring) == 2


def test_killed_after_any_write_the_next_apply_ends_the_same_and_never_has_none(api, monkeypatch):
    apply()
    moved = tuple(dataclasses.replace(e, minute=e.minute + 1) for e in schedule())
    monkeypatch.setattr(recurring, "schedule", lambda: moved)
    start = {name: dict(getattr(api, name)) for name in ("recurring", "versions", "pipelines")}
    for after in range(7):
        api.recurring = dict(start["recurring"])
        api.writes, api.die_after = [], after
        if after < 6:
            with pytest.raises(EvergreenError, match="refused: 503 killed"):
                apply()
        assert set(CRONS) <= {r["display_name"] for r in api.recurring.values()}, after
        api.die_after = None
        apply()
        assert crons(api) == {
            e: c.replace(" 5 3", " 6 3").replace("10 *", "11 *").replace("20 *", "21 *") for e, c in CRONS.items()
        }
        assert len(api.recurring) == 3 and apply()[1] is False


def test_killed_while_everything_is_new_the_next_apply_goes_on(api):
    for after in range(20):
        api.writes, api.die_after = [], after % 3
        try:
            apply()
        except EvergreenError:
            continue
        break
    api.die_after = None
    apply()
    assert crons(api) == CRONS and len(api.pipelines) == len(api.versions) == len(api.recurring) == 3


def test_refused_upload_is_one_line_and_nothing_is_scheduled(api):
    api.refuse_upload = "object store\nis full"
    with pytest.raises(EvergreenError, match="refused: 500 object store is full"):
        apply()
    assert api.recurring == {}


@pytest.mark.parametrize("host, told", [("", HOST), ("http://127.0.0.1:9", "does not answer")])
def test_no_host_and_a_silent_host_are_one_line(api, monkeypatch, host, told):
    monkeypatch.setenv(HOST, host)
    with pytest.raises(EvergreenError, match=told):
        apply()


def command(capsys, *arguments):
    """Run the command in this process; returns exit code, stdout, stderr."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["evergreen", "schedule", "apply", *arguments])
        try:
            main()
            code = 0
        except SystemExit as end:
            code = end.code
    return (code, *capsys.readouterr())


def test_dry_run_shows_the_difference_and_writes_nothing(api, capsys):
    code, out, err = command(capsys, "--dry-run")
    assert code == 0 and out.count("create") == 3 and "0 5 3 * * 1,4" in out and api.writes == []


def test_script_gets_json_and_needs_a_yes(api, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO())
    code, out, err = command(capsys, "--json")
    assert code == 2 and "--yes" in err and api.writes == []
    code, out, err = command(capsys, "--yes", "--json")
    assert code == 0 and [c["action"] for c in json.loads(out)["changes"]] == ["create"] * 3
    assert json.loads(out)["applied"] is True
    code, out, err = command(capsys)  # nothing to agree to
    assert code == 0 and "No change" in out


def test_person_who_says_no_changes_nothing(api, capsys, monkeypatch):
    answers = iter(["n\n", "y\n"])
    terminal = type("Terminal", (), {"isatty": lambda self: True, "readline": lambda self: next(answers)})()
    monkeypatch.setattr("sys.stdin", terminal)
    assert "Nothing was changed" in command(capsys)[1] and api.writes == []
    assert "Applied" in command(capsys)[1] and crons(api) == CRONS
