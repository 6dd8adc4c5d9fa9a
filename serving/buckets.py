"""Who is in the canary: a salted hash of the user, computed here and only compared by the proxy.

The same function serves the gateway's clients, the tests and later analysis of the log. A user's bucket is fixed for
one salt, and a canary at p % takes the buckets below p * 100: whoever is in stays in as it widens.
"""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import xxhash

BUCKETS = 10_000  # so that one bucket is 0.01 % of the users
BUCKET_HEADER = "x-bucket"
SALTS_TRIED = 64  # at first; where none of them will do, up to
SALTS_AT_MOST = 8192


def bucket(user_id: str, salt: str) -> int:
    """The user's bucket, 0..9999, under one salt."""
    return xxhash.xxh3_64_intdigest(f"{salt}\0{user_id}".encode()) % BUCKETS


def threshold(percent: int) -> int:
    """Buckets below this number are in a canary of that many per cent."""
    return percent * BUCKETS // 100


def in_canary(user_id: str, salt: str, percent: int) -> bool:
    """Whether a user's requests go to the challenger."""
    return bucket(user_id, salt) < threshold(percent)


def choose_salt(name: str, users: Sequence[str], enough: Mapping[int, int]) -> str:
    """A salt under which each stage gets about its share of the requests that will be replayed.

    A handful of users can all fall outside a 1 % canary, which would then learn nothing. So the most balanced of many
    assignments is taken (rerandomisation: Morgan and Rubin, Annals of Statistics 2012); the choice looks at counts of
    requests only, never at an outcome, so that it favours no model.

    Args:
        name: What is rolled out; another name gives other users the first turn.
        users: The user of each request.
        enough: For each stage, by its share of the users in per cent, the fewest requests that the challenger needs.

    Returns:
        The first salt with the smallest total deviation among those that give every stage enough requests, or the one
        that lacks fewest when none does.
    """
    # Shapes: S salts, U users, P stages.
    count = Counter(users)
    count_U = np.array(list(count.values()), np.int64)
    limit_P = np.array([threshold(p) for p in enough])
    share_P = np.array([p / 100 for p in enough]) * len(users)
    enough_P = np.array(list(enough.values()), np.int64)

    if not enough:
        return f"{name}-0"

    def best(salts: list[str]) -> tuple[tuple[float, float], str]:
        bucket_SU = np.array([[bucket(user, salt) for user in count] for salt in salts], np.int64)
        hits_SP = np.stack([(bucket_SU < limit) @ count_U for limit in limit_P], axis=1)
        short_S = np.maximum(0, enough_P - hits_SP).sum(1)
        deviation_S = np.abs(hits_SP - share_P).sum(1)
        place = int(np.lexsort((deviation_S, short_S))[0])
        return (float(short_S[place]), float(deviation_S[place])), salts[place]

    fault, salt = best([f"{name}-{turn}" for turn in range(SALTS_TRIED)])
    if fault[0]:
        fault, salt = best([f"{name}-{turn}" for turn in range(SALTS_AT_MOST)])
    return salt
