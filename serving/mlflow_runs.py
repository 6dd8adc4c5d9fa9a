"""The MLflow run behind a registered version: opened or taken up again, filled, closed.

Every step looks first at what is there, so that a run that was killed at any point is completed and not
doubled.
"""

import shutil
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version as installed
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serving.files import SEAL

if TYPE_CHECKING:
    from mlflow import MlflowClient

CODE = Path(__file__).with_name("mlflow_model.py")
# Given by hand: MLflow would find them by starting the model in another process, for ten seconds and more.
REQUIREMENTS = ("torch", "numpy", "pandas", "pyarrow", "safetensors", "xxhash", "mlflow")


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


def experiment(client: "MlflowClient", name: str, location: str | None) -> str:
    """The id of an experiment, made at the first call."""
    found = client.get_experiment_by_name(name)
    return found.experiment_id if found else client.create_experiment(name, artifact_location=location)


def open_run(client: "MlflowClient", name: str, location: str | None, run_key: str, params: dict[str, Any]) -> str:
    """The run of this key in that experiment: a new one, or the unfinished one of a killed call; returns its id."""
    experiment_id = experiment(client, name, location)
    wanted = {key: str(value) for key, value in params.items()}
    for run in client.search_runs([experiment_id], f"tags.run_key = '{run_key}'", order_by=["attribute.start_time"]):
        written = run.data.params
        # Parameters are written once; a run that says something else is another run's half.
        if all(wanted.get(key) == value for key, value in written.items()):
            client.update_run(run.info.run_id, "RUNNING")
            break
        client.set_terminated(run.info.run_id, "FAILED")
    else:
        run, written = client.create_run(experiment_id, tags={"run_key": run_key}, run_name=run_key), {}
    for key in wanted.keys() - written.keys():
        client.log_param(run.info.run_id, key, wanted[key])
    return run.info.run_id


def log(
    client: "MlflowClient",
    run_id: str,
    metrics: dict[str, float],
    tags: dict[str, str],
    datasets: Sequence[DatasetRef],
    artifacts: Sequence[Path],
) -> None:
    """Put metrics, tags, datasets and files on a run, each once."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    run = client.get_run(run_id)
    for key, value in tags.items():
        client.set_tag(run_id, key, value)
    for key in metrics.keys() - run.data.metrics.keys():
        client.log_metric(run_id, key, float(metrics[key]))
    known = {(i.dataset.name, i.dataset.digest) for i in (run.inputs.dataset_inputs if run.inputs else [])}
    inputs = [
        DatasetInput(
            Dataset(d.name, d.digest[:36], source_type="local", source=f'{{"uri": "{d.source}"}}'),
            [InputTag("mlflow.data.context", d.context)],
        )
        for d in datasets
        if (d.name, d.digest[:36]) not in known
    ]
    if inputs:
        client.log_inputs(run_id, inputs)
    for path in artifacts:
        client.log_artifact(run_id, str(path))


def log_bundle(client: "MlflowClient", run_id: str, bundle: Path, digest: str, seal: Callable[[Path], None]) -> str:
    """Log the bundle, sealed, as a model without pickle; returns its URI. One that is complete is used again."""
    import mlflow

    experiment_id = client.get_run(run_id).info.experiment_id
    known = client.search_logged_models([experiment_id], filter_string=f"source_run_id = '{run_id}'")
    for model in known:
        if str(model.status) == "READY" and model.tags.get("bundle_digest") == digest:
            return f"models:/{model.model_id}"
    with tempfile.TemporaryDirectory() as room, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice on type hints and input examples
        staged = Path(room) / "bundle"  # MLflow names the artifact after the directory
        shutil.copytree(bundle, staged, ignore=shutil.ignore_patterns(*SEAL))
        seal(staged)
        with mlflow.start_run(run_id=run_id, nested=mlflow.active_run() is not None):
            logged = mlflow.pyfunc.log_model(
                name="ranker",
                python_model=str(CODE),
                artifacts={"bundle": str(staged)},
                signature=_signature(bundle),
                pip_requirements=[f"{name}=={installed(name).split('+')[0]}" for name in REQUIREMENTS],
                tags={"bundle_digest": digest},
            )
    return logged.model_uri


def log_files(client: "MlflowClient", run_id: str, bundle: Path, names: Sequence[str]) -> None:
    """Add files and directories of a bundle to the models of its run, which were logged without them."""
    experiment_id = client.get_run(run_id).info.experiment_id
    for model in client.search_logged_models([experiment_id], filter_string=f"source_run_id = '{run_id}'"):
        with tempfile.TemporaryDirectory() as room:
            staged = Path(room) / "artifacts" / "bundle"
            staged.mkdir(parents=True)
            for name in names:
                whole = bundle / name
                shutil.copytree(whole, staged / name) if whole.is_dir() else shutil.copy(whole, staged)
            client.log_model_artifacts(model.model_id, room)


def close_run(client: "MlflowClient", run_id: str) -> None:
    """Mark the run as finished."""
    if run_id and client.get_run(run_id).info.status != "FINISHED":
        client.set_terminated(run_id, "FINISHED")


def _signature(bundle: Path) -> Any:
    """Input is a table's directory; the features that the table must hold are named beside it, as optional columns."""
    from mlflow.models import ModelSignature
    from mlflow.types.schema import Array, ColSpec, DataType, Schema

    from model.bundle import Bundle

    spec = Bundle.load(bundle).spec
    kinds: dict[str, Any] = {
        "categorical": DataType.string,
        "categories": Array(DataType.string),
        "numeric": DataType.double,
        "embedding": Array(DataType.float),
    }
    inputs: list[Any] = [
        ColSpec("string", "table"),
        *(ColSpec(kinds[f.kind], f.name, required=False) for f in spec.features),
    ]
    columns = [("string", "request_id"), ("string", "item_id"), *(("double", action) for action in spec.actions)]
    return ModelSignature(inputs=Schema(inputs), outputs=Schema([ColSpec(kind, name) for kind, name in columns]))
