"""Whether a challenger may have more users: portions of evidence in, one of three outcomes out.

The judge is a pure function of the evidence it has seen. It may be asked after every portion: its statistics are valid
at all times (`sequential.py`), its thresholds and error budget stand in `judge_rules.py`. What an earlier stage has
shown stays shown unless later evidence turns it, because the sums go on; missing data never counts as success.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from serving.evidence import Evidence
from serving.judge_facts import Facts
from serving.judge_rules import Finding, Guardrails, Outcome, findings, homefeed, laptop
from serving.sequential import pack, unpack

__all__ = ["Finding", "Guardrails", "Judge", "Judgement", "Outcome", "homefeed", "laptop"]


@dataclass(frozen=True)
class Judgement:
    """The outcome of one look.

    Attributes:
        outcome: `pass`: the stage is done; `fail`: harm is shown; `inconclusive`: more evidence is needed.
        rule: The rule that decided; empty when all passed.
        reason: In words.
        findings: What every rule found.
        exhausted: Inconclusive, and no more looks are left at this stage: the challenger goes back.
    """

    outcome: Outcome
    rule: str
    reason: str
    findings: tuple[Finding, ...] = ()
    exhausted: bool = False


class Judge:
    """Judges one rollout.

    Args:
        rules: The guardrails.
        first: There is no champion to compare with.
    """

    def __init__(self, rules: Guardrails, first: bool = False) -> None:
        self.rules = rules
        self.first = first
        self._facts = Facts()
        self._percent = -1
        self._looks = 0

    def look(self, evidence: Evidence) -> Judgement:
        """Add one portion to what is known and decide about the stage it comes from."""
        if evidence.percent != self._percent:
            self._percent, self._looks = evidence.percent, 0
            self._facts.open_stage()
        self._looks += 1
        self._facts.add(evidence, self.rules.error_ratio, self.rules.margins, self.first)
        found = findings(self._facts, self.rules, self._percent, self.first)
        problems = [p for p in (*evidence.challenger.problems, *evidence.pairs.problems) if p]
        failed = next((f for f in found if f.outcome == "fail"), None)
        if failed:
            return Judgement("fail", failed.rule, ": ".join([failed.text, *problems[:1]]), found)
        open_ = [f for f in found if f.demanded and f.outcome == "inconclusive"]
        if not open_:
            return Judgement("pass", "", f"all {len(found)} rules pass, {self._facts.stage} requests", found)
        exhausted = self._looks >= self.rules.looks
        reason = "; ".join(f.text for f in open_[:3])
        reason = f"not shown within {self._looks} looks: {reason}" if exhausted else reason
        return Judgement("inconclusive", open_[0].rule, ": ".join([reason, *problems[:1]]), found, exhausted)

    def to_json(self) -> str:
        """All that is known, as JSON text: write it down with every transition, and no look is taken twice."""
        state = {"percent": self._percent, "looks": self._looks, "facts": pack(self._facts)}
        return json.dumps({"rules": asdict(self.rules), "first": self.first} | state)

    @classmethod
    def from_json(cls, text: str) -> "Judge":
        """The judge that wrote it, with its guardrails."""
        state: Mapping[str, Any] = json.loads(text)
        rules: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in state["rules"].items()}
        judge = cls(Guardrails(**rules), state["first"])
        judge._facts = unpack(judge._facts, state["facts"])
        judge._percent, judge._looks = state["percent"], state["looks"]
        return judge
