"""What the commands do: check the call, then run a pipeline or ask a room."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from components.conclude import held_for_data
from components.plan import name_run
from engagement.errors import EvergreenError
from engagement.files import write_text
from engagement.slots import next_slot, previous_slots, slots
from engagement.store import EngagementStore
from evergreen.settings import Settings
from model.config import DEFAULT_STRATEGY, STRATEGY_NAMES

Progress = Callable[[str, str, int, int], None]


class RunFailed(EvergreenError):
    """A run that started and did not end well (exit code 1, where a wrong call gives 2)."""


@contextmanager
def one_run(settings: Settings) -> Iterator[None]:
    """Hold the home's run lock, so that two runs never write the same files.

    Raises:
        EvergreenError: Another run holds it.
    """
    from filelock import Timeout

    from pipelines.lock import run_lock

    try:
        with run_lock(settings, patience=2.0):
            yield
    except Timeout:
        raise EvergreenError(
            f"another run is in progress in {settings.root}",
            "Wait for it, or use another --home",
        ) from None


def need_data(settings: Settings) -> EngagementStore:
    """The home's engagement store.

    Raises:
        EvergreenError: Nothing was imported yet.
    """
    store = EngagementStore(settings.data)
    if not store.exists():
        raise EvergreenError(
            f"there is no engagement in {settings.data}",
            "Run `evergreen data fetch movielens-100k` or `evergreen data import DIR`",
        )
    return store


def fetch(settings: Settings, name: str, last_days: int | None) -> dict[str, Any]:
    """Fetch and import a public dataset; importing it again adds nothing."""
    from engagement.importers import movielens

    if name != movielens.MANIFEST.name:
        remedy = f"Choose {movielens.MANIFEST.name}, or `evergreen data import DIR`"
        raise EvergreenError(f"dataset {name!r} is unknown", remedy)
    return _import(settings, movielens.read(movielens.fetch(settings.root / "cache"), last_days))


def import_directory(settings: Settings, directory: Path, form: str) -> dict[str, Any]:
    """Import a directory (or file) of a known form."""
    from engagement.importers import contract_dir, kuairand, movielens

    readers = {"contract": contract_dir.read, "kuairand": kuairand.read, movielens.MANIFEST.name: movielens.read}
    if form not in readers:
        raise EvergreenError(f"--format {form} is unknown", f"Choose one of {', '.join(readers)}")
    if not directory.exists():
        raise EvergreenError(f"{directory} does not exist", "Give the directory that holds the dataset")
    return _import(settings, readers[form](directory))


def simulate(
    settings: Settings,
    world: str,
    users: int,
    days: int,
    impressions: int | None,
    seed: int,
    out: Path | None,
    progress: Progress,
) -> dict[str, Any]:
    """Write a simulated feed and its truth to `out`; without it, import the feed into the home."""
    from engagement.simulate import worlds, write

    laws, scale = worlds.world(world), worlds.Scale.of(users, days, impressions, seed)
    if out:
        return write.simulate(laws, scale, out, partial(progress, "simulate", "days"))
    with TemporaryDirectory() as room:
        write.simulate(laws, scale, Path(room) / "feed", partial(progress, "simulate", "days"))
        return import_directory(settings, Path(room) / "feed", "contract")


def _import(settings: Settings, dataset: Any) -> dict[str, Any]:
    with one_run(settings):
        return EngagementStore(settings.data).append(dataset, settings.clock()).to_json()


def check(settings: Settings) -> dict[str, Any]:
    """Verify the store; damaged parts are set aside."""
    store = need_data(settings)
    with one_run(settings):
        return store.check().to_json()


def compact(settings: Settings, retain_days: int | None) -> dict[str, Any]:
    """If asked, let older days go; then merge small parts."""
    store = need_data(settings)
    with one_run(settings):
        retained = store.retain(retain_days, settings.clock()).to_json() if retain_days is not None else None
        return {"compacted": store.compact().to_json(), "retained": retained}


def forget(settings: Settings, user_id: str) -> dict[str, Any]:
    """Remove a user from the home and tell what saw the user."""
    from components.forget import forget_user

    need_data(settings)
    with one_run(settings):
        return forget_user(settings, user_id)


def last_slots(settings: Settings, n: int) -> list[datetime]:
    """The last `n` slots that the log reaches, oldest first.

    The newest is the first slot after the last engagement, or the last slot before now on a live log.
    """
    _, last = need_data(settings).time_range()
    newest = min(next_slot(last), previous_slots(settings.clock(), 1)[0])
    return [*reversed(previous_slots(newest, n - 1)), newest] if n > 1 else [newest]


def check_strategy(name: str | None) -> str:
    """The strategy to use.

    Raises:
        EvergreenError: No such strategy.
    """
    if name is not None and name not in STRATEGY_NAMES:
        raise EvergreenError(f"strategy {name!r} is unknown", f"Choose one of {', '.join(STRATEGY_NAMES)}")
    return name or DEFAULT_STRATEGY


def check_training(name: str | None) -> str:
    """The strategy to retrain with.

    Raises:
        EvergreenError: No such strategy, or it trains nothing.
    """
    if name == "frozen":
        raise EvergreenError("strategy 'frozen' trains nothing: it is for replays", "Use `evergreen replay`")
    return check_strategy(name)


def retrain(
    settings: Settings,
    instants: list[datetime],
    strategy: str | None,
    progress: Progress,
    trust_data: bool = False,
) -> list[dict[str, Any]]:
    """Run the retrain pipeline at each instant, oldest first; a finished run is not repeated.

    One that was held for its data looks at the data again, or with `trust_data` does without the tests' consent.

    Returns:
        One result a run, with `repeated: True` where there was nothing to do.
    """
    name, store = check_training(strategy), need_data(settings)
    for instant in instants:
        if instant > settings.clock():
            raise EvergreenError(f"--as-of {instant:%Y-%m-%d %H:%M} lies in the future", "Choose an instant up to now")
    done = []
    with one_run(settings):
        for as_of in sorted(instants):
            key = name_run(settings, store.snapshot(as_of), name)
            path = settings.runs / key / "result.json"
            repeated = path.exists() and not held_for_data(json.loads(path.read_text()))
            if not repeated:
                reason = "slot" if as_of in slots(as_of, as_of) else "person"
                _run_retrain(settings, as_of, name, reason, trust_data, progress, path)
            done.append({**json.loads(path.read_text()), "repeated": repeated})
    return done


def _run_retrain(
    settings: Settings,
    as_of: datetime,
    strategy: str,
    reason: str,
    trust_data: bool,
    progress: Progress,
    result: Path,
) -> None:
    from pipelines.retrain import retrain as graph

    asked = {"as_of": as_of.isoformat(), "strategy": strategy, "reason": reason, "trust_data": trust_data}
    ran = _run(graph, settings, progress, **asked)
    if not result.exists():
        raise RunFailed(f"the retrain at {as_of:%Y-%m-%d %H:%M} ended without a result", f"See {ran.log}")
    write_text(result.parent / "timings.json", json.dumps(ran.seconds, indent=1))


def _run(graph: Any, settings: Settings, progress: Progress, **arguments: Any) -> Any:
    from pipelines import local

    try:
        return local.run(graph, settings, progress, **arguments)
    except EvergreenError as error:
        raise RunFailed(error.problem, error.remedy) from error


def submit(settings: Settings, as_of: datetime, strategy: str | None) -> str:
    """Start the compiled retrain on Kubeflow; returns the run's id."""
    from pipelines.kubeflow import submit_retrain

    return submit_retrain(as_of, check_training(strategy))


def replay(
    settings: Settings,
    start: datetime,
    end: datetime,
    strategies: list[str] | None,
    seeds: int,
    jobs: int,
    progress: Progress,
) -> dict[str, Any]:
    """Test, then train, slot after slot over history with each strategy and seed."""
    from pipelines import replay as history

    need_data(settings)
    names = list(dict.fromkeys(strategies or [DEFAULT_STRATEGY]))
    told = partial(_replaying, progress)
    try:
        with one_run(settings):
            return history.replay(settings, start, end, names, seeds, jobs, told)
    except history.TaskFailed as error:
        raise RunFailed(error.problem, error.remedy) from None


def _replaying(progress: Progress, text: str, done: int, total: int) -> None:
    progress("replay", f"{done}/{total} {text}", done, total)


def write_replay(result: dict[str, Any], json_file: Path | None, report: Path | None) -> None:
    """Write a replay's numbers, and a page with plots of them."""
    if json_file:
        write_text(json_file, json.dumps(result, indent=1))
    if report:
        from pipelines.replay_report import page

        write_text(report, page(result))


def promote(settings: Settings, version: str, progress: Progress) -> dict[str, Any]:
    """Roll one registered version out; returns the rollout's record.

    Raises:
        RunFailed: It has no passing evidence or no valid signature; the ledger says so.
    """
    from pipelines.rollout import rollout
    from serving.promoter import unfit
    from serving.registry import Registry

    registry = Registry(settings)
    registered = registry.get(version)
    version = registered.version  # as MLflow writes it: "03" is 3
    why = unfit(registry, version)
    if why:
        registry.refuse(version, why)
        raise RunFailed(f"version {version} is refused: {why}", "Retrain: a version that passes the gate is let in")
    with one_run(settings):
        _run(rollout, settings, progress, version=version, as_of=registered.tags["as_of"], again=True)
    record: dict[str, Any] = json.loads((settings.serving / "rollouts" / f"{version}.json").read_text())
    return record


def rollback(settings: Settings) -> dict[str, Any]:
    """Give all traffic back to the previous champion, or to the champion in mid-canary; no run is waited for."""
    from serving.rollback import rollback as give_back

    return give_back(settings)


def sign(settings: Settings, version: str) -> None:
    """Sign and export a version that was registered before models were."""
    from serving import earlier

    earlier.sign(settings, version)


def monitor(settings: Settings, as_of: datetime, progress: Progress) -> dict[str, Any]:
    """Run one drift check; returns its record (`checking.record`)."""
    from evergreen import checking
    from pipelines.monitor import monitor as graph

    need_data(settings)
    with one_run(settings):
        _run(graph, settings, progress, as_of=as_of.isoformat())
    return checking.record(settings, as_of)


def refresh(settings: Settings, as_of: datetime, progress: Progress) -> dict[str, Any]:
    """Materialise the online features as of an instant; returns the parity with the training path, if measured."""
    from components.features import refreshed_at
    from pipelines.refresh import refresh as graph

    need_data(settings)
    with one_run(settings):
        _run(graph, settings, progress, as_of=as_of.isoformat())
    return refreshed_at(settings)


def stream(settings: Settings, source: str, metrics: str) -> None:
    """Consume actions until SIGTERM."""
    from feature_repo.stream import run

    run(settings.features, settings.online_store, source, metrics)


def up(settings: Settings, scheduled: bool) -> list[dict[str, Any]]:
    """Start the UIs, the serving gateway and the schedule; what already runs is left alone."""
    from monitoring.workspace import repair
    from serving import stack

    if settings.evidently.exists():
        repair(settings.evidently)  # a half-written snapshot would keep the UI from answering
    return stack.up(settings, scheduled)


def down(settings: Settings) -> list[str]:
    """Stop what `up` started; returns the names."""
    from serving import stack

    return stack.down(settings)
