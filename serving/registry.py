"""The registry of models: MLflow, spoken to directly on SQLite or through a server, both by the same calls.

A version is registered once for each run key, carries its lineage as tags, and is never unpickled. Three
aliases tell its standing: `challenger` (may be rolled out), `champion` (serves), `previous` (served before;
where a rollback goes).
"""

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from engagement.errors import EvergreenError
from evergreen.settings import TELEMETRY_OFF, Settings
from serving.files import directory_digest

if TYPE_CHECKING:
    from mlflow import MlflowClient

CHALLENGER, CHAMPION, PREVIOUS = "challenger", "champion", "previous"
RUN_KEY = "run_key"  # tag: names the run by its inputs
DIGEST = "bundle_digest"  # tag: what `fetch` compares the files with
GATE = "gate"  # tag: the gate's verdict; `hold` keeps a version from becoming challenger
UPDATES = "updates"  # tag: updates since a training from scratch
ROLLOUT = "rollout"  # tag: how its last rollout ended


@dataclass(frozen=True)
class Version:
    """One registered version with its tags and aliases."""

    version: str
    tags: Mapping[str, str]
    aliases: tuple[str, ...]
    created: datetime
    run_id: str


@dataclass(frozen=True)
class DatasetRef:
    """Data that a model was made from, as MLflow shows it.

    Attributes:
        name: Name of the dataset.
        digest: Digest of the snapshot (MLflow keeps 36 characters).
        source: Where it lies, for people.
        context: What it was used for, e.g. `training`.
    """

    name: str
    digest: str
    source: str
    context: str = "training"


class Registry:
    """The registry of one home.

    Args:
        settings: The home; `settings.tracking_uri` says where MLflow is.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._name = settings.model_name

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
        with self._client() as client, FileLock(self._settings.root / "mlflow" / ".register.lock"):
            from serving import mlflow_runs

            version = self._by_run_key(client, run_key)
            if version is None:
                tags = dict(tags or {}) | {RUN_KEY: run_key, DIGEST: directory_digest(bundle)}
                location = self._artifact_location(experiment)
                run = mlflow_runs.open_run(client, experiment, location, run_key, dict(params or {}))
                mlflow_runs.log(client, run, dict(metrics or {}), tags, datasets, artifacts)
                source = mlflow_runs.log_bundle(client, run, bundle, tags[DIGEST])
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
        with self._client() as client:
            aliases = self._aliases(client)
            if str(version) not in (aliases.get(CHAMPION), aliases.get(CHALLENGER)):
                client.set_registered_model_alias(self._name, CHALLENGER, str(version))

    def aliases(self) -> dict[str, str]:
        """Version by alias; empty before the first registration."""
        with self._client() as client:
            return self._aliases(client)

    def champion(self) -> Version | None:
        """The version that serves, if any."""
        version = self.aliases().get(CHAMPION)
        return self.get(version) if version else None

    def get(self, version: str) -> Version:
        """One version.

        Raises:
            EvergreenError: It is not registered.
        """
        for known in self.versions():
            if known.version == str(version):
                return known
        raise EvergreenError(f"version {version} is not registered", "See `evergreen status` for those that are")

    def versions(self) -> list[Version]:
        """All versions, newest first."""
        with self._client() as client:
            aliases = self._aliases(client)
            # A search leaves the aliases out, whatever the field says.
            found = client.search_model_versions(f"name='{self._name}'")
            versions = [_version(v, aliases) for v in found]
            return sorted(versions, key=lambda v: int(v.version), reverse=True)

    def fetch(self, version: str, dest: Path | None = None) -> Path:
        """Bring a version's bundle here and verify it.

        Args:
            version: The version.
            dest: Directory to make; default: its place under `settings.serving`.

        Returns:
            The directory. One that is there and intact is not fetched again.

        Raises:
            EvergreenError: The version is unknown, or its files are not those that were registered.
        """
        directory = dest or self._settings.serving / "models" / str(version)
        wanted = self.get(version).tags.get(DIGEST, "")
        if directory.is_dir() and directory_digest(directory) == wanted:
            return directory
        directory.parent.mkdir(parents=True, exist_ok=True)
        with self._client(), tempfile.TemporaryDirectory(dir=directory.parent, prefix=".fetching-") as room:
            import mlflow

            uri = f"models:/{self._name}/{version}/artifacts/bundle"
            got = Path(mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=room))
            if directory_digest(got) != wanted:
                raise EvergreenError(
                    f"the files of version {version} are not those that were registered (digest differs)",
                    "Do not serve it; register the model again from its run",
                )
            shutil.rmtree(directory, ignore_errors=True)
            got.replace(directory)
        return directory

    def promote(self, version: str) -> None:
        """Make a version champion and the champion before it `previous`. Nothing changes if it is champion.

        Raises:
            EvergreenError: It is not registered.
        """
        self.get(version)
        with self._client() as client:
            aliases = self._aliases(client)
            champion = aliases.get(CHAMPION)
            if champion != str(version):
                # `previous` first: killed in between, the champion is its own previous one, and the next
                # call mends it.
                if champion:
                    client.set_registered_model_alias(self._name, PREVIOUS, champion)
                client.set_registered_model_alias(self._name, CHAMPION, str(version))
            if aliases.get(CHALLENGER) == str(version):
                client.delete_registered_model_alias(self._name, CHALLENGER)

    def rollback(self) -> str:
        """Make the previous champion champion again; the alias `previous` is used up by it.

        Returns:
            The version that is champion now.

        Raises:
            EvergreenError: There is no previous champion.
        """
        with self._client() as client:
            aliases = self._aliases(client)
            previous = aliases.get(PREVIOUS)
            if previous is None:
                raise EvergreenError("there is no previous champion to go back to", "Use `evergreen promote VERSION`")
            champion = aliases.get(CHAMPION)
            if champion and champion != previous:
                client.set_model_version_tag(self._name, champion, ROLLOUT, "rolled_back: by hand")
                client.set_registered_model_alias(self._name, CHAMPION, previous)
            client.delete_registered_model_alias(self._name, PREVIOUS)
            return previous

    def reject(self, version: str, reason: str) -> None:
        """Write on a version why its rollout came back, and take the alias `challenger` from it."""
        self.tag(version, ROLLOUT, f"rolled_back: {reason}")
        with self._client() as client:
            if self._aliases(client).get(CHALLENGER) == str(version):
                client.delete_registered_model_alias(self._name, CHALLENGER)

    def tag(self, version: str, key: str, value: str) -> None:
        """Set a tag of a version."""
        with self._client() as client:
            client.set_model_version_tag(self._name, str(version), key, value[:5000])

    @contextmanager
    def _client(self) -> Iterator["MlflowClient"]:
        """MLflow's client, quiet and without telemetry; its errors become one line."""
        os.environ.update(TELEMETRY_OFF | {"MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"})
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")  # the default keeps one waiting 4 minutes
        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")
        import mlflow
        from mlflow.exceptions import MlflowException

        for name in ("alembic", "mlflow"):
            logging.getLogger(name).setLevel(logging.ERROR)
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
