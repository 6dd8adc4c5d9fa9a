"""The laptop's scheduler: what is due runs once, one after the other; whatever stands in its way, it goes on."""

import json
import os
import signal
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psutil
import pytest

from engagement.errors import EvergreenError
from engagement.store import EngagementStore
from evergreen.settings import Settings
from monitoring.notify import Alerts
from pipelines import scheduler as module
from pipelines.lock import run_lock
from pipelines.memory import Memory
from pipelines.schedule import schedule
from pipelines.scheduler import Ended, Scheduler, follow
from pipelines.scheduler_door import listen
from serving import stack
from serving.agreement import Agreement
from serving.processes import Processes, http_get
from tests.alert_receiver import receiving
from tests.monitoring_lab import verdict, write_check
from tests.serving_lab import left_over, service_port
from tests.synth import START, write_contract_dir

NOW = START + timedelta(days=8, hours=12, minutes=30)  # Tuesday, 2024-01-09 12:30; the feed ends at midnight
HOUR = timedelta(hours=1)


def feed(home: Path, champion: bool = True) -> Settings:
    """A home with eight days of engagement, and a champion in the ledger."""
    from engagement.importers import contract_dir

    settings = Settings(home=home, now=NOW, scheduler_port=service_port())
    store = EngagementStore(settings.data)
    store.append(contract_dir.read(write_contract_dir(home.parent / "feed", users=30, items=60, days=8)))
    if champion:
        crown(settings)
    return settings


def crown(settings: Settings) -> None:
    Agreement(settings.serving).decide("promoted", "1", "for the test", champion="1")


class Lab:
    """A scheduler whose clock the test moves and whose runs are noted.

    Attributes:
        ran: Entry and instant of each run, in order.
        said: What it told.
        fails: Entries whose runs fail.
    """

    def __init__(self, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
        self.settings, self.now, self.mono = settings, NOW, 0.0
        self.ran: list[tuple[str, datetime]] = []
        self.said: list[str] = []
        self.fails: set[str] = set()
        monkeypatch.setattr(Settings, "clock", lambda settings: self.now)
        monkeypatch.setattr(module.time, "monotonic", lambda: self.mono)
        self.restart()

    def restart(self) -> None:
        self.scheduler = Scheduler(self.settings, self._run, self.said.append)

    def _run(self, entry, instant):
        self.ran.append((entry.name, instant))
        return Ended(entry.name not in self.fails, "out of luck" if entry.name in self.fails else "done")

    def settle(self, looks: int = 20) -> list[str]:
        """Look until nothing is done; returns what ran meanwhile."""
        before = len(self.ran)
        for _ in range(looks):
            if not self.scheduler.look():
                return [name for name, _ in self.ran[before:]]
        raise AssertionError("it never rests")

    def passes(self, span: timedelta) -> None:
        self.now += span
        self.mono += span.total_seconds()


@pytest.fixture
def lab(tmp_path, monkeypatch):
    return Lab(feed(tmp_path / "home"), monkeypatch)


def test_what_is_due_runs_once_in_the_order_of_its_starts(lab):
    assert lab.settle() == ["retrain", "refresh", "monitor"]
    slot, hour = datetime(2024, 1, 8, 3, tzinfo=UTC), datetime(2024, 1, 9, 12, tzinfo=UTC)
    assert [instant for _, instant in lab.ran] == [slot, hour, hour]
    assert lab.settle() == []


def test_fixed_clock_runs_each_entry_once_and_then_rests(lab):
    lab.settle()
    ran = list(lab.ran)
    for _ in range(50):
        lab.mono += 3600
        assert lab.settle() == []
    assert lab.ran == ran and len(ran) == 3


def test_machine_that_was_off_catches_up_once_and_tells_how_many_were_missed(lab):
    lab.settle()
    lab.ran.clear()
    lab.said.clear()
    lab.passes(timedelta(days=6))  # one slot and 144 hours
    assert sorted(lab.settle()) == ["monitor", "refresh", "retrain"]
    assert dict(lab.ran)["retrain"] == datetime(2024, 1, 15, 3, tzinfo=UTC)
    missed = {line.split(":")[0]: line for line in lab.said if "missed" in line}
    assert "143 missed" in missed["refresh"] and "143 missed" in missed["monitor"] and "1 missed" in missed["retrain"]


def test_home_without_data_says_so_once_and_starts_when_there_is_some(tmp_path, monkeypatch):
    settings = Settings(home=tmp_path / "home")
    lab = Lab(settings, monkeypatch)
    for _ in range(5):
        assert lab.settle() == []
    assert len(lab.said) == 1 and "no engagement" in lab.said[0] and "no engagement" in lab.scheduler.problem
    feed(tmp_path / "home", champion=False)
    for _ in range(5):
        assert lab.settle() == []
    assert len(lab.said) == 2 and "no champion" in lab.said[1]
    crown(settings)
    assert len(lab.settle()) == 3 and lab.scheduler.problem == ""


def test_old_dataset_is_told_of_once_an_instant_and_never_retrained_on(lab):
    lab.now = datetime(2026, 11, 22, 14, 30, tzinfo=UTC)
    for _ in range(60):
        lab.passes(timedelta(seconds=5))
        lab.settle()
    assert lab.ran == [] and len(lab.said) == 3
    assert all("nothing new since 2024-01-0" in line for line in lab.said)


@pytest.mark.parametrize("late, runs", [(timedelta(0), True), (timedelta(microseconds=1), False)])
def test_log_is_history_when_it_ended_more_than_fourteen_days_before(lab, late, runs):
    end = EngagementStore(lab.settings.data).time_range()[1]
    assert (lab.scheduler._history(end + module.HISTORY + late) == "") is runs


def test_run_that_fails_is_tried_again_less_and_less_often_and_holds_nothing_up(lab):
    lab.fails = {"refresh"}
    lab.settle()
    assert [n for n, _ in lab.ran].count("refresh") == 1 and len(lab.ran) == 3
    tries = []
    for _ in range(720):  # an hour of looks
        lab.mono += 5
        tries += [lab.mono] if lab.settle() else []
    assert len(tries) == 5 and [b - a for a, b in zip(tries, tries[1:], strict=False)] == [120, 240, 480, 960]
    assert "failed, again in 60 s: out of luck" in "\n".join(lab.said)
    lab.fails = set()
    lab.passes(HOUR)
    assert sorted(lab.settle()) == ["monitor", "refresh"]


def test_entry_that_fails_for_a_day_is_tried_about_once_an_hour(lab):
    lab.fails = {"monitor"}
    for _ in range(24 * 60):
        lab.passes(timedelta(minutes=1))
        lab.settle()
    assert 24 <= [n for n, _ in lab.ran].count("monitor") <= 36


def firing(lab):
    return [(a.name, a.description.splitlines()[0]) for a in Alerts.of(lab.settings).firing()]


def turn(lab, minutes, step=5):
    """So many minutes of a scheduler's life."""
    for _ in range(minutes // step):
        lab.passes(timedelta(minutes=step))
        lab.settle()
        lab.scheduler.miss_checks()


def test_checks_that_fail_for_three_hours_page_somebody_with_the_reason_until_they_are_back(lab, monkeypatch):
    with receiving() as receiver:
        lab.settings = lab.settings.model_copy(update={"alert_url": receiver.url})
        lab.restart()
        lab.fails = {"monitor"}
        turn(lab, 180)
        assert firing(lab) == [] and receiver.got == []
        turn(lab, 10)
        assert firing(lab) == [("EvergreenCheckStale", "The last try: out of luck")]
        turn(lab, 225)
        assert receiver.names() == [["EvergreenCheckStale"]]  # every four hours, not every five minutes
        turn(lab, 15)
        assert receiver.names() == [["EvergreenCheckStale"]] * 2
        for hours in (1, 2):  # what two checks that found nothing do
            Alerts.of(lab.settings).update([], lab.now + hours * HOUR)
        assert firing(lab) == [] and receiver.names("resolved")[-1] == ["EvergreenCheckStale"]


def test_schedule_that_somebodys_run_holds_up_for_three_hours_pages(lab):
    lab.settle()
    with run_lock(lab.settings, patience=0):
        turn(lab, 190)
    assert firing(lab) == [
        ("EvergreenCheckStale", "The last try: another run is in progress: the schedule waits for it")
    ]


def test_machine_that_was_off_or_slept_pages_nobody_nor_does_a_home_without_anything_to_check(
    lab, tmp_path, monkeypatch
):
    write_check(lab.settings, verdict(NOW - 9 * HOUR), NOW - 9 * HOUR)
    lab.restart()
    lab.scheduler.miss_checks()  # before its first check, which comes at once
    lab.settle()
    lab.passes(9 * HOUR)
    with run_lock(lab.settings, patience=0):
        lab.settle()
        lab.scheduler.miss_checks()
        turn(lab, 60)
    assert firing(lab) == []
    empty = Lab(Settings(home=tmp_path / "other"), monkeypatch)
    turn(empty, 240)
    lab.now = datetime(2026, 11, 22, 14, 30, tzinfo=UTC)  # the log is history
    turn(lab, 240)
    assert firing(empty) == firing(lab) == []


def test_check_that_fails_now_and_then_pages_nobody(lab):
    for hour in range(12):
        lab.fails = {"monitor"} if hour % 3 else set()
        if not lab.fails:
            write_check(lab.settings, verdict(lab.now), lab.now)
        turn(lab, 60)
    assert firing(lab) == []


def test_schedule_waits_for_a_persons_run_and_says_so(lab):
    with run_lock(lab.settings, patience=0):
        for _ in range(5):
            assert lab.settle() == []
        assert "another run is in progress" in lab.scheduler.problem and len(lab.said) == 1
    assert len(lab.settle()) == 3 and lab.scheduler.problem == ""


@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"refresh": 3}', '{"refresh": {"last": "today"}}'])
def test_lost_or_damaged_memory_costs_one_run_of_each_entry(lab, content):
    lab.settle()
    path = lab.settings.pipeline_root / "schedule.json"
    path.unlink() if content is None else path.write_text(content)
    lab.restart()
    assert len(lab.settle()) == 3 and lab.settle() == []
    assert Memory(lab.settings).last("refresh") is not None


def test_restart_runs_nothing_again(lab):
    lab.settle()
    lab.restart()
    assert lab.settle() == []


def test_clock_that_goes_back_is_told_of_once_and_runs_nothing_twice(lab):
    lab.settle()
    lab.said.clear()
    ran = list(lab.ran)
    lab.now -= 2 * HOUR
    for _ in range(24):
        lab.passes(timedelta(minutes=5))
        lab.settle()
    assert lab.ran == ran
    assert len(lab.said) == 2 and all("the clock is at 2024-01-09 10:35" in line for line in lab.said)
    lab.passes(HOUR)
    assert sorted(lab.settle()) == ["monitor", "refresh"]


def test_clock_that_was_years_ahead_does_not_silence_the_schedule(lab):
    for entry in schedule():
        Memory(lab.settings).ran(entry.name, datetime(2031, 1, 2, 3, tzinfo=UTC), "done", NOW, 0)
    assert len(lab.settle()) == 3 and lab.settle() == []


def test_unexpected_error_is_one_line_and_the_next_look_comes(lab, monkeypatch):
    stop, looks = threading.Event(), []

    def look():
        looks.append(1)
        if len(looks) == 3:
            stop.set()
        raise OSError("disk full")

    monkeypatch.setattr(lab.scheduler, "look", look)
    monkeypatch.setattr(module, "POLL", 0.0)
    said = []
    monkeypatch.setattr(module, "_say", said.append)
    follow(lab.scheduler, stop)
    assert len(looks) == 3 and said == ["OSError: disk full"] and lab.scheduler.problem == "disk full"


def test_port_in_use_is_one_line_with_its_setting(tmp_path):
    settings = Settings(home=tmp_path, scheduler_port=service_port())
    server = listen(settings, dict)
    with pytest.raises(EvergreenError, match="EVERGREEN_SCHEDULER_PORT"):
        listen(settings, dict)
    server.shutdown()
    server.server_close()


def test_door_tells_entries_and_what_runs(lab):
    lab.fails = {"monitor"}
    lab.settle()
    server = listen(lab.settings, lab.scheduler.state)
    url = f"http://127.0.0.1:{lab.settings.scheduler_port}"
    told = json.loads(http_get(f"{url}/schedule")[1])
    by_name = {e["name"]: e for e in told["entries"]}
    assert by_name["retrain"]["next"] == "2024-01-11T03:05:00+00:00" and by_name["retrain"]["due"] is None
    assert by_name["monitor"]["line"] == "out of luck" and by_name["monitor"]["failed"] == by_name["monitor"]["due"]
    assert http_get(f"{url}/healthz") == (200, '{"problem": "", "running": {}}')
    assert http_get(f"{url}/elsewhere")[0] == 404
    server.shutdown()
    server.server_close()


# --- the process itself ---


@pytest.fixture
def live(tmp_path, monkeypatch):
    """A home in which an hour has to be refreshed and looked at, and its scheduler's process."""
    settings = feed(tmp_path / "home")
    monkeypatch.setenv("EVERGREEN_NOW", NOW.isoformat())
    monkeypatch.setenv("EVERGREEN_RECIPE", "debug")
    memory = Memory(settings)
    memory.ran("retrain", datetime(2024, 1, 8, 3, tzinfo=UTC), "done", NOW, 0)
    memory.ran("monitor", datetime(2024, 1, 9, 12, tzinfo=UTC), "done", NOW, 0)
    processes = Processes(settings)
    process = stack.scheduler(settings, processes)
    processes.wait(process)
    yield settings, process
    processes.stop_all()
    assert left_over(settings.root) == []


def told(settings: Settings) -> dict:
    return json.loads(http_get(f"http://127.0.0.1:{settings.scheduler_port}/schedule")[1])


def wait_for(reached, within: float = 300.0) -> None:
    deadline = time.monotonic() + within
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.slow
def test_sigterm_in_mid_run_ends_the_run_with_all_its_children_at_once(live):
    settings, process = live
    wait_for(lambda: told(settings)["running"])
    family = lambda: psutil.Process(process.pid).children(recursive=True)  # noqa: E731
    wait_for(lambda: any("executor_main" in " ".join(p.cmdline()) for p in family()))
    children = family()
    os.kill(process.pid, signal.SIGTERM)
    wait_for(lambda: not process.alive)
    assert psutil.wait_procs(children, timeout=30)[1] == []
    assert Memory(settings).last("refresh") is None  # it is still due
    with run_lock(settings, patience=0):
        pass


@pytest.mark.slow
def test_due_entry_runs_through_the_compiled_pipeline_and_its_outcome_is_told(live):
    settings, _ = live
    refreshed = lambda: next(e for e in told(settings)["entries"] if e["name"] == "refresh")  # noqa: E731
    wait_for(lambda: refreshed()["last"], within=400.0)
    assert refreshed()["line"] == "served features are as of 2024-01-09T12:00"
    assert "by itself; next: refresh at 2024-01-09T13:10" in stack.scheduler_state(settings)


def test_run_whose_process_breaks_is_a_failed_one_with_its_last_line(tmp_path, monkeypatch):
    run = module.run_here(Settings(home=tmp_path), threading.Event())
    monkeypatch.setenv("EVERGREEN_SEED", "no number")
    ended = run(schedule()[1], NOW)
    assert not ended.well and "errors.pydantic.dev" in ended.line


@pytest.mark.slow
def test_killed_with_9_its_run_ends_by_itself(live):
    settings, process = live
    wait_for(lambda: told(settings)["running"])
    children = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    os.waitpid(process.pid, 0)  # as the init process does for one that `evergreen up` left behind
    assert children and psutil.wait_procs(children, timeout=30)[1] == []
