"""Step 6: the challenger in MLflow, with its evidence and its lineage."""

from kfp import dsl

from components.base import step


@step
def register_model(
    plan: str,
    bundle: dsl.Input[dsl.Model],
    evidence: dsl.Input[dsl.Artifact],
    report: dsl.Input[dsl.Markdown],
    drift: dsl.Input[dsl.Artifact],
) -> str:
    """Register the challenger once, whatever the verdict; returns its version."""
    from components.base import begin
    from components.plan import Plan, write_once
    from components.register import register

    settings, p = begin(), Plan.from_json(plan)
    version = register(settings, p, bundle.path, [evidence.path, report.path, drift.path])
    write_once(p.directory(settings) / "version.txt", version)
    return version
