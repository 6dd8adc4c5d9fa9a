"""`python -m pipelines.scheduled ENTRY AS_OF`: one run of the schedule, here, as a process of its own.

The scheduler starts it and holds the run lock meanwhile. Its last line on stdout says in one sentence what came of
it; an error is one line on stderr and exit code 1. It ends when the scheduler does.
"""

import sys
from datetime import datetime

from components.base import begin
from components.decide import decision_at
from components.features import refreshed_at
from components.instant import result_at, why_not
from engagement.errors import EvergreenError
from evergreen.settings import Settings


def run(settings: Settings, entry: str, as_of: datetime) -> str:
    """Run one entry's pipeline to its end; returns what came of it, in a sentence.

    Raises:
        EvergreenError: A step failed.
    """
    from pipelines import local
    from pipelines.monitor import monitor
    from pipelines.refresh import refresh
    from pipelines.slot import slot

    if entry == "retrain":
        reason = why_not(settings, as_of)
        if reason:
            return reason
        local.run(slot, settings, as_of=as_of.isoformat())
        return _retrained(settings, as_of)
    if entry == "refresh":
        local.run(refresh, settings, as_of=as_of.isoformat())
        return f"served features are as of {refreshed_at(settings)['online_as_of']:.16}"
    local.run(monitor, settings, as_of=as_of.isoformat())
    decision = decision_at(settings, as_of)["decision"]
    return f"{decision['action']}: {decision['reason']}"


def _retrained(settings: Settings, slot: datetime) -> str:
    result = result_at(settings, slot)
    if result is None:
        raise EvergreenError(f"the retrain at {slot:%Y-%m-%d %H:%M} ended without a result", "See `evergreen status`")
    version = f"v{result['version']} " if result["version"] else ""
    return f"{version}{result['outcome']}: {result['gate']['reason']}"


def main() -> int:
    """Run what the command line names."""
    settings = begin()
    try:
        line = run(settings, sys.argv[1], datetime.fromisoformat(sys.argv[2]))
    except EvergreenError as error:
        print(error, file=sys.stderr)
        return 1
    print(" ".join(line.split()), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
