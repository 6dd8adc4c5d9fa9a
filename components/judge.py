"""Step 4: the gate. Challenger against champion on the same later requests."""

from kfp import dsl

from components.base import step
from components.plan import Plan
from engagement.table import RankingTable
from model.bundle import Bundle
from model.gate import Verdict, judge
from model.predict import score


def judge_bundles(plan: Plan, evidence: RankingTable, challenger: Bundle, champion: Bundle | None) -> Verdict:
    """Score the evidence requests with both models and apply the gate's rules."""
    before = score(champion, evidence) if champion else None
    return judge(evidence, score(challenger, evidence), before, seed=plan.seed)


@step
def judge_challenger(
    plan: str,
    table: dsl.Input[dsl.Dataset],
    bundle: dsl.Input[dsl.Model],
    evidence: dsl.Output[dsl.Artifact],
    report: dsl.Output[dsl.Markdown],
) -> str:
    """Judge the challenger; returns `promote` or `hold`."""
    import json
    from pathlib import Path

    from components.base import begin, tell
    from components.judge import judge_bundles
    from components.plan import Plan
    from components.train import champion_bundle, split
    from engagement.files import write_text
    from engagement.table import RankingTable
    from model.bundle import Bundle

    settings, p = begin(), Plan.from_json(plan)
    _, later = split(p, RankingTable.load(Path(table.path)))
    tell(f"judging on {later.requests} requests")
    verdict = judge_bundles(p, later, Bundle.load(Path(bundle.path)), champion_bundle(settings, p))
    run, text = p.directory(settings), json.dumps(verdict.to_json(), indent=1)
    for path, content in (
        (run / "gate.json", text),
        (run / "gate.md", verdict.to_markdown()),
        (Path(evidence.path), text),
        (Path(report.path), verdict.to_markdown()),
    ):
        write_text(path, content)
    return verdict.verdict
