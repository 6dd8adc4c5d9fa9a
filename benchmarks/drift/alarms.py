"""False alarms and detection delay: the monitors, and Evidently's defaults, over streams whose truth is known.

Both are asked every six hours about the newest six hours. The model is retrained twice a week, so is its reference:
ours is updated from its parent, Evidently's is a sample of the newest 28 days. What happens to a stream lasts to its
end. Nothing is done about an alarm, so a stream shows what a monitor says, not what comes of it.

What comes of it is a second look at the same stream: from the first alarm of a drift on, the model is retrained early
whenever the trigger would ask (its cooldown, budget and distance from slots hold), and learns what was there
`HELD_OUT` before. A few streams are checked every hour, too.

`EVERGREEN_BENCH_STREAMS` streams a scenario (30); what is measured is kept in the cache and not measured again. The
numbers in `monitoring/rules.py` are chosen on even seeds alone; the odd ones have a row of their own.
"""

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from datetime import datetime, timedelta
from typing import Any

from benchmarks.drift.judge import Run, Said, hourly_table, recovery_table, table
from benchmarks.drift.streams import END, EVERY, SCENARIOS, START, TRAIN, Scenario, Stream, stream
from benchmarks.kept import Kept
from benchmarks.ranker.data import cache
from model.metrics import hit3, hits, random_hit3
from monitoring.drift import Beside, judge
from monitoring.outcome import AgeCurve, Baseline, looked_at, outcome
from monitoring.reference import Reference
from monitoring.trigger import (
    BUDGET,
    BUDGET_SPAN,
    COOLDOWN,
    SLOT_NEAR,
    broken_data,
    persistent,
    quality_persists,
)
from monitoring.verdict import DriftVerdict, Outcome

SLOT = timedelta(hours=84)  # twice a week
STREAMS = 30
WORKERS = 2
HELD_OUT = timedelta(hours=6)  # an early challenger is judged on so much, as `components/plan.py` finds enough in it
FOLLOWED = timedelta(days=6)  # after the alarm of a drift
HOURLY = 1  # streams of a scenario that are checked every hour
HOUR = timedelta(hours=1)
VERSION = 2  # of what is measured: raised when kept results are of no use any more
VERIFIED = 6  # windows on which Evidently's real preset is asked, too


def section() -> str:
    """Measure what is not kept yet, and tell."""
    count = int(os.environ.get("EVERGREEN_BENCH_STREAMS", STREAMS))
    kept = Kept(cache() / "drift-alarms.jsonl")
    wanted = [(scenario, seed, VERSION) for seed in range(count) for scenario in SCENARIOS]
    # Two workers on two cores: threads of theirs would wait for each other, and Evidently took far longer.
    os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "POLARS_MAX_THREADS"), "1")
    with ProcessPoolExecutor(WORKERS, multiprocessing.get_context("spawn")) as pool:
        waiting = {pool.submit(measured, *w[:2]): w for w in wanted if w not in kept}
        for done in as_completed(waiting):
            kept.add(waiting[done], done.result())
        same = pool.submit(verified).result()
    head = f"Evidently's tests and the real `DataDriftPreset` agree on {same} of {VERIFIED} windows.\n\n"
    runs = [Run.read(kept[w]) for w in wanted]
    return head + table(runs) + "\n" + recovery_table(runs) + "\n" + hourly_table(runs)


def measured(scenario: Scenario, seed: int) -> dict[str, Any]:
    """Everything that both monitors say of one stream, as JSON."""
    made = stream(scenario, seed)
    truth = {**asdict(made.truth), "begin": made.truth.begin.isoformat(), "onset": made.truth.onset.isoformat()}
    first = Reference.of(made.window(START, START + TRAIN), None, made.holidays)
    ours, asked = list[Said](), None
    for said, reference in watched(made, first, START + TRAIN):
        ours.append(said)
        if asked is None and made.truth.kind != "none" and said.end > made.truth.begin and acts(said):
            asked = said.end, reference
    acted = recovery(made, *asked) if asked else []
    hourly = [said for said, _ in watched(made, first, START + TRAIN, every=HOUR)] if seed < HOURLY else []
    stock = [asdict(s) for s in stock_checks(made)]
    told = {"ours": ours, "acted": acted, "hourly": hourly}
    return {"scenario": scenario, "seed": seed, "truth": truth, "stock": stock} | {
        name: [asdict(s) for s in said] for name, said in told.items()
    }


def checks(every: timedelta = EVERY) -> Iterator[tuple[datetime, datetime]]:
    """Every check, and the slot in which the model was trained that is checked."""
    for turn in range(int((END - START - TRAIN - EVERY) / every) + 1):
        as_of = START + TRAIN + EVERY + turn * every
        yield as_of, START + TRAIN + int((as_of - EVERY - START - TRAIN) / SLOT) * SLOT


def watched(
    made: Stream, reference: Reference, since: datetime, every: timedelta = EVERY
) -> Iterator[tuple[Said, Reference]]:
    """What the monitors say, check after check, and the reference of the model that is checked; slots renew it."""
    recent: list[DriftVerdict] = []
    renewed = since
    for as_of, slot in checks(every):
        if as_of <= since:
            continue
        if slot > renewed:
            reference, renewed = learned(made, reference, slot), slot
        verdict = check(made, reference, as_of, renewed)
        yield said_of(verdict, recent), reference
        recent = [*recent[-5:], verdict]


def learned(made: Stream, parent: Reference, until: datetime) -> Reference:
    """The reference of an update: the newest that its parent did not know."""
    return Reference.of(made.window(parent.end, until), parent, made.holidays)


def acts(said: Said) -> bool:
    """Whether the trigger would think of a retrain: broken data is none of the world."""
    return said.alarm and said.kind in ("population", "behaviour")


def recovery(made: Stream, asked: datetime, reference: Reference) -> list[Said]:
    """What the monitors say from the check on that asks for an early retrain, when it and later ones are answered."""
    early, found, now = [asked], list[Said](), learned(made, reference, asked - HELD_OUT)
    while True:
        for said, current in watched(made, now, early[-1]):
            if said.end > asked + FOLLOWED:
                return found
            again = acts(said) and may_retrain(said.end, early)
            found.append(replace(said, retrain=again))
            if again:
                early.append(said.end)
                now = learned(made, current, said.end - HELD_OUT)
                break
        else:
            return found


def may_retrain(as_of: datetime, early: list[datetime]) -> bool:
    """Whether the trigger's cooldown, budget and distance from slots allow an early retrain."""
    to_slot = (START + TRAIN - as_of) % SLOT
    near = to_slot <= SLOT_NEAR or SLOT - to_slot < SLOT_NEAR
    spent = sum(as_of - e < BUDGET_SPAN for e in early) >= BUDGET
    return not near and not spent and as_of - early[-1] >= COOLDOWN


def said_of(verdict: DriftVerdict, recent: list[DriftVerdict]) -> Said:
    """The answer of one check, in the light of those before it."""
    persists, broken = persistent(verdict, recent), broken_data(verdict)
    lost = quality_persists(verdict, recent)
    return Said(
        verdict.as_of,
        bool(persists or broken or lost),
        verdict.kind,
        tuple(verdict.broken) or persists or verdict.drifted_columns or ("quality",) * lost,
        tuple(s.slice for s in verdict.slices[:3]),
        tuple(f"{c.name} {c.ratio:.2f}" for c in verdict.worst if c.drifted)[:8],
    )


def check(made: Stream, reference: Reference, as_of: datetime, slot: datetime) -> DriftVerdict:
    """One check, without its pages."""
    window = made.window(as_of - timedelta(hours=reference.hours), as_of)
    told = quality(made, as_of, slot) if made.scenario == "delay" else None
    return judge(reference, window, as_of, (slot.isoformat(), slot.isoformat()), Beside(outcome=told))[0]


def quality(made: Stream, as_of: datetime, slot: datetime) -> Outcome | None:
    """Quality on the labels that had arrived, against that of the week before the model, as a gate measures it.

    Asked where labels come late, for there it must not be lost; it is the costly part of a check.
    """
    before = made.as_known(slot - 2 * SLOT, slot, slot + TRAIN)
    counted = hits(before.table, before.scores)
    action = before.table.spec.primary_action
    baseline = Baseline(hit3(counted)[action], 0.01, random_hit3(counted)[action])
    looked = made.as_known(*looked_at(as_of, slot), as_of)
    return outcome(looked.table, looked.scores, as_of, slot, baseline, AgeCurve((), (), 0))


def stock_checks(made: Stream) -> Iterator[Said]:
    """What Evidently's defaults say, check after check."""
    from benchmarks.drift import evidently_defaults as stock

    trained, asked = START, None
    for as_of, slot in checks():
        if asked is None or slot > trained:
            asked, trained = stock.Check(stock.frame(made.window(slot - TRAIN, slot), stock.REFERENCE_ROWS)), slot
        found = asked(stock.frame(made.window(as_of - EVERY, as_of)))
        yield Said(as_of.isoformat(), found.alarm, "", found.drifted)


def verified() -> int:
    """On how many windows Evidently's real preset says the same."""
    from benchmarks.drift import evidently_defaults as stock

    same = 0
    for turn in range(VERIFIED):
        made = stream(SCENARIOS[turn % len(SCENARIOS)], 1000)
        reference = stock.frame(made.window(START, START + TRAIN), stock.REFERENCE_ROWS)
        end = END - (turn + 1) * 5 * EVERY
        same += stock.agrees(reference, stock.frame(made.window(end - EVERY, end)))
    return same
