"""The registry of models: MLflow, spoken to directly on SQLite or through a server, both by the same calls.

A version is registered once for each run key, signed, carries its lineage as tags, and is never unpickled. Aliases
tell its standing: `challenger` (passed the gate), `candidate` (a person wants it rolled out), `champion` (serves),
`previous` (served before; where a rollback goes). The last two show what was decided in the ledger (`agreement.py`).
"""

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from engagement.errors import EvergreenError
from evergreen.settings import TELEMETRY_OFF, Settings
from serving import signing
from serving.agreement import ADOPTED, BACK_BY_HAND, PROMOTED, REFUSED, ROLLED_BACK, Agreed, Agreement, Order
from serving.files import directory_digest
from serving.mlflow_runs import DatasetRef

if TYPE_CHECKING:
    from mlflow import MlflowClient

CHALLENGER, CANDIDATE, CHAMPION, PREVIOUS = "challenger", "candidate", "champion", "previous"
RUN_KEY = "run_key"  # tag: names the run by its inputs
DIGEST = "bundle_digest"  # tag: what `fetch` compares the files with
GATE = "gate"  # tag: the gate's verdict; `hold` keeps a version from becoming challenger
UPDATES = "updates"  # tag: updates since a training from scratch
ROLLOUT = "rollout"  # tag: how its last rollout ended
PROMOTION = "promotion"  # tag: what was last said about a wish to promote it
REQUESTED_BY = "requested_by"  # tag: who wishes it; MLflow itself does not record who moves an alias


class NotRegistered(EvergreenError):
    """A version that the registry does not have, or has no more."""


@dataclass(frozen=True)
class Version:
    """One registered version with its tags and aliases."""

    version: str
    tags: Mapping[str, str]
    aliases: tuple[str, ...]
    created: datetime
    run_id: str


@dataclass(frozen=True)
class Served:
    """The champion as it lies here: its version, the tags that were signed with it, its bundle's directory."""

    version: str
    tags: Mapping[str, str]
    directory: Path


class Registry:
    """The registry of one home.

    Args:
        settings: The home; `settings.tracking_uri` says where MLflow is.
        order: On whose behalf decisions are made here.
    """

    def __init__(self, settings: Settings, order: Order = Order()) -> None:  # noqa: B008 (frozen)
        self._settings = settings
        self._name = settings.model_name
        self._order = order
        self.agreement = Agreement(settings.serving)

    def register(
        self,
        bundle: Path,
        run_key: str,
        *,
        params: Mapping[str, Any] | None = None,
        metrics: Mapping[str, float] | None = None,
        tags: Mapping[str, str] | None = None,
        datasets: Sequence[DatasetRef] = (),
        artifacts: Sequence[Path] = (),
        experiment: str = "retrain",
    ) -> str:
        """Register a bundle as a version; the same run key again gives the same version and adds nothing.

        A call that was killed half-way is completed by the next: its run and its logged model are taken up.

        Args:
            bundle: Directory of the bundle.
            run_key: Names the run.
            params: What the run was asked for.
            metrics: What it measured.
            tags: Lineage, put on the run and on the version; `gate` decides about the alias `challenger`.
            datasets: What it was trained on.
            artifacts: Files that belong to the run: the gate's report, the drift page.
            experiment: MLflow experiment, one a pipeline.

        Returns:
            The version.

        Raises:
            EvergreenError: The bundle is not there, or MLflow cannot be reached.
        """
        if not bundle.is_dir():
            raise EvergreenError(f"there is no bundle at {bundle}", "Train a model first")
        with self.client() as client, FileLock(self._settings.root / "mlflow" / ".register.lock"):
            from serving import mlflow_runs

            version = self._by_run_key(client, run_key)
            if version is None:
                tags = dict(tags or {}) | {RUN_KEY: run_key, DIGEST: directory_digest(bundle)}
                location = self._artifact_location(experiment)
                run = mlflow_runs.open_run(client, experiment, location, run_key, dict(params or {}))
                mlflow_runs.log(client, run, dict(metrics or {}), tags, datasets, artifacts)
                seal = partial(signing.seal, registered=tags, settings=self._settings)
                source = mlflow_runs.log_bundle(client, run, bundle, tags[DIGEST], seal)
                self._create_model(client)
                client.create_model_version(self._name, source=source, run_id=run, tags=tags)
                version = self._by_run_key(client, run_key)
                assert version is not None
            mlflow_runs.close_run(client, version.run_id)
            if not version.aliases and version.tags.get(GATE) != "hold" and ROLLOUT not in version.tags:
                client.set_registered_model_alias(self._name, CHALLENGER, version.version)
            return version.version

    def offer(self, version: str) -> None:
        """Give a version the alias `challenger`, unless it is champion."""
        with self.client() as client:
            aliases = self._aliases(client)
            if str(version) not in (aliases.get(CHAMPION), aliases.get(CHALLENGER)):
                client.set_registered_model_alias(self._name, CHALLENGER, str(version))

    def aliases(self) -> dict[str, str]:
        """Version by alias; empty before the first registration."""
        with self.client() as client:
            return self._aliases(client)

    def champion(self) -> Version | None:
        """The version that serves, if any."""
        version = self.aliases().get(CHAMPION)
        return self.get(version) if version else None

    def get(self, version: str) -> Version:
        """One version.

        Raises:
            NotRegistered: The registry does not have it.
        """
        from mlflow.exceptions import MlflowException

        with self.client() as client:
            try:
                found = client.get_model_version(self._name, str(version))
            except MlflowException as error:
                if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                    raise
                problem = f"version {version} is not registered"
                raise NotRegistered(problem, "See `evergreen status` for those that are") from None
            return _version(found, dict.fromkeys(found.aliases, str(found.version)))

    def has(self, version: str) -> bool:
        """Whether a version is registered; people delete them."""
        try:
            return bool(self.get(version))
        except NotRegistered:
            return False

    def versions(self) -> list[Version]:
        """All versions, newest first."""
        with self.client() as client:
            aliases = self._aliases(client)
            # A search leaves the aliases out, whatever the field says.
            found = client.search_model_versions(f"name='{self._name}'")
            versions = [_version(v, aliases) for v in found]
            return sorted(versions, key=lambda v: int(v.version), reverse=True)

    def fetch(self, version: str, dest: Path | None = None) -> Path:
        """Bring a version's bundle here and verify its digest and its signature.

        Args:
            version: The version.
            dest: Directory to make; default: its place under `settings.serving`.

        Returns:
            The directory. One that is there and intact is not fetched again.

        Raises:
            NotRegistered: The version is unknown. One that serves and was deleted serves on from what is here.
            NotGenuine: Its files are not those that were registered and signed.
        """
        directory = dest or self._place(version)
        self._fetch(version, directory)
        return directory

    def served(self) -> Served | None:
        """The champion by the ledger, its files verified; MLflow (2 s to import) is asked for what is not here alone.

        Raises:
            EvergreenError: As `fetch`.
        """
        version = self.agreed().champion
        if not version:
            return None
        place = self._place(version)
        with suppress(EvergreenError):
            if place.is_dir():
                return Served(version, signing.verify(place, signing.verifying_key(self._settings), version), place)
        return Served(version, self._fetch(version, place), place)

    def evidence(self, version: str) -> dict[str, str]:
        """What was signed about a version when it was registered: the tags of that time; its files are verified.

        Raises:
            EvergreenError: As `fetch`.
        """
        return self._fetch(version, self._place(version))

    def agreed(self) -> Agreed:
        """What the ledger says; a registry that has none yet is believed, once."""
        agreed = self.agreement.now()
        if agreed.turn:
            return agreed
        aliases = self.aliases()
        champion, previous = aliases.get(CHAMPION, ""), aliases.get(PREVIOUS, "")
        if champion:
            self.agreement.decide(ADOPTED, champion, "the ledger begins", Order(), champion, previous)
            agreed = self.agreement.now()
            self.agreement.show(agreed)
        return agreed

    def promote(self, version: str, why: str = "") -> None:
        """Make a version champion and the champion before it `previous`. Nothing changes if it is champion.

        Raises:
            EvergreenError: It is not registered.
        """
        self.get(version)
        agreed = self.agreed()
        if agreed.champion != str(version):
            self.agreement.decide(PROMOTED, version, why, self._order, str(version), agreed.champion)
        if not self.agreement.shown:  # once they were shown, an alias that differs is a person's wish, not a leftover
            self.conform()

    def conform(self) -> None:
        """Bring the aliases in line with what is agreed; all of it may be done already."""
        agreed = self.agreed()
        with self.client() as client:
            aliases = self._aliases(client)
            if agreed.turn == BACK_BY_HAND:
                self.tag(agreed.was, ROLLOUT, "rolled_back: by hand")
            for alias, version in ((PREVIOUS, agreed.previous), (CHAMPION, agreed.champion)):
                if aliases.get(alias, "") == version:
                    continue
                if version and self.has(version):
                    client.set_registered_model_alias(self._name, alias, version)
                elif alias in aliases:
                    client.delete_registered_model_alias(self._name, alias)
            if agreed.champion and aliases.get(CHALLENGER) == agreed.champion:
                client.delete_registered_model_alias(self._name, CHALLENGER)
        self.agreement.show(agreed)

    def reject(self, version: str, reason: str) -> None:
        """Record that a version's rollout came back and why, and take the alias `challenger` from it."""
        self.agreed()
        self.agreement.decide(ROLLED_BACK, version, reason, self._order)
        self.tag(version, ROLLOUT, f"rolled_back: {reason}")
        self.unset(CHALLENGER, version)

    def refuse(self, version: str, why: str) -> None:
        """Record that a version was asked for and may not be rolled out."""
        self.agreed()
        self.agreement.decide(REFUSED, version, why, self._order)
        self.tag(version, PROMOTION, f"{REFUSED}: {why}")

    def wish(self, version: str) -> None:
        """Give a version the alias `candidate`."""
        with self.client() as client:
            client.set_registered_model_alias(self._name, CANDIDATE, str(version))

    def unset(self, alias: str, version: str) -> None:
        """Take an alias from a version, if it is there."""
        with self.client() as client:
            if self._aliases(client).get(alias) == str(version):
                client.delete_registered_model_alias(self._name, alias)

    def tag(self, version: str, key: str, value: str) -> None:
        """Set a tag of a version; of one that was deleted there is nothing to tell."""
        from mlflow.exceptions import MlflowException

        with self.client() as client:
            try:
                client.set_model_version_tag(self._name, str(version), key, value[:5000])
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise

    def _place(self, version: str) -> Path:
        return self._settings.serving / "models" / str(version)

    def _fetch(self, version: str, directory: Path) -> dict[str, str]:
        """See `fetch`; returns what was signed. One at a time: two would take each other's files away."""
        self._settings.serving.mkdir(parents=True, exist_ok=True)
        with FileLock(self._settings.serving / ".fetch.lock"):
            try:
                registered = self.get(version)
            except NotRegistered:
                agreed = self.agreement.now()
                if version not in (agreed.champion, agreed.previous) or not directory.is_dir():
                    raise
                return signing.verify(directory, signing.verifying_key(self._settings))
            with suppress(EvergreenError):
                if directory.is_dir():
                    return self._verify(directory, registered)
            with self.download(registered, directory.parent) as got:
                signed = self._verify(got, registered)
                shutil.rmtree(directory, ignore_errors=True)
                got.replace(directory)
            return signed

    @contextmanager
    def download(self, registered: Version, room: Path) -> Iterator[Path]:
        """The files of a version as the registry has them, not looked at yet."""
        room.mkdir(parents=True, exist_ok=True)
        with self.client(), tempfile.TemporaryDirectory(dir=room, prefix=".fetching-") as directory:
            import mlflow

            uri = f"models:/{self._name}/{registered.version}/artifacts/bundle"
            yield Path(mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=directory))

    def _verify(self, directory: Path, registered: Version) -> dict[str, str]:
        if directory_digest(directory) != registered.tags.get(DIGEST, ""):
            raise signing.other_files(registered.version)
        return signing.verify(directory, signing.verifying_key(self._settings), registered.version)

    @contextmanager
    def client(self) -> Iterator["MlflowClient"]:
        """MLflow's client, quiet and without telemetry; its errors become one line."""
        os.environ.update(TELEMETRY_OFF | {"MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"})
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")  # the default keeps one waiting 4 minutes
        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")
        import mlflow
        from mlflow.exceptions import MlflowException

        for logger in map(logging.getLogger, ("alembic", "mlflow")):
            if logger.level != logging.ERROR:  # setting it empties the caches of all loggers
                logger.setLevel(logging.ERROR)
        uri = self._settings.tracking_uri
        (self._settings.root / "mlflow").mkdir(parents=True, exist_ok=True)
        try:
            mlflow.set_tracking_uri(uri)
            mlflow.set_registry_uri(uri)
            # Two first calls at once would both create the tables.
            with FileLock(self._settings.root / "mlflow" / ".create.lock"):
                client = mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)
            yield client
        except MlflowException as error:
            line = str(error).strip().splitlines()[0][:300]
            raise EvergreenError(f"MLflow at {uri} says: {line}", "Check EVERGREEN_MLFLOW_TRACKING_URI") from error

    def _aliases(self, client: "MlflowClient") -> dict[str, str]:
        from mlflow.exceptions import MlflowException

        try:
            found = client.get_registered_model(self._name).aliases
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return {}
            raise
        return {alias: str(version) for alias, version in found.items()}

    def _by_run_key(self, client: "MlflowClient", run_key: str) -> Version | None:
        found = client.search_model_versions(f"name='{self._name}' and tags.{RUN_KEY}='{run_key}'")
        versions = [_version(v, self._aliases(client)) for v in found]
        return min(versions, key=lambda v: int(v.version), default=None)

    def _create_model(self, client: "MlflowClient") -> None:
        from mlflow.exceptions import MlflowException

        try:
            client.create_registered_model(self._name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise

    def experiment(self, client: "MlflowClient", name: str) -> str:
        """The id of an experiment, made at the first call."""
        from serving import mlflow_runs

        return mlflow_runs.experiment(client, name, self._artifact_location(name))

    def _artifact_location(self, experiment: str) -> str | None:
        """Where an experiment keeps files: under the home on a laptop, where the server says otherwise."""
        if self._settings.tracking_uri.startswith("http"):
            return None
        return str(self._settings.mlflow_artifacts / experiment)


def _version(found: Any, aliases: Mapping[str, str]) -> Version:
    return Version(
        version=str(found.version),
        tags=dict(found.tags),
        aliases=tuple(sorted(a for a, v in aliases.items() if v == str(found.version))),
        created=datetime.fromtimestamp(found.creation_timestamp / 1000, UTC),
        run_id=found.run_id or "",
    )
