"""The promoter beside people who delete versions in MLflow, and rollbacks that come at the worst moment."""

import threading

import pytest

from engagement.errors import EvergreenError
from serving.plane import Serving
from serving.registry import Registry
from serving.rollback import rollback
from serving.rollout_state import Journal
from tests.promoter_lab import NUMBER, Home


@pytest.fixture
def home(promoter_home) -> Home:
    return promoter_home.begin_again()


def delete(home: Home, name: str) -> None:
    with home.registry.client() as client:
        client.delete_model_version(home.settings.model_name, NUMBER[name])


def test_deleted_champion_serves_on_says_so_once_and_is_followed_by_the_next(home):
    told: list[str] = []
    promoter = home.promoter(tell=told.append)
    delete(home, "1")
    for _ in range(3):
        promoter.reconcile()
    assert told == ["champion v1 was deleted in MLflow: it serves on until another is promoted"]
    assert home.plane().serving() == Serving("1") and home.decisions() == []
    home.set("candidate", "harmful")
    promoter.reconcile()
    assert home.plane().serving() == Serving("1") and home.decisions() == [("rolled back", "harmful")]
    home.set("champion", "2")  # as a person does who finds no champion: it is a wish like any other
    promoter.reconcile()
    assert home.decisions()[1:] == [("alias put back", "2"), ("promoted", "2")]
    assert home.plane().serving() == Serving("2") and home.registry.aliases()["champion"] == "2"
    promoter.reconcile()
    assert len(home.decisions()) == 3


def test_deleted_previous_leaves_the_promoter_at_rest(home):
    delete(home, "7")
    home.promoter().reconcile()
    home.set("candidate", "held")
    home.promoter().reconcile()
    assert home.decisions() == [("refused", "held")] and home.plane().serving() == Serving("1")


def test_wish_for_a_version_that_is_deleted_goes_with_it(home, monkeypatch):
    promoter = home.promoter()

    def nothing(*call):
        raise EvergreenError("there are no requests to replay")

    home.set("candidate", "2")
    with monkeypatch.context() as patch, pytest.raises(EvergreenError, match="no requests"):
        patch.setattr(promoter, "_roll", nothing)
        promoter.reconcile()
    delete(home, "2")
    promoter.reconcile()
    home.assert_agreed("1", "7")


def at_stage(percent: int, act):
    done = []

    def look(now):
        if now == percent and not done:
            done.append(now)
            act()

    return look


class Killed(BaseException):
    """Stands for `kill -9`."""


@pytest.mark.parametrize("killed", [False, True])
def test_version_deleted_in_its_canary_comes_back(home, killed):
    def act():
        delete(home, "2")
        if killed:
            raise Killed

    home.set("candidate", "2")
    promoter = home.promoter(at_stage(10, act))
    if killed:
        with pytest.raises(Killed):
            promoter.reconcile()
        home.plane()._put(Serving("1", "2", 10))
    home.promoter().reconcile() if killed else promoter.reconcile()
    assert home.decisions() == [("rolled back", "2")]
    home.assert_agreed("1", "7")


@pytest.mark.parametrize("promoted", [False, True])
def test_rollback_asked_around_the_promotion_goes_back_although_the_canary_passed(home, monkeypatch, promoted):
    home.set("candidate", "2")
    done, real = [], Registry.promote
    thread = threading.Thread(target=lambda: done.append(rollback(home.settings, home.plane())))

    def ask():
        thread.start()
        while not (home.settings.serving / "stop.json").exists():
            pass

    def promote(*decided):
        if not thread.ident:
            ask()
        real(*decided)

    if promoted:  # too late to be heard: the promotion is taken back
        monkeypatch.setattr(Registry, "promote", promote)
    home.promoter(at_stage(-1 if promoted else 100, ask)).reconcile()
    thread.join()
    home.promoter().reconcile()
    if promoted:
        assert done == [{"champion": "1", "was": "2", "challenger": ""}]
        assert home.decisions() == [("promoted", "2"), ("rolled back by hand", "1")]
    else:
        assert done == [{"champion": "1", "was": "1", "challenger": "2"}]
        assert home.decisions() == [("rolled back", "2")]
    home.assert_agreed("1", "" if promoted else "7")


def test_rollback_of_a_promotion_that_was_killed_before_it_was_recorded_goes_back(home):
    state = Journal(home.settings.serving)

    def pipeline():
        home.roll(lambda percent: None, Registry(home.settings), "2", True, lambda: True, "a slot")

    real = Journal.move

    def dying(journal, state, stage, *args, **changes):
        if stage == "champion":
            raise Killed
        return real(journal, state, stage, *args, **changes)

    Journal.move = dying
    try:
        with pytest.raises(Killed):
            pipeline()
    finally:
        Journal.move = real
    assert not state.load().final and home.registry.agreed().champion == "2"
    assert rollback(home.settings, home.plane())["champion"] == "1"
    home.promoter().reconcile()
    home.assert_agreed("1", "")


def test_rollback_that_comes_between_a_pipelines_promotion_and_the_promoters_last_word_stays(home):
    promoter, real = home.promoter(), home.promoter()._roll
    with pytest.raises(Killed):  # a pipeline's rollout, which the promoter is to finish
        home.roll(at_stage(10, kill), Registry(home.settings), "2", True, lambda: True, "a slot")

    def then_rollback(*call):
        result = real(*call)
        rollback(home.settings, home.plane())
        return result

    promoter._roll = then_rollback
    promoter.reconcile()
    assert home.decisions()[-2:] == [("promoted", "2"), ("rolled back by hand", "1")]
    home.assert_agreed("1", "")


def kill():
    raise Killed


def test_rollback_without_mlflow_has_happened_and_says_what_is_left(home, monkeypatch):
    def conform(registry):
        raise EvergreenError("MLflow is away")

    with (
        monkeypatch.context() as patch,
        pytest.raises(EvergreenError, match="v6 serves, but MLflow does not show it yet: MLflow is away"),
    ):
        patch.setattr(Registry, "conform", conform)
        rollback(home.settings, home.plane())
    assert home.plane().serving() == Serving("6")
    home.promoter().reconcile()
    home.assert_agreed("7", "")


def test_rollback_twice_says_that_there_is_nowhere_left_to_go(home):
    rollback(home.settings, home.plane())
    with pytest.raises(EvergreenError, match="no previous champion to go back to"):
        rollback(home.settings, home.plane())
    home.promoter().reconcile()
    home.assert_agreed("7", "")


def test_promotion_after_which_mlflow_goes_away_keeps_its_traffic(home, monkeypatch):
    def conform(registry):
        raise EvergreenError("MLflow is away")

    home.set("candidate", "2")
    with monkeypatch.context() as patch, pytest.raises(EvergreenError, match="MLflow is away"):
        patch.setattr(Registry, "conform", conform)
        home.promoter().reconcile()
    assert home.plane().serving() == Serving("2")
    home.promoter().reconcile()
    assert home.decisions() == [("promoted", "2")]
    home.assert_agreed("2", "1")
