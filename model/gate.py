"""The gate: challenger against champion on the same later requests, rule by rule, with its evidence."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from engagement.table import RankingTable, TableSpec
from model import gate_rules as rules
from model.bootstrap import interval, resample_means
from model.metrics import Hits, hit3, hits, random_hit3, ranking_score


@dataclass(frozen=True)
class RuleOutcome:
    """One rule applied.

    Attributes:
        rule: Name.
        passed: Whether it lets the challenger through.
        told: One sentence with the numbers.
    """

    rule: str
    passed: bool
    told: str


@dataclass(frozen=True)
class Verdict:
    """The gate's decision and everything that it rests on.

    Attributes:
        verdict: `promote` or `hold`.
        reason: One sentence: the rule that held it, or why it may go.
        requests: Requests that were compared.
        skipped_requests: Requests left out, having three candidates or fewer.
        primary_action: The action that HIT@3 is mainly about.
        metrics: `hit3` and `interval` by action for `champion` (None without one), `challenger`; `hit3` of `random`.
        difference: Relative difference challenger against champion by action: `value`, `interval`; None without one.
        rules: Every rule applied, in order; the first that fails holds the challenger.
    """

    verdict: Literal["promote", "hold"]
    reason: str
    requests: int
    skipped_requests: int
    primary_action: str
    metrics: dict[str, Any]
    difference: dict[str, Any] | None
    rules: tuple[RuleOutcome, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data; a number that could not be measured is null."""
        data: dict[str, Any] = _plain(asdict(self))
        return data

    def to_markdown(self) -> str:
        """The evidence as a page for KFP and MLflow."""
        lines = [
            f"# {self.verdict}",
            "",
            self.reason,
            "",
            f"{self.requests} requests compared, {self.skipped_requests} left out.",
            "",
        ]
        lines += ["| action | champion | challenger | relative difference |", "|---|---|---|---|"]
        for action in self.metrics["challenger"]["hit3"]:
            change = _change(self.difference[action]) if self.difference else "–"
            before, after = (_cell(self.metrics[who], action) for who in ("champion", "challenger"))
            lines.append(f"| {action} | {before} | {after} | {change} |")
        lines += ["", "| rule | passed | |", "|---|---|---|"]
        lines += [f"| {r.rule} | {'yes' if r.passed else '**no**'} | {r.told} |" for r in self.rules]
        return "\n".join(lines) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def judge(table: RankingTable, challenger: np.ndarray, champion: np.ndarray | None, seed: int) -> Verdict:
    """Judge the challenger.

    Args:
        table: Requests later than anything that either model was trained on.
        challenger: (N, A) its probabilities.
        champion: (N, A) the champion's on the same rows; None if there is none.
        seed: Seed of the bootstrap.
    """
    after = hits(table, np.nan_to_num(challenger, nan=-1.0))
    before = None if champion is None else hits(table, champion)
    metrics: dict[str, Any] = {"champion": None, "challenger": None, "random": {"hit3": random_hit3(after)}}
    difference, above_random = None, (np.nan, np.nan)
    if len(after.requests):
        stacked = [after.hits_QA, after.expected_QA] + ([before.hits_QA] if before else [])
        drawn = np.split(resample_means(np.hstack(stacked), after.user, rules.RESAMPLES, seed), len(stacked), axis=1)
        primary = table.spec.actions.index(table.spec.primary_action)
        above_random = interval((drawn[0] - drawn[1])[:, primary], rules.CONFIDENCE)
        metrics["challenger"] = _measured(after, drawn[0])
        if before:
            metrics["champion"] = _measured(before, drawn[2])
            difference = _differences(after, before, drawn[0], drawn[2])
    else:
        metrics["challenger"] = {"hit3": hit3(after), "interval": {a: [np.nan, np.nan] for a in after.actions}}
    outcomes = _apply(table.spec, challenger, after, above_random, difference)
    failed = next((r for r in outcomes if not r.passed), None)
    return Verdict(
        verdict="hold" if failed else "promote",
        reason=failed.told if failed else _why_promoted(difference, table.spec.primary_action, len(after.requests)),
        requests=len(after.requests),
        skipped_requests=after.skipped,
        primary_action=table.spec.primary_action,
        metrics=metrics,
        difference=difference,
        rules=outcomes,
    )


def _measured(h: Hits, drawn_BA: np.ndarray) -> dict[str, Any]:
    bounds = {a: list(interval(drawn_BA[:, i], rules.CONFIDENCE)) for i, a in enumerate(h.actions)}
    return {"hit3": hit3(h), "interval": bounds}


def _differences(after: Hits, before: Hits, after_BA: np.ndarray, before_BA: np.ndarray) -> dict[str, Any]:
    """Relative to the champion's measured value, which is held fixed: a resample's own could be near zero."""
    found = {}
    for i, action in enumerate(after.actions):
        base = hit3(before)[action] or 1.0
        bounds = interval((after_BA - before_BA)[:, i] / base, rules.CONFIDENCE)
        found[action] = {"value": (hit3(after)[action] - hit3(before)[action]) / base, "interval": list(bounds)}
    return found


def _apply(
    spec: TableSpec,
    scores: np.ndarray,
    after: Hits,
    above_random: tuple[float, float],
    difference: dict[str, Any] | None,
) -> tuple[RuleOutcome, ...]:
    """The rules in order; later ones are left out once the numbers that they need are missing."""
    primary = f"HIT@3/{spec.primary_action}"
    outcomes = [_finite(spec, scores), _enough(after)]
    if all(r.passed for r in outcomes):
        outcomes.append(
            RuleOutcome(
                "floor",
                rules.above_random(above_random[1]),
                f"{primary} minus that of a random order lies in [{above_random[0]:+.3f}, {above_random[1]:+.3f}]",
            )
        )
        if difference:
            outcomes.append(_not_worse(primary, difference[spec.primary_action]))
            outcomes += [_negative(action, difference[action]) for action in spec.negative_actions]
    return tuple(outcomes)


def _finite(spec: TableSpec, scores: np.ndarray) -> RuleOutcome:
    bad = int((~np.isfinite(scores)).any(1).sum())
    if bad:
        return RuleOutcome(
            "finite", False, f"{bad} of {len(scores)} candidates have scores that are not finite numbers"
        )
    if len(scores) > 1 and np.ptp(ranking_score(spec, scores)) == 0:
        return RuleOutcome("finite", False, "all candidates have the same score")
    return RuleOutcome("finite", True, "all scores are finite and they differ")


def _enough(after: Hits) -> RuleOutcome:
    requests, users = len(after.requests), len(np.unique(after.user))
    needed = f"at least {rules.MIN_REQUESTS} and {rules.MIN_USERS} are needed"
    told = f"{requests} comparable requests by {users} users ({needed})"
    passed = rules.enough(requests, users)
    return RuleOutcome("evidence", passed, told if passed else f"not enough evidence: {told}")


def _not_worse(primary: str, change: dict[str, Any]) -> RuleOutcome:
    lower, upper = change["interval"]
    told = f"{primary} {_change(change)}"
    if rules.not_worse(lower):
        return RuleOutcome("not worse", True, f"{told}, so a loss of {rules.MARGIN:.0%} is excluded")
    if rules.proven_worse(upper):
        return RuleOutcome("not worse", False, f"worse than the champion: {told}")
    return RuleOutcome("not worse", False, f"not enough evidence: {told}, so a loss of {rules.MARGIN:.0%} is possible")


def _negative(action: str, change: dict[str, Any]) -> RuleOutcome:
    passed = rules.negative_not_worse(change["interval"][0])
    told = f"HIT@3/{action} {_change(change)}"
    return RuleOutcome(f"{action} not worse", passed, told if passed else f"more {action} than the champion: {told}")


def _why_promoted(difference: dict[str, Any] | None, primary: str, requests: int) -> str:
    if not difference:
        return f"first model: no champion to compare with; better than chance on {requests} requests"
    return f"HIT@3/{primary} {_change(difference[primary])} on {requests} requests: not worse than the champion"


def _change(change: dict[str, Any]) -> str:
    low, high = change["interval"]
    return f"{change['value']:+.1%} [{low:+.1%}, {high:+.1%}]"


def _cell(measured: dict[str, Any] | None, action: str) -> str:
    if not measured:
        return "–"
    low, high = measured["interval"][action]
    return f"{measured['hit3'][action]:.3f} [{low:.3f}, {high:.3f}]"
