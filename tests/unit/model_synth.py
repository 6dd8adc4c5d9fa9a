"""A small ranking table with a learnable signal, for the tests of `model/`.

A save depends on three things: how good the item is (learnable from its id), whether its category is the user's
(learnable from the user's id, and from what the user saved lately), and chance. `taste` turns every user's category,
so that worlds with different tastes contradict each other about the same users.
"""

import dataclasses

import numpy as np
import xxhash

from engagement.table import Feature, RankingTable, TableSpec
from model import config

ACTIONS = ("save", "click", "hide")
SPEC = TableSpec(
    (
        Feature("user_id", "request", "categorical"),
        Feature("user_saves", "request", "numeric"),
        Feature("item_id", "candidate", "categorical"),
        Feature("topics", "candidate", "categories", width=3),
        Feature("item_rate", "candidate", "numeric"),
        Feature("content", "candidate", "embedding", width=12),
    ),
    ACTIONS,
    "save",
    ("hide",),
)
HOUR_US = 3_600_000_000
CATEGORIES = 4


def hashed(field: str, values: np.ndarray) -> np.ndarray:
    """63-bit hashes in the manner of `engagement.table.hash_id`."""
    return np.array([(xxhash.xxh3_64_intdigest(f"{field}={v}".encode()) >> 1) or 1 for v in values], np.int64)


def make(requests=300, users=30, items=60, size=8, seed=0, taste=0, start_hour=0, spec=SPEC) -> RankingTable:
    """A world of `users` and `items`; the same ones for every `seed`, which only draws who sees and does what."""
    world, rng = np.random.default_rng(99), np.random.default_rng([seed, taste])
    category, quality = world.integers(0, CATEGORIES, items), world.normal(size=items)
    likes, content = world.integers(0, CATEGORIES, users), world.normal(size=(CATEGORIES, 12))
    user = rng.integers(0, users, requests)
    sizes = rng.integers(1, size + 1, requests)
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    time = (start_hour + np.arange(requests)) * HOUR_US + 1
    item, row = rng.integers(0, items, offsets[-1]), np.repeat(np.arange(requests), sizes)
    match = category[item] == (likes[user[row]] + taste) % CATEGORIES
    logit = -2.0 + 3.0 * match + 0.8 * quality[item]
    labels = np.stack([rng.random(len(item)) < 1 / (1 + np.exp(-x)) for x in (logit, logit + 0.5, -3.0 - logit)], 1)
    acted = np.flatnonzero(labels.any(1))
    order = acted[np.lexsort((acted, user[row[acted]]))]
    history_user, history_time = user[row[order]], time[row[order]]
    begin, end = np.searchsorted(history_user, [user, user + 1])
    known = np.array([np.searchsorted(history_time[a:b], t) for a, b, t in zip(begin, end, time, strict=True)])
    rate = (quality[item] + rng.normal(size=len(item))).astype(np.float32)
    rate[rng.random(len(item)) < 0.1] = np.nan
    return RankingTable(
        spec=spec,
        request_id=np.array([f"r{seed}-{taste}-{i}" for i in range(requests)], "S"),
        user_id=np.array([f"u{u}" for u in user], "S"),
        time=time,
        offsets=offsets,
        history_start=begin,
        history_end=begin + known,
        request_cat=hashed("user_id", user)[:, None],
        request_num=known[:, None].astype(np.float32),
        item_id=np.array([f"i{i}" for i in item], "S"),
        item_cat=np.column_stack(
            [hashed("item_id", item), hashed("topics", category[item]), np.zeros((len(item), 2), int)]
        ),
        item_num=np.column_stack([rate, content[category[item]] + 0.1 * rng.normal(size=(len(item), 12))]).astype(
            np.float32
        ),
        labels=labels.astype(np.uint8),
        sampled=np.zeros(len(item), bool),
        history_time=history_time,
        history_item=hashed("item_id", item[order]),
        history_actions=(labels[order] * (1 << np.arange(3))).sum(1).astype(np.int64),
    )


def recipe(**changes) -> config.Recipe:
    """`debug()` with some fields changed, by name."""
    base, sizes = config.debug(), {f.name for f in dataclasses.fields(config.RankerConfig)}
    return config.Recipe(
        dataclasses.replace(base.ranker, **{k: v for k, v in changes.items() if k in sizes}),
        dataclasses.replace(base.train, **{k: v for k, v in changes.items() if k not in sizes}),
    )
