"""Who is in the canary: a salted hash of the user, computed here and only compared by the proxy.

The same function serves the gateway's clients, the tests and later analysis of the log. A user's bucket is
fixed for one salt, and a canary at p % takes the buckets below p * 100: whoever is in stays in as it
widens.
"""

from collections.abc import Sequence

import xxhash

BUCKETS = 10_000  # so that one bucket is 0.01 % of the users
BUCKET_HEADER = "x-bucket"
SALTS_TRIED = 64


def bucket(user_id: str, salt: str) -> int:
    """The user's bucket, 0..9999, under one salt."""
    return xxhash.xxh3_64_intdigest(f"{salt}\0{user_id}".encode()) % BUCKETS


def threshold(percent: int) -> int:
    """Buckets below this number are in a canary of that many per cent."""
    return percent * BUCKETS // 100


def in_canary(user_id: str, salt: str, percent: int) -> bool:
    """Whether a user's requests go to the challenger."""
    return bucket(user_id, salt) < threshold(percent)


def choose_salt(name: str, windows: Sequence[tuple[int, Sequence[str]]], enough: int) -> str:
    """A salt under which each canary step gets about its share of the requests that will be replayed.

    A handful of users can all fall outside a 10 % canary, which would then learn nothing. So the most
    balanced of a few assignments is taken (rerandomisation: Morgan and Rubin, Annals of Statistics 2012);
    the choice looks at counts of requests only, never at an outcome, so that it favours no model.

    Args:
        name: What is rolled out; another name gives other users the first turn.
        windows: For each step its percentage and the user of each of its requests.
        enough: Fewest requests that a step needs on the challenger.

    Returns:
        The first salt with the smallest total deviation among those that give every step enough requests,
        or among all when none does.
    """

    def fault(salt: str) -> tuple[int, float]:
        short, deviation = 0, 0.0
        for percent, users in windows:
            hits = sum(in_canary(user, salt, percent) for user in users)
            short += max(0, enough - hits)
            deviation += abs(hits - len(users) * percent / 100)
        return short, deviation

    return min((f"{name}-{turn}" for turn in range(SALTS_TRIED)), key=fault)
