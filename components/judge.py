"""Step 4: the gate. Each contender against the champion on the same later requests; one of them goes on."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kfp import dsl

from components.base import step
from components.plan import Plan
from components.train import origin
from engagement.table import RankingTable

if TYPE_CHECKING:
    from model.bundle import Bundle
    from model.gate import Verdict


def judge_bundles(evidence: RankingTable, challenger: "Bundle", champion: "Bundle | None", seed: int) -> "Verdict":
    """Measure both models on the evidence requests and apply the gate's rules."""
    from model.gate import judge
    from model.gate_evidence import gather

    return judge(gather(evidence, challenger, champion, seed))


@dataclass(frozen=True)
class Judged:
    """A contender before the gate.

    Attributes:
        origin: `update` or `scratch`.
        directory: Its bundle.
        verdict: The gate's, against the champion.
    """

    origin: str
    directory: Path
    verdict: "Verdict"

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data: the verdict's, with the origin as `chosen`."""
        return {**self.verdict.to_json(), "chosen": self.origin}


def judge_contenders(
    plan: Plan, evidence: RankingTable, directories: Sequence[Path], champion: "Bundle | None"
) -> list[Judged]:
    """Judge each contender against the champion; the chosen one is first.

    Chosen is the one that passes; if both do, the better on the primary action's HIT@3; if neither, the update.

    Args:
        plan: The run.
        evidence: Requests later than anything that any of the models was trained on.
        directories: Bundles of the contenders, the update's first.
        champion: The champion.
    """
    from model.bundle import Bundle

    judged = []
    for directory in directories:
        bundle = Bundle.load(directory)
        verdict = judge_bundles(evidence, bundle, champion, plan.seed)
        judged.append(Judged(origin(bundle), directory, verdict))
    return in_order(judged)


def in_order(judged: Sequence[Judged]) -> list[Judged]:
    """The chosen one first; of equals, the earlier one stays first."""
    return sorted(judged, key=_rank)


def _rank(judged: Judged) -> tuple[bool, float]:
    verdict = judged.verdict
    if verdict.verdict != "promote":
        return True, 0.0
    return False, -verdict.metrics["challenger"]["hit3"][verdict.primary_action]


def evidence_of(judged: Sequence[Judged]) -> dict[str, Any]:
    """The evidence as JSON data: the chosen contender's, and under `rival` the other one's or None."""
    chosen, *others = judged
    return {**chosen.to_json(), "rival": others[0].to_json() if others else None}


def report_of(plan: Plan, judged: Sequence[Judged]) -> str:
    """The evidence as a page; with two contenders, one part each."""
    chosen, *others = judged
    if not others:
        return chosen.verdict.to_markdown()
    head = f"Two contenders, for one from scratch was wanted: {plan.also_scratch}. Chosen: {chosen.origin}.\n"
    return "\n".join([head, *(f"**{j.origin}**\n\n{j.verdict.to_markdown()}" for j in judged)])


@step
def judge_challenger(
    plan: str,
    table: dsl.Input[dsl.Dataset],
    bundle: dsl.Input[dsl.Model],
    rival: dsl.Input[dsl.Model],
    evidence: dsl.Output[dsl.Artifact],
    report: dsl.Output[dsl.Markdown],
    chosen: dsl.Output[dsl.Model],
) -> str:
    """Judge the challenger, and the rival where there is one; returns `promote` or `hold` of the one it chose."""
    import json
    import shutil
    from pathlib import Path

    from components.base import begin, tell
    from components.judge import evidence_of, judge_contenders, report_of
    from components.plan import Plan
    from components.train import champion_bundle, split
    from engagement.files import write_text
    from engagement.table import RankingTable
    from model.bundle import CARD, Bundle
    from model.export import export
    from model.served import SERVED

    settings, p = begin(), Plan.from_json(plan)
    whole = RankingTable.load(Path(table.path))
    _, later = split(p, whole)
    tell(f"judging on {later.requests} requests")
    # An object store knows no empty directory: where there is no rival, its path may not exist.
    contenders = [d for d in (Path(bundle.path), Path(rival.path)) if (d / CARD).exists()]
    judged = judge_contenders(p, later, contenders, champion_bundle(settings, p))
    shutil.copytree(judged[0].directory, chosen.path, dirs_exist_ok=True)
    # Here and not in the training: one of two contenders is served, and what it exports is registered with it.
    tell("exporting the chosen model")
    export(Bundle.load(Path(chosen.path)), whole, Path(chosen.path) / SERVED)
    chosen.metadata.update(run_key=p.run_key, origin=judged[0].origin)
    run, text, page = p.directory(settings), json.dumps(evidence_of(judged), indent=1), report_of(p, judged)
    for path, content in (
        (run / "gate.json", text),
        (run / "gate.md", page),
        (Path(evidence.path), text),
        (Path(report.path), page),
    ):
        write_text(path, content)
    return judged[0].verdict.verdict
