"""What a judge knows of a rollout: the portions of evidence added up in a few sums, by question.

Every question has its own statistic, because what is asked of requests put to both versions ("shadow") is more exact
but says nothing of the users' own path ("live").
"""

from dataclasses import dataclass, field

import numpy as np

from serving.evidence import CHALLENGER, CHAMPION, Arm, Evidence, Pairs
from serving.sequential import CountRatio, Distinct, GroupedMean, Growth, Split

TAIL = 0.99  # the quantile of latency that is compared
ANYTHING = 1e9  # a margin that nothing exceeds: what it is about is not judged
WARM = 10  # per cent from which on memory counts: before, a new process fills its caches


@dataclass
class Events:
    """Rare bad events of both versions, of portions with requests of both.

    A user counts once for the bet, always in the raw counts.

    Attributes:
        bet: Wealth of the bet that the challenger's cases are more frequent by more than a ratio.
        users: Users that are cases.
        asked: Requests, champion's and challenger's.
        bad: Bad ones among them.
    """

    bet: CountRatio = field(default_factory=CountRatio)
    users: Distinct = field(default_factory=Distinct)
    asked: np.ndarray = field(default_factory=lambda: np.zeros(2))
    bad: np.ndarray = field(default_factory=lambda: np.zeros(2))

    def add(self, bad_A: np.ndarray, user_A: np.ndarray, bad_B: np.ndarray, user_B: np.ndarray, ratio: float) -> None:
        """Add one portion of champion's and challenger's requests."""
        if not len(bad_A) or not len(bad_B):
            return
        a, b = self.users.new(user_A[bad_A], user_B[bad_B])
        self.bet.add(a, b, (len(bad_A), len(bad_B)), ratio)
        self.asked = self.asked + [len(bad_A), len(bad_B)]
        self.bad = self.bad + [bad_A.sum(), bad_B.sum()]


@dataclass
class Latency:
    """Latency of both versions, as logarithms of milliseconds.

    The tail is compared by the share of requests beyond the 99th percentile of the portion (both versions together)
    after the challenger's latencies were divided by a margin: it is higher than the champion's exactly when the
    challenger's p99 is more than the margin times the champion's. Comparing a quantile by the indicator of exceeding
    it: Howard and Ramdas, Sequential estimation of quantiles, Bernoulli 28(3), 2022.

    Attributes:
        shift: Mean logarithm, challenger's minus champion's.
        tail_fail: Share beyond the tail, challenger's (divided by the margin that fails) minus champion's.
        tail_pass: The same with the margin that must be excluded.
        beyond: Requests beyond the tail so far.
    """

    shift: GroupedMean = field(default_factory=GroupedMean)
    tail_fail: GroupedMean = field(default_factory=GroupedMean)
    tail_pass: GroupedMean = field(default_factory=GroupedMean)
    beyond: int = 0

    def add(
        self,
        a_A: np.ndarray,
        user_A: np.ndarray,
        b_B: np.ndarray,
        user_B: np.ndarray,
        margins: tuple[float, float],
        paired: bool,
    ) -> None:
        """Add one portion of two arms, or of pairs (then A = B, row by row the same request): milliseconds."""
        log_A, log_B = np.log(np.maximum(a_A, 1e-3)), np.log(np.maximum(b_B, 1e-3))
        if paired:
            self.shift.add(log_B - log_A, np.ones(len(log_A)), user_A)
        else:
            self.shift.add_arms(log_A, user_A, log_B, user_B)
        if not len(log_A) or not len(log_B) or len(log_A) + len(log_B) < 1 / (1 - TAIL):
            return
        for tail, margin in zip((self.tail_fail, self.tail_pass), margins, strict=True):
            if margin >= ANYTHING:
                return
            scaled_B = log_B - np.log(margin)
            limit = np.quantile(np.concatenate([log_A, scaled_B]), TAIL)
            over_A, over_B = (log_A > limit).astype(float), (scaled_B > limit).astype(float)
            if paired:
                tail.add(over_B - over_A, np.ones(len(log_A)), user_A)
            else:
                tail.add_arms(over_A, user_A, over_B, user_B)
        self.beyond += int(over_A.sum() + over_B.sum())


@dataclass
class Memory:
    """Resident memory: what the challenger grows beyond what the champion grows, per thousand of its requests.

    Attributes:
        leak: Growth less the margin that fails.
        sound: Growth less the margin that must be excluded.
        last_mb: Last readings of champion and challenger; negative while there are none.
    """

    leak: Growth = field(default_factory=Growth)
    sound: Growth = field(default_factory=Growth)
    last_mb: np.ndarray = field(default_factory=lambda: -np.ones(2))

    def add(
        self, memory_mb: tuple[float, float], requests: tuple[int, int], margins: tuple[float, float], counted: bool
    ) -> None:
        """Add one reading; the champion's growth is taken per request of its own, and as none where it is unknown."""
        now = np.array(memory_mb)
        grown = np.where(np.isfinite(now) & (self.last_mb >= 0), now - self.last_mb, np.nan)
        self.last_mb = np.where(np.isfinite(now), now, self.last_mb)
        if (
            not counted
            or not np.isfinite(grown[CHALLENGER])
            or not requests[CHALLENGER]
            or not np.isfinite(margins).all()
        ):
            return
        shared = min(1.0, requests[CHALLENGER] / max(requests[CHAMPION], 1))  # more would only amplify its noise
        increment = float(grown[CHALLENGER] - shared * np.nan_to_num(grown[CHAMPION]))
        self.leak.add(increment, requests[CHALLENGER] / 1000, margins[0])
        self.sound.add(increment, requests[CHALLENGER] / 1000, margins[1])


@dataclass
class Facts:
    """All that was seen; `stage` counts the challenger's requests of the present stage."""

    shadow_errors: Events = field(default_factory=Events)
    live_errors: Events = field(default_factory=Events)
    constant: Events = field(default_factory=Events)
    own: np.ndarray = field(default_factory=lambda: np.zeros(2))  # the challenger's requests with no champion beside it
    flat: np.ndarray = field(default_factory=lambda: np.zeros(2))  # the challenger's live answers, constant ones
    invalid: int = 0
    answered: int = 0
    shadow_latency: Latency = field(default_factory=Latency)
    live_latency: Latency = field(default_factory=Latency)
    memory: Memory = field(default_factory=Memory)
    split: Split = field(default_factory=Split)
    seen: Distinct = field(default_factory=Distinct)
    score: GroupedMean = field(default_factory=GroupedMean)
    spread: GroupedMean = field(default_factory=GroupedMean)
    quality: GroupedMean = field(default_factory=GroupedMean)
    stage: int = 0

    def open_stage(self) -> None:
        """A new share of users: who is distinct, and how the split should be, begins anew."""
        self.split, self.seen, self.stage = Split(), Distinct(), 0

    def add(self, evidence: Evidence, error_ratio: float, margins: "Margins", first: bool) -> None:
        """Add one portion; of a first model the shadow requests, too, have no champion beside them."""
        champion, challenger, pairs = evidence.champion, evidence.challenger, evidence.pairs
        self._pairs(pairs, error_ratio, margins)
        self._arms(champion, challenger, error_ratio, margins)
        answered_B = ~challenger.failed_N
        self.flat = self.flat + [answered_B.sum(), (challenger.constant_N & answered_B).sum()]
        if not len(champion):
            self.own = self.own + [len(challenger), challenger.failed_N.sum()]
        asked = int(_asked(pairs).sum())
        if first:
            self.own = self.own + [asked, pairs.failed_P2[:, CHALLENGER].sum()]
        self.answered += int(answered_B.sum() + (_asked(pairs) & ~pairs.failed_P2[:, CHALLENGER]).sum())
        self.invalid += int(challenger.invalid_N.sum())
        self.invalid += int((pairs.invalid_P2[:, CHALLENGER] & ~pairs.invalid_P2[:, CHAMPION]).sum())
        requests = (len(champion) + asked, len(challenger) + asked)
        self.memory.add(evidence.memory_mb, requests, margins.memory, counted=evidence.percent >= WARM)
        if 0 < evidence.percent < 100:
            a, b = self.seen.new(champion.user_N, challenger.user_N)
            self.split.challenger += b
            self.split.n += a + b
        self.stage += len(challenger) if evidence.percent else asked

    def _pairs(self, pairs: Pairs, error_ratio: float, margins: "Margins") -> None:
        user_P, asked_P = pairs.user_P, _asked(pairs)
        failed_P2, asked_by_P = pairs.failed_P2[asked_P], user_P[asked_P]
        alone_P2 = failed_P2 & ~failed_P2[:, ::-1]  # what fails both is not the challenger's fault
        self.shadow_errors.add(alone_P2[:, CHAMPION], asked_by_P, alone_P2[:, CHALLENGER], asked_by_P, error_ratio)
        both_P2, kept_P = _complete(pairs.latency_P2, user_P)
        self.shadow_latency.add(both_P2[:, CHAMPION], kept_P, both_P2[:, CHALLENGER], kept_P, margins.tail, True)
        both_P2, kept_P = _complete(pairs.score_P2, user_P)
        self.score.add(both_P2[:, CHALLENGER], both_P2[:, CHAMPION], kept_P)
        if len(both_P2):
            off_P2 = (both_P2 - both_P2.mean(0)) ** 2
            self.spread.add(off_P2[:, CHALLENGER], off_P2[:, CHAMPION], kept_P)
        both_P2, kept_P = _complete(pairs.hits_P2, user_P)
        self.quality.add(both_P2[:, CHALLENGER], both_P2[:, CHAMPION], kept_P)

    def _arms(self, champion: Arm, challenger: Arm, error_ratio: float, margins: "Margins") -> None:
        user_A, user_B = champion.user_N, challenger.user_N
        self.live_errors.add(champion.failed_N, user_A, challenger.failed_N, user_B, error_ratio)
        self.constant.add(champion.constant_N, user_A, challenger.constant_N, user_B, error_ratio)
        in_A, in_B = np.isfinite(champion.latency_N), np.isfinite(challenger.latency_N)
        a_A, b_B = champion.latency_N[in_A], challenger.latency_N[in_B]
        self.live_latency.add(a_A, user_A[in_A], b_B, user_B[in_B], margins.tail, False)


@dataclass(frozen=True)
class Margins:
    """What the statistics must know of the guardrails: (fails beyond, must be excluded)."""

    tail: tuple[float, float]
    memory: tuple[float, float]


def _complete(value_P2: np.ndarray, user_P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    kept_P = np.isfinite(value_P2).all(1)
    return value_P2[kept_P], user_P[kept_P]


def _asked(pairs: Pairs) -> np.ndarray:
    """Pairs that were asked in this portion; the others were before, and come again with their matured labels."""
    return pairs.failed_P2.any(1) | np.isfinite(pairs.latency_P2).any(1)
