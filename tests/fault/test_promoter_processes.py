"""The promoter as a process: killed with -9 and started again, and two of them; beside a real Envoy.

Predictors are light stand-ins; processes, Envoy, MLflow, judge, state machine and the promoter's `main` are real.
"""

import http.client
import json
import shutil
import signal
import time
from itertools import pairwise
from pathlib import Path

import pytest

from serving.processes import free_port
from tests.fault.kills_lab import CONTEXT, child, stop
from tests.fault.promoters_lab import PATIENCE, POINTS, go_up, run_promoter, set_alias, settled
from tests.serving_lab import left_over


@pytest.fixture
def home(promoter_home, tmp_path):
    """A home under `evergreen up`, version 1 serves."""
    home = tmp_path / "home"
    shutil.copytree(promoter_home.begin_again().settings.root, home)
    child(go_up, home)
    yield home
    child(stop, home)
    assert left_over(home) == []


@pytest.fixture
def promoters(home):
    """Starts promoters; all are dead in the end."""
    started = []

    def start(die_at: str = "") -> "Promoter":
        started.append(Promoter(home, die_at))
        return started[-1]

    yield start
    for promoter in started:
        promoter.kill()


class Promoter:
    """A promoter's process."""

    def __init__(self, home: Path, die_at: str) -> None:
        self._port = free_port()
        self._log = home / f"promoter-{self._port}.log"
        self._process = CONTEXT.Process(target=run_promoter, args=(home, self._port, die_at))
        self._process.start()

    @property
    def said(self) -> str:
        return self._log.read_text()

    def health(self) -> dict:
        """What `/healthz` tells, once it answers."""
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=5)
                connection.request("GET", "/healthz")
                return json.loads(connection.getresponse().read())
            except OSError:
                assert time.monotonic() < deadline
                time.sleep(0.05)

    def until_acting(self) -> None:
        deadline = time.monotonic() + PATIENCE
        while not self.health()["acting"]:
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def died(self) -> bool:
        """Whether it killed itself."""
        self._process.join(PATIENCE)
        return self._process.exitcode == -signal.SIGKILL

    def kill(self) -> None:
        self._process.kill()
        self._process.join()


def all_agree(seen: dict, champion: str, previous: str, decisions: list[tuple[str, str]]) -> None:
    """Users, registry and ledger have the same champion, and each decision was made once."""
    assert seen["answers"] == [(200, champion)]
    assert seen["aliases"] == {"champion": champion} | ({"previous": previous} if previous else {})
    assert (seen["ledger"], seen["decisions"]) == ((champion, previous), decisions)


PROMOTED, BACK = ("promoted", "2"), ("rolled back by hand", "1")


def test_promoters_killed_one_after_another_leave_users_registry_and_ledger_agreed(home, promoters):
    child(set_alias, home, "candidate", "2")
    assert [promoters(point).died() for point in POINTS] == [True] * 3  # each goes on where the last one died
    last = promoters()
    all_agree(child(settled, home, 1), "2", "1", [PROMOTED])
    last.kill()
    child(set_alias, home, "champion", "1")  # a rollback by hand
    assert promoters("right after the decision").died()
    promoters()
    all_agree(child(settled, home, 2), "1", "", [PROMOTED, BACK])


def test_second_promoter_waits_and_takes_over_when_the_first_is_killed(home, promoters):
    first = promoters("at 50 %")
    first.until_acting()
    second = promoters()
    assert not second.health()["acting"]
    child(set_alias, home, "candidate", "2")
    assert first.died()
    second.until_acting()
    seen = child(settled, home, 1)
    all_agree(seen, "2", "1", [PROMOTED])
    assert "is wished for" in first.said and "is wished for" not in second.said and "promoted" in second.said
    assert len(turns(seen["pids"])) == len(set(seen["pids"])) == 3  # who made the home, the first, the second


def turns(pids: list[int]) -> list[int]:
    """Who wrote, in turn: no pid comes back where never two acted at once."""
    return [pid for before, pid in pairwise([0, *pids]) if pid != before]
