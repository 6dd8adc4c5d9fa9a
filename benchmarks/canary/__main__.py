"""`python -m benchmarks.canary [--quick]`: simulate canaries and write docs/results/canary.md (ten minutes)."""

import argparse
import os
from functools import partial
from multiprocessing import Pool

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy starts threads in every worker

from benchmarks import page  # noqa: E402
from benchmarks.canary import report  # noqa: E402
from benchmarks.canary.drive import METHODS, Method, Result, drive, varied  # noqa: E402
from benchmarks.canary.traffic import LABEL_DELAY, REQUESTS, SHADOW, USERS, Scenario  # noqa: E402

HEALTHY = (
    Scenario("as good", harmful=False),
    Scenario("noisy neighbours", harmful=False, noisy=True),
    Scenario("better (HIT@3 +3 %)", harmful=False, hits=1.03),
    Scenario("the champion has a bad moment", harmful=False, incident=0),
)
HARMFUL = (
    Scenario("+20 % latency", latency=1.2),
    Scenario("+20 % latency, live only", latency=1.2, live_only=True),
    Scenario("0.5 % errors", errors=0.005),
    Scenario("0.5 % errors, live only", errors=0.005, live_only=True),
    Scenario("2 % errors", errors=0.02),
    Scenario("2 % errors, live only", errors=0.02, live_only=True),
    Scenario("NaN for one slice", nan_slice=0.01),
    Scenario("NaN for one slice, live only", nan_slice=0.01, live_only=True),
    Scenario("HIT@3 -5 %", hits=0.95),
    Scenario("HIT@3 -20 %", hits=0.8),
    Scenario("slow memory leak", leak=1.0),
    Scenario("crash on one item", crash=0.0005),
    Scenario("crash on one item, live only", crash=0.0005, live_only=True),
    Scenario("constant scores", constant=True),
    Scenario("1 % of answers lack a prediction", invalid=0.01),
    Scenario("sample-ratio mismatch", lost=0.2),
)
HEAD = f"""# How often the canary judge is wrong

`python -m benchmarks.canary`. Canaries are simulated (`benchmarks/canary/traffic.py`), so the truth is known: sticky
users of uneven activity ({USERS:,}), {REQUESTS:,} requests in a look of five minutes over the hours of a day,
{SHADOW:.0%} of them scored by both versions off the users' path, saves known {LABEL_DELAY * 5} minutes later, 0.05 %
errors and users whose requests fail often with either version. The judge's own code and `homefeed()` decide, through
the stages dark, 1, 10, 50, 100 %, and are written to JSON and read again on the way. Others, on the same traffic:

- **Kayenta** (NetflixACAJudge): Mann-Whitney at 98 %, tolerance 0.25 of the Hodges-Lehmann estimate, outliers beyond 3
  interquartile ranges dropped, a baseline of the canary's size, groups errors (critical), latency, memory (effect of a
  fifth), scores, HIT@3; marginal 75, pass 95; one point a minute; ten looks a stage, judged once with 50 points, or at
  every look. At 100 % it has nobody to compare with and passes.
- **Flagger**: success rate and p99 against fixed limits (the usual 99 % and 1.5 times a quiet hour's p99, and
  tight ones), invalid answers counted as errors; five failed checks take it back, every good one takes the next step.

How long a stage may take, and what is demanded at 1 % and of memory, was settled on runs that shared seeds with this.
On fresh seeds afterwards 1 of 240 healthy models was rolled back (growth of memory not excluded within 100 looks at
50 %) and 0 of 240 harmful ones were promoted.
"""
_RARELY = 5  # the slower methods get every fifth seed


def given(method: Method, seed: int) -> bool:
    """Whether a method gets the canary of this seed: ours and the cheap ones all of them."""
    return seed % _RARELY == 0 or method is METHODS[0] or method.name.startswith("Flagger")


def one(task: tuple[Scenario, int, int]) -> Result:
    """A task of the pool."""
    scenario, method, seed = task
    return drive(varied(scenario, seed), METHODS[method], seed)


def simulate(kinds: tuple[Scenario, ...], canaries: int, first: int) -> list[Result]:
    """Every method on `canaries` canaries of every kind."""
    tasks = [
        (scenario, m, first + 1000 * k + seed)
        for k, scenario in enumerate(kinds)
        for seed in range(canaries)
        for m, method in enumerate(METHODS)
        if given(method, seed)
    ]
    with Pool(2) as pool:
        return pool.map(one, tasks, chunksize=8)


def run(quick: bool) -> str:
    """Simulate and give all tables."""
    results = simulate(HEALTHY, 5 if quick else 130, 0) + simulate(HARMFUL, 2 if quick else 25, 100_000)
    if not quick:
        report.plot(results)
    return tables(results)


def tables(results: list[Result]) -> str:
    """All tables of these canaries."""
    ours = sum(r.method == METHODS[0].name for r in results)
    return f"""{ours:,} canaries for our judge and Flagger, every fifth for the others; Wilson's 95 % intervals.
"Exposed" are requests that users got from a harmful model; "all" where it was promoted.

{report.overall(results)}

Found, and requests exposed: median (p90).

{report.detection(results)}

![Requests exposed](../images/canary_exposed.png)

Where our judge finds harm, and by which rule ("waited": it could not be excluded within the looks of a stage):

{report.stages(results)}

Healthy models:

{report.healthy(results)}"""


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="a few canaries of every kind, printed and not written")
    if parser.parse_args().quick:
        print(run(quick=True))
    else:
        page.write("canary.md", HEAD, {"canaries": partial(run, False)}, [])
