"""The graphs as KFP intermediate representation (IR) YAML, for a cluster and for `kubectl`."""

from pathlib import Path


def compile_all(out: Path) -> list[Path]:
    """Compile every pipeline into `out`; returns the files, byte-identical for identical source."""
    from kfp import compiler

    from pipelines.monitor import monitor
    from pipelines.refresh import refresh
    from pipelines.retrain import retrain
    from pipelines.rollout import rollout
    from pipelines.slot import slot

    out.mkdir(parents=True, exist_ok=True)
    files = []
    for name, pipeline in (
        ("retrain", retrain),
        ("slot", slot),
        ("rollout", rollout),
        ("monitor", monitor),
        ("refresh", refresh),
    ):
        path = out / f"{name}.yaml"
        compiler.Compiler().compile(pipeline, str(path))
        files.append(path)
    return files
