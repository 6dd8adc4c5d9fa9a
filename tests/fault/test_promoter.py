"""The promoter: what people wish, what a crash leaves at every single point, and what must agree afterwards.

Registry (MLflow on SQLite), ledger, signatures, rollout and judge are the real ones; the data plane is a file.
"""

import threading
from itertools import count

import pytest
from filelock import FileLock

from engagement.errors import EvergreenError
from serving import rollout
from serving.plane import Serving
from serving.rollback import rollback
from tests.promoter_kills import crashes, every_end, mlflow_away, quick_registry
from tests.promoter_lab import NUMBER, Home, Person

# Only the first wish goes through the five of the product: transitions between stages are all alike.
TWO_STAGES = (0, 50)


@pytest.fixture(scope="module")
def made(promoter_home):
    with quick_registry(promoter_home):
        yield promoter_home


@pytest.fixture
def home(made) -> Home:
    return made.begin_again()


@pytest.fixture
def two_stages(monkeypatch) -> None:
    monkeypatch.setattr(rollout, "STAGES", TWO_STAGES)


# What a person does: alias and version (None: the alias is deleted); then what is decided, and champion and previous.
WISHES = {
    "good": ("candidate", "2", [("promoted", "2")], ("2", "1")),
    "harmful": ("candidate", "harmful", [("rolled back", "harmful")], ("1", "7")),
    "held by the gate": ("candidate", "held", [("refused", "held")], ("1", "7")),
    "one byte flipped": ("candidate", "tampered", [("refused", "tampered")], ("1", "7")),
    "champion already": ("candidate", "1", [("refused", "1")], ("1", "7")),
    "champion moved to a held one": ("champion", "held", [("alias put back", "held"), ("refused", "held")], ("1", "7")),
    "champion moved to the previous": ("champion", "7", [("rolled back by hand", "7")], ("7", "")),
    "champion deleted": ("champion", None, [("alias put back", "1")], ("1", "7")),
    "previous moved": ("previous", "2", [], ("1", "7")),
}
OFTEN = ("held by the gate", "champion moved to the previous", "champion deleted")


def ends_as(home: Home, decisions: list, agreed: tuple, found) -> None:
    """After a promoter came to its end: the same as ever, and all agree."""
    assert home.decisions() == decisions, f"killed before {found.before}"
    home.assert_agreed(*agreed)


@pytest.mark.parametrize("name", WISHES)
def test_wish_killed_before_any_effect_ends_as_if_never_killed(home, monkeypatch, name):
    alias, version, decisions, agreed = WISHES[name]
    if name != "good":
        monkeypatch.setattr(rollout, "STAGES", TWO_STAGES)
    home.set(alias, version) if version else home.delete(alias)
    every_end(home, Person(), lambda found: ends_as(home, decisions, agreed, found), often=name in OFTEN)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("held", "refused: the gate said hold (worse)"),
        ("tampered", "refused: the files of version 5 are not those that were registered"),
        ("harmful", "rolled back: "),
    ],
)
def test_version_says_why_its_wish_came_back(home, name, says):
    home.set("candidate", name)
    home.promoter().reconcile()
    assert home.registry.get(NUMBER[name]).tags["promotion"].startswith(says)
    home.assert_agreed("1", "7")


def test_what_somebody_types_over_a_tag_is_no_evidence(home):
    home.registry.tag(NUMBER["held"], "gate", "promote")
    home.registry.tag(NUMBER["held"], "gate.not_worse", "pass: trust me")
    home.registry.tag(NUMBER["2"], "gate.not_worse", "pass: better than it was")
    for name, says in (("held", "the gate said hold"), ("2", "tag gate.not_worse was changed after the gate")):
        home.set("candidate", name)
        home.promoter().reconcile()
        assert says in home.registry.get(NUMBER[name]).tags["promotion"]
    home.assert_agreed("1", "7")


def test_new_wish_for_a_version_that_came_back_tries_again(home):
    for _ in range(2):
        home.set("candidate", "harmful")
        home.promoter().reconcile()
    assert home.decisions() == [("rolled back", "harmful")] * 2
    home.assert_agreed("1", "7")


def test_who_asks_is_in_the_ledger_as_far_as_anybody_knows(home):
    home.registry.tag(NUMBER["held"], "requested_by", "Ann\n" + "x" * 3000)
    for name in ("held", "tampered"):
        home.set("candidate", name)
        home.promoter().reconcile()
    by = [d["by"] for d in home.registry.agreement.decisions()[-2:]]
    assert by == ["Ann " + "x" * 196, "MLflow UI (unknown: MLflow does not record it)"]


# In mid-canary; then what is decided, and champion and previous.
MOVES = {
    "deleted": (lambda h: h.delete("candidate"), [("rolled back", "2")], ("1", "7")),
    "moved to a held version": (
        lambda h: h.set("candidate", "held"),
        [("rolled back", "2"), ("refused", "held")],
        ("1", "7"),
    ),
    "champion moved back": (
        lambda h: h.set("champion", "7"),
        [("rolled back", "2"), ("rolled back by hand", "7")],
        ("7", ""),
    ),
    "champion moved to it": (
        lambda h: h.set("champion", "2"),
        [("alias put back", "2"), ("promoted", "2")],
        ("2", "1"),
    ),
    "champion deleted": (
        lambda h: h.delete("champion"),
        [("alias put back", "1"), ("promoted", "2")],
        ("2", "1"),
    ),
}


# The other two leave no trace that is not among those of one of these.
@pytest.mark.parametrize("name", ["moved to a held version", "champion moved back", "champion moved to it"])
def test_alias_moved_in_mid_canary_killed_before_any_effect(home, two_stages, name):
    move, decisions, agreed = MOVES[name]
    home.set("candidate", "2")
    person = Person({0: lambda: move(home)})
    every_end(home, person, lambda found: ends_as(home, decisions, agreed, found), often=False)


@pytest.mark.parametrize("name", MOVES)
def test_alias_moved_at_any_stage(home, name):
    move, decisions, agreed = MOVES[name]
    for percent in (1, 10, 50, 100):
        home.begin_again().set("candidate", "2")
        home.promoter(Person({percent: lambda: move(home)})).reconcile()
        assert home.decisions() == decisions, percent
        home.assert_agreed(*agreed)


def test_alias_moved_after_the_promotion_comes_too_late(home, monkeypatch):
    from serving.registry import Registry

    def promote(*decided):
        home.set("candidate", "held")
        real(*decided)

    real = Registry.promote
    monkeypatch.setattr(Registry, "promote", promote)
    home.set("candidate", "2")
    home.promoter().reconcile()
    assert home.decisions() == [("promoted", "2"), ("refused", "held")]
    home.assert_agreed("2", "1")


def test_mlflow_away_in_mid_canary_and_afterwards_keeps_what_serves_and_loses_nothing(home, monkeypatch):
    away = []

    def client(registry):
        if away:
            raise EvergreenError("MLflow is away")
        return real(registry)

    from serving.registry import Registry

    real = Registry.client
    monkeypatch.setattr(Registry, "client", client)
    for percent in (0, 100):
        home.begin_again().set("candidate", "2")
        promoter = home.promoter(Person({percent: lambda: away.append(1)}))
        for _ in range(2):
            with pytest.raises(EvergreenError, match="MLflow is away"):
                promoter.reconcile()
        assert home.plane().serving() in (Serving("1"), Serving("1", "2", 100))
        away.clear()
        promoter.reconcile()
        assert home.decisions() == [("promoted", "2")]
        home.assert_agreed("2", "1")


@pytest.mark.parametrize(
    ("name", "answer_lost"),
    [
        ("held by the gate", True),
        ("champion moved to the previous", False),
        ("champion moved to the previous", True),
    ],
)
def test_any_call_of_mlflow_fails_once(home, two_stages, name, answer_lost):
    alias, version, decisions, agreed = WISHES[name]
    for nth in count():
        home.begin_again()
        home.set(alias, version) if version else home.delete(alias)
        promoter = home.promoter()
        with mlflow_away(nth.__eq__, answer_lost) as calls:
            try:
                promoter.reconcile()
            except EvergreenError as error:
                assert "failed with exception" in str(error)  # one line; `watch` tries again
        promoter.reconcile()
        assert home.decisions() == decisions, f"call {nth} of {calls}"
        home.assert_agreed(*agreed)
        if len(calls) <= nth:
            break


def test_traffic_that_strayed_is_brought_back(home):
    for strayed in (Serving("7"), Serving("1", "2", 50), Serving()):
        home.plane()._put(strayed)
        home.promoter().reconcile()
        assert home.decisions() == []
        home.assert_agreed("1", "7")


def test_rollout_that_a_pipeline_left_half_done_is_finished(home, two_stages):
    from serving.registry import Registry

    def pipeline():
        home.roll(lambda percent: None, Registry(home.settings), "2", True, lambda: True, "a slot")

    def ended(found):
        begun = "rollout.json" in found.files or found.before == "the beginning"
        ends_as(home, *(([("promoted", "2")], ("2", "1")) if begun else ([], ("1", "7"))), found)

    every_end(home, Person(), ended, often=False, work=pipeline)


def test_promoter_stands_back_while_another_command_changes_what_serves(home):
    from serving.stack import Busy, serving_lock

    home.set("champion", "2")
    with serving_lock(home.settings), pytest.raises(Busy):
        home.promoter().reconcile()
    assert home.registry.aliases()["champion"] == "2"
    home.promoter().reconcile()
    home.assert_agreed("2", "1")


def test_rollback_killed_before_any_effect_is_carried_out(home):
    left = crashes(home, lambda: rollback(home.settings, home.plane()))
    effects = [disk.before.split()[0] for disk in left]
    assert effects[:2] == ["Ledger._write", "Path.replace"]  # the decision, then the traffic; only then the registry
    for again in (False, True):
        for disk in left[1:]:
            home.go_to(disk)
            if again:  # the same command
                rollback(home.settings, home.plane())
            home.promoter().reconcile()
            ends_as(home, [("rolled back by hand", "7")], ("7", ""), disk)


def test_rollback_to_a_version_that_cannot_be_served_is_taken_back(home):
    damaged = home.settings.serving / "damaged.json"
    damaged.write_text(f'["{NUMBER["7"]}"]')
    with pytest.raises(EvergreenError, match="cannot be served"):
        rollback(home.settings, home.plane())
    home.promoter().reconcile()
    assert home.decisions() == [("rolled back by hand", "7"), ("rollback failed", "7")]
    home.assert_agreed("1", "7")


def test_rollback_in_mid_canary_takes_the_challenger_back(home):
    home.set("candidate", "2")
    done = []

    def command():
        done.append(rollback(home.settings, home.plane()))

    thread = threading.Thread(target=command)

    def look(percent):
        if percent == 10 and not thread.ident:
            thread.start()
            while not (home.settings.serving / "stop.json").exists():
                pass

    home.promoter(look).reconcile()
    thread.join()
    assert done == [{"champion": "1", "was": "1", "challenger": "2"}]
    assert home.decisions() == [("rolled back", "2")]
    home.assert_agreed("1", "7")


def test_second_promoter_takes_over_when_the_first_dies(home):
    lease = home.settings.serving / "promoter.lock"
    first = FileLock(lease)
    first.acquire()
    home.set("candidate", "2")
    acted = []

    def second():
        with FileLock(lease):
            home.promoter().reconcile()
            acted.append(home.decisions())

    thread = threading.Thread(target=second)
    thread.start()
    thread.join(0.3)
    assert acted == []
    first.release()
    thread.join()
    assert acted == [[("promoted", "2")]]
    home.assert_agreed("2", "1")


def test_rollout_that_cannot_be_had_now_waits_and_says_so(home, monkeypatch):
    promoter = home.promoter()
    home.set("candidate", "2")

    def nothing(*call):
        raise EvergreenError("there are no requests to replay")

    with monkeypatch.context() as patch, pytest.raises(EvergreenError, match="no requests"):
        patch.setattr(promoter, "_roll", nothing)
        promoter.reconcile()
    assert home.registry.get("2").tags["promotion"] == "waiting: there are no requests to replay"
    promoter.reconcile()
    home.assert_agreed("2", "1")
