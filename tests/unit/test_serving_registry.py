"""The registry on a real MLflow: once a run key, verified files, aliases that tell the truth."""

import shutil
from pathlib import Path

import pytest

from engagement.errors import EvergreenError
from evergreen.settings import Settings
from serving import mlflow_runs
from serving.agreement import Order
from serving.earlier import sign
from serving.files import SEAL
from serving.mlflow_runs import DatasetRef
from serving.promoter_rules import obstacle
from serving.registry import ROLLOUT, NotRegistered, Registry
from tests.serving_lab import ACTIONS, small_table, write_bundle


@pytest.fixture(scope="module")
def bundles(tmp_path_factory) -> list[Path]:
    root = tmp_path_factory.mktemp("bundles")
    return [write_bundle(root / str(seed), small_table(), seed) for seed in range(3)]


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> Path:
    """An empty registry; a copy is quicker than making the tables."""
    home = tmp_path_factory.mktemp("template")
    Registry(Settings(home=home)).aliases()
    return home


@pytest.fixture
def registry(template, tmp_path) -> Registry:
    shutil.copytree(template, tmp_path / "home")
    return Registry(Settings(home=tmp_path / "home"))


def details(tmp_path: Path) -> dict:
    report = tmp_path / "gate.md"
    report.write_text("# promote")
    return {
        "params": {"strategy": "scratch", "seed": 0, "epochs": 2},
        "metrics": {"hit3_save": 0.25, "seconds": 3.5},
        "tags": {"gate": "promote", "snapshot": "abc", "parent_version": "", "as_of": "2024-01-15"},
        "datasets": [DatasetRef("synth", "d" * 64, "/data", "training")],
        "artifacts": [report],
    }


def test_registered_version_carries_its_lineage_and_its_evidence(registry, bundles, tmp_path):
    version = registry.register(bundles[0], "key-1", **details(tmp_path))
    found = registry.get(version)
    assert (version, found.aliases) == ("1", ("challenger",))
    assert found.tags["run_key"] == "key-1" and found.tags["gate"] == "promote"
    assert len(found.tags["bundle_digest"]) == 64
    with registry.client() as client:
        run = client.get_run(found.run_id)
        assert run.info.status == "FINISHED"
        assert run.data.params == {"strategy": "scratch", "seed": "0", "epochs": "2"}
        assert run.data.metrics == {"hit3_save": 0.25, "seconds": 3.5}
        assert [i.dataset.digest for i in run.inputs.dataset_inputs] == ["d" * 36]
        assert [a.path for a in client.list_artifacts(found.run_id)] == ["gate.md"]


def test_same_run_key_again_gives_the_same_version_and_adds_nothing(registry, bundles, tmp_path):
    first = registry.register(bundles[0], "key-1", **details(tmp_path))
    assert registry.register(bundles[0], "key-1", **details(tmp_path)) == first
    assert registry.register(bundles[1], "key-2", **details(tmp_path)) == "2"
    assert [v.version for v in registry.versions()] == ["2", "1"]
    assert runs(registry, "key-1") == ["FINISHED"]


def runs(registry: Registry, key: str) -> list[str]:
    with registry.client() as client:
        experiment = client.get_experiment_by_name("retrain").experiment_id
        return sorted(r.info.status for r in client.search_runs([experiment], f"tags.run_key = '{key}'"))


class Killed(BaseException):
    """Stands for `kill -9`: no handler of the code under test runs for it."""


@pytest.mark.parametrize(
    ("when", "point"),
    [("before", p) for p in ("log", "log_bundle", "create_model_version", "close_run", "alias")]
    + [("after", "log_bundle"), ("after", "alias")],
)
def test_registration_killed_anywhere_is_completed(registry, bundles, tmp_path, monkeypatch, point, when):
    import mlflow

    owner = mlflow_runs if hasattr(mlflow_runs, point) else mlflow.MlflowClient
    name = "set_registered_model_alias" if point == "alias" else point
    real = getattr(owner, name)

    def dying(*args, **kwargs):
        if when == "after":
            real(*args, **kwargs)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, dying)
        with pytest.raises(Killed):
            registry.register(bundles[0], "key-1", **details(tmp_path))
    assert registry.register(bundles[0], "key-1", **details(tmp_path)) == "1"
    assert [v.version for v in registry.versions()] == ["1"]
    assert registry.aliases() == {"challenger": "1"}
    assert runs(registry, "key-1") == ["FINISHED"]
    with registry.client() as client:
        run = registry.get("1").run_id
        assert [m.value for m in client.get_metric_history(run, "hit3_save")] == [0.25]
        models = client.search_logged_models([client.get_run(run).info.experiment_id])
        assert sum(str(m.status) == "READY" for m in models) == 1


def test_half_finished_run_with_other_parameters_is_marked_and_not_mixed_in(registry, bundles, tmp_path, monkeypatch):
    def dying(*args):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(mlflow_runs, "log", dying)
        with pytest.raises(Killed):
            registry.register(bundles[0], "key-1", params={"epochs": 99})
    registry.register(bundles[0], "key-1", **details(tmp_path))
    assert runs(registry, "key-1") == ["FAILED", "FINISHED"]
    assert len(registry.versions()) == 1


def test_version_held_by_the_gate_is_registered_and_never_challenger(registry, bundles):
    assert registry.register(bundles[0], "key-1", tags={"gate": "hold"}) == "1"
    assert registry.aliases() == {}


def test_version_that_came_back_is_not_offered_again_by_the_same_run(registry, bundles):
    registry.register(bundles[0], "key-1")
    registry.reject("1", "non-finite scores")
    assert registry.register(bundles[0], "key-1") == "1"
    assert registry.aliases() == {} and registry.get("1").tags[ROLLOUT] == "rolled_back: non-finite scores"


def test_promotion_keeps_the_champion_before_as_previous(registry, bundles):
    for i in range(3):
        registry.register(bundles[i], f"key-{i}")
    registry.promote("1")
    assert registry.aliases() == {"champion": "1", "challenger": "3"}
    registry.promote("3")
    assert registry.aliases() == {"champion": "3", "previous": "1"}
    registry.promote("3")  # again: nothing changes, above all not `previous`
    assert registry.aliases() == {"champion": "3", "previous": "1"}
    assert registry.champion().version == "3"


def test_promotion_killed_between_its_two_aliases_is_completed(registry, bundles, monkeypatch):
    import mlflow

    for i in range(2):
        registry.register(bundles[i], f"key-{i}")
    registry.promote("1")
    real = mlflow.MlflowClient.set_registered_model_alias

    def dying(client, name, alias, version):
        real(client, name, alias, version)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(mlflow.MlflowClient, "set_registered_model_alias", dying)
        with pytest.raises(Killed):
            registry.promote("2")
    assert registry.aliases()["champion"] == "1"
    registry.promote("2")
    assert registry.aliases() == {"champion": "2", "previous": "1"}


def back(registry: Registry) -> str:
    """What `evergreen rollback` does to the registry."""
    champion = registry.agreement.go_back(Order())
    registry.conform()
    return champion


def test_rollback_goes_to_the_previous_champion_once(registry, bundles):
    for i in range(2):
        registry.register(bundles[i], f"key-{i}")
    registry.promote("1")
    with pytest.raises(EvergreenError, match="no previous champion"):
        back(registry)
    registry.promote("2")
    assert back(registry) == "1"
    assert registry.aliases() == {"champion": "1"}
    assert registry.get("2").tags[ROLLOUT].startswith("rolled_back")
    with pytest.raises(EvergreenError, match="no previous champion"):
        back(registry)


def test_rollback_killed_half_way_is_completed(registry, bundles, monkeypatch):
    import mlflow

    for i in range(2):
        registry.register(bundles[i], f"key-{i}")
        registry.promote(str(i + 1))

    def dying(*args):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(mlflow.MlflowClient, "delete_registered_model_alias", dying)
        with pytest.raises(Killed):
            back(registry)
    assert back(registry) == "1" and registry.aliases() == {"champion": "1"}


def test_fetched_bundle_is_the_registered_one_and_is_fetched_once(registry, bundles, tmp_path):
    from model.bundle import Bundle

    registry.register(bundles[1], "key-1")
    directory = registry.fetch("1")
    assert Bundle.load(directory).digest == Bundle.load(bundles[1]).digest
    stamp = (directory / "bundle.json").stat().st_mtime_ns
    assert registry.fetch("1") == directory and (directory / "bundle.json").stat().st_mtime_ns == stamp
    assert registry.fetch("1", tmp_path / "elsewhere") == tmp_path / "elsewhere"


def test_champion_is_known_and_verified_while_mlflow_is_away_and_fetched_where_it_was_changed(registry, bundles):
    assert registry.served() is None
    version = registry.register(bundles[0], "k1", tags={"train_end": "2026-01-01T00:00:00+00:00"})
    registry.promote(version)
    assert registry.served().directory == registry.fetch(version)
    away = Registry(registry._settings.model_copy(update={"mlflow_tracking_uri": "http://127.0.0.1:9"}))
    assert away.served().version == version and away.served().tags["train_end"].startswith("2026-01-01")
    flip_byte(registry.served().directory / "model.safetensors")
    with pytest.raises(EvergreenError, match="MLflow at"):
        away.served()
    assert registry.served().directory == registry.fetch(version)


def flip_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_one_flipped_byte_in_the_registry_is_refused(registry, bundles, tmp_path):
    registry.register(bundles[0], "key-1")
    stored = next((tmp_path / "home" / "mlflow").rglob("model.safetensors"))
    flip_byte(stored)
    with pytest.raises(EvergreenError, match="files of version 1 are not those that were registered"):
        registry.fetch("1")
    flip_byte(stored)
    assert registry.fetch("1").is_dir()


def as_registered_by_the_last_release(registry: Registry, bundle: Path, room: Path) -> None:
    """Version 1, whose bundle was not exported and not signed."""
    plain = room / "plain"
    shutil.copytree(bundle, plain, ignore=shutil.ignore_patterns("served"))
    registry.register(plain, "key-1", tags={"gate": "promote"})
    for name in SEAL:
        next((room / "home" / "mlflow").rglob(name)).unlink()


@pytest.fixture
def with_requests(monkeypatch):
    """The bundles here need no training, so that no requests travel with them."""
    monkeypatch.setattr("model.exam.exam_of", lambda bundle: small_table())


def test_version_of_an_earlier_release_is_refused_until_it_is_signed_and_exported(
    registry, bundles, tmp_path, with_requests, monkeypatch
):
    from model.served import ServedRanker

    as_registered_by_the_last_release(registry, bundles[0], tmp_path)
    with pytest.raises(EvergreenError, match="version 1 is not signed. .*`evergreen sign 1`"):
        registry.fetch("1")
    settings = Settings(home=tmp_path / "home")
    log = mlflow_runs.log_files

    def half(client, run, bundle, names):
        log(client, run, bundle, ["served"])  # and not what is signed
        raise Killed

    def dying(*args):
        raise Killed

    for owner, name, kill in ((mlflow_runs, "log_files", half), (Registry, "tag", dying)):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(owner, name, kill)
            sign(settings, "1")
        with pytest.raises(EvergreenError):
            registry.fetch("1")
    for _ in range(2):
        sign(settings, "1")
    assert obstacle(registry.get("1").tags | {"gate.x": "pass:"}, registry.evidence("1") | {"gate.x": "pass:"}) == ""
    assert ServedRanker.load(registry.fetch("1") / "served").spec == small_table().spec


def test_changed_version_of_an_earlier_release_is_not_signed(registry, bundles, tmp_path, with_requests):
    as_registered_by_the_last_release(registry, bundles[0], tmp_path)
    flip_byte(next((tmp_path / "home" / "mlflow").rglob("model.safetensors")))
    with pytest.raises(EvergreenError, match="files of version 1 are not those that were registered"):
        sign(Settings(home=tmp_path / "home"), "1")
    assert not list((tmp_path / "home" / "mlflow").rglob(SEAL[0]))


def delete(registry: Registry, version: str) -> None:
    with registry.client() as client:
        client.delete_model_version("homefeed-ranker", version)


def test_deleted_version_serves_on_if_it_is_champion_and_no_other_does(registry, bundles):
    for i in range(2):
        registry.register(bundles[i], f"key-{i}", tags={"train_end": f"{i}"})
    for version in ("1", "2"):
        registry.fetch(version)
        delete(registry, version) if version == "2" else registry.promote(version)
    delete(registry, "1")
    assert registry.evidence("1")["train_end"] == "0"
    for unknown in ("2", "../models/1"):
        with pytest.raises(NotRegistered):
            registry.fetch(unknown)
    flip_byte(registry.fetch("1") / "model.safetensors")
    with pytest.raises(EvergreenError, match="signature of version 1 is not valid"):
        registry.fetch("1")


def test_aliases_conform_around_deleted_versions(registry, bundles):
    for i in range(3):
        registry.register(bundles[i], f"key-{i}")
        registry.promote(str(i + 1))
    registry.agreement.go_back(Order())
    delete(registry, "3")  # which the rollback was to be told on
    registry.conform()
    assert registry.aliases() == {"champion": "2"} and registry.agreement.shown
    delete(registry, "2")
    registry.promote("1")
    assert registry.aliases() == {"champion": "1"} and registry.agreed().previous == "2"


def test_signature_by_another_key_is_refused(registry, bundles, tmp_path):
    registry.register(bundles[0], "key-1")
    for name in ("signing.pem", "verifying.pem"):
        (tmp_path / "home" / "keys" / name).unlink()
    with pytest.raises(EvergreenError, match="signature of version 1 is not valid: Key mismatch"):
        registry.fetch("1")


@pytest.mark.parametrize("damage", ["flip", "extra", "missing"])
def test_damaged_copy_is_fetched_again(registry, bundles, damage):
    registry.register(bundles[0], "key-1")
    directory = registry.fetch("1")
    if damage == "flip":
        flip_byte(directory / "model.safetensors")
    elif damage == "extra":
        (directory / "extra").write_text("x")
    else:
        (directory / "bundle.json").unlink()
    assert registry.fetch("1") == directory
    assert {p.name for p in directory.iterdir()} == {p.name for p in bundles[0].iterdir()} | set(SEAL)
    assert (directory / "model.safetensors").read_bytes() == (bundles[0] / "model.safetensors").read_bytes()


def test_unknown_version_and_missing_bundle_are_one_clear_line(registry, tmp_path):
    for call in (registry.get, registry.fetch, registry.promote):
        with pytest.raises(EvergreenError, match="version 7 is not registered"):
            call("7")
    with pytest.raises(EvergreenError, match="there is no bundle"):
        registry.register(tmp_path / "nowhere", "key-1")
    assert registry.aliases() == {} and registry.champion() is None and registry.versions() == []


def test_unreachable_server_is_one_clear_line(tmp_path, monkeypatch):
    from serving.processes import free_port

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    uri = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(EvergreenError, match=f"MLflow at {uri}") as caught:
        Registry(Settings(home=tmp_path, mlflow_tracking_uri=uri)).aliases()
    assert "\n" not in str(caught.value)


def test_champion_loads_through_mlflow_without_pickle_and_scores_a_table(registry, bundles, tmp_path, monkeypatch):
    import mlflow
    import numpy as np
    import pandas as pd

    from model.bundle import Bundle
    from model.predict import score

    registry.register(bundles[2], "key-1")
    registry.promote("1")
    table = small_table()
    table.save(tmp_path / "table")
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    loaded = mlflow.pyfunc.load_model("models:/homefeed-ranker@champion")
    frame = loaded.predict(pd.DataFrame({"table": [str(tmp_path / "table")]}))
    assert list(frame.columns) == ["request_id", "item_id", *ACTIONS]
    assert list(frame["item_id"]) == [i.decode() for i in table.item_id]
    np.testing.assert_allclose(frame[list(ACTIONS)], score(Bundle.load(bundles[2]), table), atol=1e-6)
    names = loaded.metadata.signature.inputs.input_names()
    assert names == ["table", *(f.name for f in table.spec.features)]  # one more for a version that knows one more
    assert not list((tmp_path / "home" / "mlflow").rglob("*.pkl"))


def test_nothing_is_written_outside_the_home(registry, bundles, tmp_path, monkeypatch):
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    registry.register(bundles[0], "key-1")
    registry.promote("1")
    assert list((tmp_path / "cwd").iterdir()) == []
