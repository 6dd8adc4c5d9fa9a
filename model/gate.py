"""PROVISIONAL (lead, for integration only): H3, overwrite this file with the real gate."""
from dataclasses import dataclass, asdict
import numpy as np
from model.metrics import hits, hit3


@dataclass(frozen=True)
class Verdict:
    verdict: str
    reason: str
    requests: int
    skipped_requests: int
    rules: tuple
    metrics: dict
    primary_action: str

    def to_json(self):
        return asdict(self)

    def to_markdown(self):
        return f"# {self.verdict}\n\n{self.reason}\n"


def judge(table, challenger, champion, seed):
    a = table.spec.primary_action
    m = {}
    for n, s in (("champion", champion), ("challenger", challenger)):
        if s is None:
            m[n] = None
            continue
        h = hits(table, s)
        m[n] = {"hit3": hit3(h), "interval": {x: [hit3(h)[x] - .1, hit3(h)[x] + .1] for x in table.spec.actions}}
    return Verdict("promote", "provisional", len(h.requests), h.skipped, (), m, a)
