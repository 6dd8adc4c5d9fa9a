"""The schedule on Kubeflow: recurring runs that are what `pipelines/schedule.py` says, and no other.

Kubeflow has no call that changes a recurring run, checks no cron line, and pins each one to a version of its pipeline,
image and all. So the wanted state is compared with what is there, and what differs is made anew: first the new one,
then the old one goes. Killed in between, two are left, which do the same work once (a slot is retrained for once), and
the next `apply` takes one away. Recurring runs that this module did not make are left alone.
"""

import hashlib
import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

from pipelines.compile import compile_all
from pipelines.kubeflow import EXPERIMENT, kubeflow
from pipelines.schedule import Entry, schedule

if TYPE_CHECKING:
    import kfp

PREFIX = "evergreen-"  # of the names of our pipelines and recurring runs
MADE = "Made by `evergreen schedule apply`; it will be put back if it is changed by hand."
PAGE = 100


@dataclass(frozen=True)
class Wanted:
    """One recurring run as it shall be.

    Attributes:
        entry: The line of the schedule.
        package: Its compiled pipeline.
        version: Name of the pipeline's version: a digest of the package.
    """

    entry: Entry
    package: Path
    version: str

    @property
    def name(self) -> str:
        """Name of the recurring run."""
        return PREFIX + self.entry.name

    @property
    def pipeline(self) -> str:
        """Name of the pipeline."""
        return PREFIX + self.entry.pipeline

    def __str__(self) -> str:
        return f"{self.entry.cron}, version {self.version}"


@dataclass(frozen=True)
class Change:
    """What `apply` does about one entry.

    Attributes:
        entry: Name of the recurring run.
        now: What is there, in words.
        wanted: What shall be there.
        action: What is done.
        make: What is made anew; None if nothing is.
        drop: Ids of the recurring runs that go.
        when: When it runs, for a person; empty for what goes.
    """

    entry: str
    now: str
    wanted: str
    action: Literal["create", "update", "delete", "none"]
    make: Wanted | None = None
    drop: tuple[str, ...] = ()
    when: str = ""

    def to_json(self) -> dict[str, str]:
        """What a script reads."""
        return {"entry": self.entry, "now": self.now, "wanted": self.wanted, "action": self.action}


def apply(agree: Callable[[Sequence[Change]], bool]) -> tuple[list[Change], bool]:
    """Make Kubeflow's recurring runs what the schedule says.

    Args:
        agree: Is shown the difference, if there is one, and says whether to go on.

    Returns:
        The difference, one change an entry, and whether it was applied.

    Raises:
        EvergreenError: No host is set, it does not answer, or it refuses something: what was done until then stays,
            and the same command again does the rest.
    """
    with TemporaryDirectory() as room, kubeflow() as client:
        changes = difference(client, wanted(Path(room)))
        if all(change.action == "none" for change in changes) or not agree(changes):
            return changes, False
        for change in changes:
            if change.make:
                with redirect_stdout(io.StringIO()):  # the client prints links, of no use to a script
                    _make(client, change.make)
            for recurring_run in change.drop:
                client.delete_recurring_run(recurring_run)
        return changes, True


def wanted(room: Path, entries: Sequence[Entry] | None = None) -> list[Wanted]:
    """Compile what the schedule runs into `room`."""
    packages = {path.stem: path for path in compile_all(room)}
    return [
        Wanted(entry, packages[entry.pipeline], hashlib.sha256(packages[entry.pipeline].read_bytes()).hexdigest()[:12])
        for entry in entries or schedule()
    ]


def difference(client: "kfp.Client", wanted: Sequence[Wanted]) -> list[Change]:
    """Compare what is wanted with what is there; changes nothing."""
    ours = _ours(client)
    changes = [_compare(client, want, [r for r in ours if r.display_name == want.name]) for want in wanted]
    names = {want.name for want in wanted}
    gone = sorted({r.display_name for r in ours} - names)
    for name in gone:
        there = [r for r in ours if r.display_name == name]
        ids = tuple(r.recurring_run_id for r in there)
        changes.append(Change(name, _told(client, there), "–", "delete", drop=ids))
    return changes


def _compare(client: "kfp.Client", want: Wanted, there: Sequence[Any]) -> Change:
    version = _version_id(client, want)
    right = [r for r in there if version and _is(r, want, version)]
    others = tuple(r.recurring_run_id for r in there if r not in right[:1])
    when = want.entry.when
    if right:
        action: Literal["delete", "none"] = "delete" if others else "none"
        return Change(want.name, _told(client, there), str(want), action, drop=others, when=when)
    if there:
        return Change(want.name, _told(client, there), str(want), "update", want, others, when)
    return Change(want.name, "–", str(want), "create", want, when=when)


def _is(run: Any, want: Wanted, version: str) -> bool:
    """Whether a recurring run is exactly as wanted."""
    return (
        _cron(run) == want.entry.cron
        and _version_of(run) == version
        and run.status == "ENABLED"
        and bool(run.no_catchup)
        and str(run.max_concurrency) == "1"
        and not (run.runtime_config and run.runtime_config.parameters)
    )


def _told(client: "kfp.Client", runs: Sequence[Any]) -> str:
    """What is there, in words."""
    return "; ".join(_told_one(client, run) for run in runs)


def _told_one(client: "kfp.Client", run: Any) -> str:
    reference = run.pipeline_version_reference
    versions = _versions(client, reference.pipeline_id) if reference and reference.pipeline_id else []
    version = next((v.display_name for v in versions if v.pipeline_version_id == _version_of(run)), "?")
    parts = [_cron(run) or "no cron", f"version {version}"]
    parts += ["paused"] if run.status != "ENABLED" else []
    parts += ["catches up"] if not run.no_catchup else []
    parts += [f"{run.max_concurrency} at once"] if str(run.max_concurrency) != "1" else []
    parts += ["with parameters"] if run.runtime_config and run.runtime_config.parameters else []
    return ", ".join(parts)


def _make(client: "kfp.Client", want: Wanted) -> None:
    """Upload what is missing and create the recurring run."""
    from kfp_server_api import V2beta1Pipeline

    pipeline = client.get_pipeline_id(want.pipeline)
    if pipeline is None:
        # Uploading would make a first version that is named like the pipeline and not by its digest.
        pipeline = client._pipelines_api.pipeline_service_create_pipeline(
            pipeline=V2beta1Pipeline(display_name=want.pipeline, name=want.pipeline, description=want.entry.says)
        ).pipeline_id
    version = _version_id(client, want)
    if version is None:
        version = client.upload_pipeline_version(str(want.package), want.version, pipeline_id=pipeline)
        version = version.pipeline_version_id
    client.create_recurring_run(
        experiment_id=client.create_experiment(EXPERIMENT).experiment_id,
        job_name=want.name,
        description=MADE,
        cron_expression=want.entry.cron,
        max_concurrency=1,
        no_catchup=True,
        pipeline_id=pipeline,
        version_id=version,
    )


def _ours(client: "kfp.Client") -> list[Any]:
    """The recurring runs of the experiment that `apply` made, oldest first."""
    try:
        experiment = client.get_experiment(experiment_name=EXPERIMENT).experiment_id
    except ValueError:  # the client's word for: there is none
        return []
    found = _all(lambda **page: client.list_recurring_runs(experiment_id=experiment, **page), "recurring_runs")
    ours = [r for r in found if (r.display_name or "").startswith(PREFIX) and r.description == MADE]
    return sorted(ours, key=lambda r: (r.created_at is not None, r.created_at, r.recurring_run_id))


def _version_id(client: "kfp.Client", want: Wanted) -> str | None:
    pipeline = client.get_pipeline_id(want.pipeline)
    versions = _versions(client, pipeline) if pipeline else []
    return next((v.pipeline_version_id for v in versions if v.display_name == want.version), None)


def _versions(client: "kfp.Client", pipeline: str) -> list[Any]:
    return list(_all(lambda **page: client.list_pipeline_versions(pipeline, **page), "pipeline_versions"))


def _all(page_of: Callable[..., Any], field: str) -> Iterator[Any]:
    """Everything of a list that comes in pages."""
    token = ""
    while True:
        page = page_of(page_token=token, page_size=PAGE)
        yield from getattr(page, field) or []
        token = page.next_page_token or ""
        if not token:
            return


def _cron(run: Any) -> str:
    schedule = run.trigger.cron_schedule if run.trigger else None
    return schedule.cron if schedule else ""


def _version_of(run: Any) -> str:
    reference = run.pipeline_version_reference
    return (reference.pipeline_version_id if reference else "") or ""
