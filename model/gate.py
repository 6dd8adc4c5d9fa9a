"""The gate: challenger against champion on the same later requests, rule by rule, with its evidence.

Rules are pure: numbers in (`model/gate_evidence.py`), one outcome each out; thresholds are in `model/gate_rules.py`.
All of them are applied and recorded; the first that fails gives the reason.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from model import gate_rules as rules
from model.bootstrap import Estimate
from model.cost import Cost
from model.gate_evidence import Evidence, Scored
from model.power import requests_needed
from model.slices import SliceResult

_WORST = 8  # slices shown on the page


@dataclass(frozen=True)
class RuleOutcome:
    """One rule applied.

    Attributes:
        rule: Name.
        passed: Whether it lets the challenger through.
        told: One sentence with the numbers.
        numbers: The numbers themselves.
    """

    rule: str
    passed: bool
    told: str
    numbers: dict[str, float]


@dataclass(frozen=True)
class Verdict:
    """The gate's decision and everything that it rests on.

    Attributes:
        verdict: `promote` or `hold`.
        reason: One sentence: the rule that held it, or why it may go.
        requests: Requests that were compared.
        skipped_requests: Requests left out, having three candidates or fewer.
        primary_action: The action that HIT@3 is mainly about.
        metrics: Of `champion` (None without one) and `challenger`: `hit3` and `interval` by action, `auc`, `ece`, and
            `cost` where it was measured; of `random`: `hit3`. Plain JSON, as is `difference`.
        difference: Relative difference challenger against champion by action: `value`, `interval`; None without one.
        rules: Every rule applied, in order; the first that fails holds the challenger.
        slices: Every slice that was tested, the worst first.
    """

    verdict: Literal["promote", "hold"]
    reason: str
    requests: int
    skipped_requests: int
    primary_action: str
    metrics: dict[str, Any]
    difference: dict[str, Any] | None
    rules: tuple[RuleOutcome, ...]
    slices: tuple[SliceResult, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data; a number that could not be measured is null."""
        data: dict[str, Any] = _plain(asdict(self))
        return data

    def to_markdown(self) -> str:
        """The evidence as a page for KFP and MLflow."""
        who = ("champion", "challenger")
        lines = [f"# {self.verdict}", "", self.reason, ""]
        lines += [f"{self.requests} requests compared, {self.skipped_requests} left out.", ""]
        lines += ["| HIT@3 | champion | challenger | relative difference |", "|---|---|---|---|"]
        for action in self.metrics["challenger"]["hit3"]:
            change = _change(self.difference[action]) if self.difference else "–"
            before, after = (_cell(self.metrics[w], action) for w in who)
            lines.append(f"| {action} | {before} | {after} | {change} |")
        for name, key in (("AUC", "auc"), ("calibration error", "ece")):
            before, after = (_shown(m[key], ".3f") if (m := self.metrics[w]) else "–" for w in who)
            lines.append(f"| *{name}, {self.primary_action}* | {before} | {after} | |")
        lines += ["", "| rule | passed | |", "|---|---|---|"]
        lines += [f"| {r.rule} | {'yes' if r.passed else '**no**'} | {r.told} |" for r in self.rules]
        if self.slices:
            lines += ["", f"The {min(_WORST, len(self.slices))} worst of {len(self.slices)} slices:", ""]
            lines += ["| slice | requests | users | champion | difference | p (Holm) |", "|---|---|---|---|---|---|"]
            lines += [
                f"| {s.name} | {s.requests} | {s.users} | {s.champion:.3f} | {s.difference:+.1%} | {s.adjusted:.3f} |"
                for s in self.slices[:_WORST]
            ]
        return "\n".join(lines) + "\n"


def tags_of(verdict_json: dict[str, Any]) -> dict[str, str]:
    """A tag a rule for the model version: `gate.not_worse` -> `pass: HIT@3/save +1.0% ...`.

    Args:
        verdict_json: `Verdict.to_json()`.
    """
    return {
        f"gate.{r['rule'].replace(' ', '_')}": f"{'pass' if r['passed'] else 'fail'}: {r['told']}"
        for r in verdict_json["rules"]
    }


def judge(e: Evidence) -> Verdict:
    """Apply every rule that the evidence has numbers for."""
    applied: list[Callable[[Evidence], RuleOutcome]] = [_finite, _enough]
    if e.requests:
        applied.append(_floor)
    if e.requests and e.champion:
        applied += [_not_worse, _worth_it, _slices]
    outcomes = [rule(e) for rule in applied]
    if e.requests and e.excess:
        outcomes += [_negative(action, excess, e) for action, excess in e.excess.items()]
    if e.champion:
        outcomes.append(_forgetting(e))
    outcomes.append(_calibration(e))
    if e.champion:
        outcomes.append(_scores(e))
    if e.costs:
        outcomes += [_latency(e.costs), _memory(e.costs)]
    failed = next((r for r in outcomes if not r.passed), None)
    costs = dict(zip(("challenger", "champion"), e.costs, strict=False))
    return Verdict(
        verdict="hold" if failed else "promote",
        reason=failed.told if failed else _why_promoted(e),
        requests=e.requests,
        skipped_requests=e.skipped,
        primary_action=e.primary,
        metrics=_plain(
            {
                "champion": _metrics(e.champion, costs.get("champion")) if e.champion else None,
                "challenger": _metrics(e.challenger, costs.get("challenger")),
                "random": {"hit3": e.random},
            }
        ),
        difference=_plain(_differences(e.difference)) if e.difference else None,
        rules=tuple(outcomes),
        slices=e.slices,
    )


def _finite(e: Evidence) -> RuleOutcome:
    told = "all scores are finite and they differ"
    if e.broken_rows:
        told = f"{e.broken_rows} of {e.rows} candidates have scores that are not finite numbers"
    elif e.constant:
        told = "all candidates have the same score"
    return RuleOutcome("finite", not (e.broken_rows or e.constant), told, {"broken_rows": e.broken_rows})


def _enough(e: Evidence) -> RuleOutcome:
    needed = f"at least {rules.MIN_REQUESTS} and {rules.MIN_USERS} are needed"
    told = f"{e.requests} comparable requests by {e.users} users ({needed})"
    passed, missing = rules.enough(e.requests, e.users), max(0, rules.MIN_REQUESTS - e.requests)
    numbers: dict[str, float] = {"requests": e.requests, "users": e.users, "requests_missing": missing}
    return RuleOutcome("evidence", passed, told if passed else f"not enough evidence: {told}", numbers)


def _floor(e: Evidence) -> RuleOutcome:
    above, area = e.above_random, e.challenger.auc
    told = (
        f"HIT@3/{e.primary} minus that of a random order lies in [{above.low:+.3f}, {above.high:+.3f}], "
        f"AUC {area:.3f} (floor {rules.FLOOR_AUC})"
    )
    # Without a positive (or a negative) label there is no AUC, and nothing speaks against the challenger.
    passed = rules.above_floor(above.high, rules.FLOOR_AUC if np.isnan(area) else area)
    return RuleOutcome("floor", passed, told, {"above_random_high": above.high, "auc": area})


def _not_worse(e: Evidence) -> RuleOutcome:
    change = e.difference[e.primary] if e.difference else None
    assert change is not None
    told, margin = f"HIT@3/{e.primary} {_told(change)}", f"a loss of {rules.MARGIN:.0%}"
    needed = _needed(change, rules.MARGIN, e)
    numbers = {"value": change.value, "low": change.low, "high": change.high, "error": change.error}
    numbers |= {"requests_needed": needed, "requests_missing": 0.0}
    if rules.not_worse(change.low):
        return RuleOutcome("not worse", True, f"{told}, so {margin} is excluded", numbers)
    if rules.proven_worse(change.high):
        return RuleOutcome("not worse", False, f"worse than the champion: {told}", numbers)
    if needed <= e.requests:  # equal models would rather have passed: what would show the difference measured?
        needed = _needed(change, rules.MARGIN + change.value, e)
    numbers["requests_missing"] = missing = needed - e.requests
    more = f"about {missing:,.0f} more comparable requests are missing"
    if not np.isfinite(missing):
        more = f"equal models would need about {numbers['requests_needed']:,.0f} requests, these two look unequal"
    return RuleOutcome("not worse", False, f"not enough evidence: {told}, so {margin} is possible; {more}", numbers)


def _needed(change: Estimate, gap: float, e: Evidence) -> float:
    return requests_needed(change.error, gap, e.requests, e.users, rules.CONFIDENCE, rules.POWER)


def _worth_it(e: Evidence) -> RuleOutcome:
    assert e.difference is not None
    change, (latency, memory) = e.difference[e.primary], _ratios(e.costs)
    std = f"seeds differ by {e.seed_std:.1%}" if e.seed_std is not None else "how much seeds differ is not known"
    claims = _claims(e)
    told = f"HIT@3/{e.primary} {_told(change)} ({std}), "
    told += "trained to a later instant" if e.newer else "trained to the same instant or an earlier one"
    numbers = {"value": change.value, "low": change.low, "newer": float(e.newer)}
    if len(e.costs) > 1:
        told += f", latency × {latency:.2f}, weights × {memory:.2f}"
        numbers |= {"latency_ratio": latency, "memory_ratio": memory}
    numbers |= {} if e.seed_std is None else {"seed_std": e.seed_std}
    told = f"{' and '.join(claims)}: {told}" if claims else f"neither better nor cheaper nor fresher: {told}"
    return RuleOutcome("worth it", bool(claims), told, numbers)


def _claims(e: Evidence) -> list[str]:
    """What speaks for the challenger: `better`, `cheaper`, `fresher`."""
    assert e.difference is not None
    change = e.difference[e.primary]
    held = {
        "better": rules.better(change.value, change.low, e.seed_std),
        "cheaper": rules.cheaper(*_ratios(e.costs)),
        "fresher": rules.fresher(e.newer, change.value, e.seed_std),
    }
    return [claim for claim, holds in held.items() if holds]


def _slices(e: Evidence) -> RuleOutcome:
    worse = [s for s in e.slices if rules.slice_worse(s.adjusted)]
    told = f"{len(e.slices)} slices, none proven to lose more than {rules.SLICE_MARGIN:.0%}"
    if worse:
        named = ", ".join(f"{s.name} {s.difference:+.0%} (p {s.adjusted:.3f})" for s in worse[:3])
        told = f"{len(worse)} of {len(e.slices)} slices lose more than {rules.SLICE_MARGIN:.0%}: {named}"
    told += f"; {len(e.thin_slices)} more have too little data" if e.thin_slices else ""
    return RuleOutcome("slices", not worse, told, {"tested": len(e.slices), "worse": len(worse)})


def _negative(action: str, excess: Estimate, e: Evidence) -> RuleOutcome:
    assert e.difference is not None
    passed, change = rules.negative_not_worse(excess.low), e.difference[action]
    told = f"HIT@3/{action} {_told(change)} (a rise of more than {rules.NEGATIVE_MARGIN:.0%} holds)"
    numbers = {"value": change.value, "low": change.low, "high": change.high, "excess_low": excess.low}
    return RuleOutcome(
        f"{action} not worse", passed, told if passed else f"more {action} than the champion: {told}", numbers
    )


def _forgetting(e: Evidence) -> RuleOutcome:
    change = e.forgetting
    if change is None:
        return RuleOutcome("forgetting", True, "the champion carries no held-out requests of the past yet", {})
    passed, budget = rules.remembers(change.high), f"budget {rules.FORGETTING_BUDGET:.0%}"
    told = f"HIT@3/{e.primary} on {e.exam_requests} held-out requests of the past {_told(change)} ({budget})"
    numbers = {"value": change.value, "low": change.low, "high": change.high, "requests": e.exam_requests}
    return RuleOutcome("forgetting", passed, told if passed else f"forgets: {told}", numbers)


def _calibration(e: Evidence) -> RuleOutcome:
    ece, before = e.challenger.ece, e.champion.ece if e.champion else None
    passed, budget = rules.calibrated(ece, e.chance_ece, before), rules.ECE_BUDGET + e.chance_ece
    beside = f" beside the champion's {before:.3f}" if before is not None else ""
    told = f"calibration error of {e.primary} {ece:.3f}{beside} (budget {budget:.3f})"
    numbers = {"ece": ece, "chance": e.chance_ece} | ({} if before is None else {"champion": before})
    return RuleOutcome("calibration", passed, told if passed else f"badly calibrated: {told}", numbers)


def _scores(e: Evidence) -> RuleOutcome:
    assert e.champion is not None and e.psi is not None
    # A champion whose scores are not finite has no calibration: whatever is closer to the labels explains the shift.
    close, explained = rules.scores_close(e.psi), not e.challenger.ece >= e.champion.ece
    told = f"stability index of the {e.primary} scores {e.psi:.3f} (limit {rules.PSI_LIMIT})"
    if not close:
        told += ", explained by better calibration" if explained else ", and the calibration is no better"
    passed = close or explained
    return RuleOutcome("scores", passed, told if passed else f"scores shifted: {told}", {"psi": e.psi})


def _latency(costs: tuple[Cost, ...]) -> RuleOutcome:
    now, (ratio, _) = costs[0].milliseconds, _ratios(costs)
    told = f"{now:.1f} ms of CPU for one request (budget {rules.LATENCY_MS:.0f} ms)" + _beside(costs, ratio)
    passed = rules.latency_fits(now, ratio)
    return RuleOutcome(
        "latency", passed, told if passed else f"too slow: {told}", {"milliseconds": now, "ratio": ratio}
    )


def _memory(costs: tuple[Cost, ...]) -> RuleOutcome:
    new, (_, ratio) = costs[0], _ratios(costs)
    mega = 2**20
    told = f"weights of {new.weights / mega:.1f} MB, {new.peak / mega:.1f} MB at most to load and score"
    passed = rules.memory_fits(max(new.weights, new.peak), ratio)
    numbers = {"weights": new.weights, "peak": new.peak, "ratio": ratio}
    return RuleOutcome("memory", passed, (told if passed else f"too large: {told}") + _beside(costs, ratio), numbers)


def _ratios(costs: tuple[Cost, ...]) -> tuple[float, float]:
    """Challenger's latency and weights file over the champion's; 1 where there is nothing to compare."""
    if len(costs) < 2:
        return 1.0, 1.0
    new, old = costs
    return new.milliseconds / old.milliseconds, new.weights / old.weights


def _beside(costs: tuple[Cost, ...], ratio: float) -> str:
    return f", × {ratio:.2f} the champion's" if len(costs) > 1 else ""


def _why_promoted(e: Evidence) -> str:
    if not e.difference:
        return f"first model: no champion to compare with; better than chance on {e.requests} requests"
    claims = " and ".join(_claims(e))
    return (
        f"HIT@3/{e.primary} {_told(e.difference[e.primary])} on {e.requests} requests: "
        f"not worse than the champion, and {claims}"
    )


def _metrics(scored: Scored, cost: Cost | None) -> dict[str, Any]:
    return {
        "hit3": {a: m.value for a, m in scored.hit3.items()},
        "interval": {a: [m.low, m.high] for a, m in scored.hit3.items()},
        "auc": scored.auc,
        "ece": scored.ece,
        "cost": asdict(cost) if cost else None,
    }


def _differences(found: dict[str, Estimate]) -> dict[str, Any]:
    return {a: {"value": e.value, "interval": [e.low, e.high]} for a, e in found.items()}


def _told(e: Estimate) -> str:
    return f"{e.value:+.1%} [{e.low:+.1%}, {e.high:+.1%}]"


def _change(change: dict[str, Any]) -> str:
    return _shown(change["value"], "+.1%", change["interval"])


def _cell(measured: dict[str, Any] | None, action: str) -> str:
    return _shown(measured["hit3"][action], ".3f", measured["interval"][action]) if measured else "–"


def _shown(value: float | None, form: str, bounds: list[float | None] | None = None) -> str:
    """A number, and its interval; a dash for what could not be measured."""
    told = "–" if value is None else format(value, form)
    return told if bounds is None else f"{told} [{', '.join(_shown(b, form) for b in bounds)}]"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value
