"""The people and posts of a simulated feed, and how they come and go: the ordinary life of `streams`.

Shapes: U users, I items, T days, H hours of the whole stream.
"""

from dataclasses import dataclass

import numpy as np

from engagement.table import hash_id

DAYS = 56
HOURS = DAYS * 24
REQUESTS_AN_HOUR = 60
CANDIDATES = 8
USER_LIFE = 60.0  # mean days that a user stays
BASE_USERS, USERS_A_DAY = 960, 16  # as many come as leave
BASE_ITEMS, ITEMS_A_DAY = 1800, 90
MARKET_USERS, MARKET_ITEMS = 500, 900
COUNTRIES = ("us", "de", "br", "in", "jp", "fr", "nl")  # the last only in a new market
LANGUAGES = ("en", "de", "pt", "hi", "ja", "fr", "nl")
ZONE = np.array([-6, 1, -3, 5, 9, 1, 1])  # hours from UTC
DEVICES, PLANS, SURFACES, FORMATS = ("ios", "android", "web", "tv"), ("free", "plus", "pro"), ("home", "tab", "push"), 5
CATEGORIES, NEW_CATEGORIES, CREATORS = 20, 4, 300
WIDTH = 8  # of an embedding
ITEM_LIFE = 6.0  # days until an item is shown a third as often


@dataclass(frozen=True)
class Users:
    """One row a user; hashed categories as codes into the tuples above."""

    born: np.ndarray  # day, before 0 for those who were there
    gone: np.ndarray
    activity: np.ndarray
    weekend: np.ndarray  # how much more they come on weekends, factor
    engaged: np.ndarray  # standardised: how much they click
    country: np.ndarray
    language: np.ndarray
    device: np.ndarray
    plan: np.ndarray
    age: np.ndarray
    market: np.ndarray  # bool: of the new market


@dataclass(frozen=True)
class Items:
    """One row an item."""

    born: np.ndarray
    pull: np.ndarray  # how often it is shown
    liked: np.ndarray  # standardised: how much it is clicked
    category: np.ndarray
    format: np.ndarray
    creator: np.ndarray
    length: np.ndarray
    price: np.ndarray
    embedding: np.ndarray
    market: np.ndarray


def hashes(field: str, values: tuple[str, ...] | list[str]) -> np.ndarray:
    """(len,) int64 hashes of the values of one column."""
    return np.array([hash_id(field, v) for v in values], np.int64)


def wander(rng: np.random.Generator, columns: int, size: float, days: int = DAYS, memory: float = 7.0) -> np.ndarray:
    """(days, columns) AR(1) around 0 of standard deviation `size`, forgetting with a time constant of `memory` days."""
    keep = np.exp(-1 / memory)
    noise = rng.normal(0, size, (days, columns))
    for day in range(1, days):
        noise[day] = keep * noise[day - 1] + np.sqrt(1 - keep**2) * noise[day]
    return noise


def make_users(rng: np.random.Generator, week: float) -> Users:
    """Users of the whole stream; `week` scales how much weekends differ."""
    old, new = BASE_USERS, USERS_A_DAY * DAYS
    count = old + new + MARKET_USERS
    market = np.arange(count) >= old + new
    there, coming = -rng.exponential(USER_LIFE, old), rng.uniform(0, DAYS, new)
    born = np.concatenate([there, coming, rng.uniform(DAYS / 2, DAYS, MARKET_USERS)])
    country = rng.choice(6, count, p=[0.35, 0.2, 0.15, 0.12, 0.1, 0.08])
    country[market & (rng.random(count) < 0.8)] = 6
    language = np.where(rng.random(count) < 0.85, country, 0)
    device = rng.choice(4, count, p=[0.35, 0.4, 0.2, 0.05])
    device[market] = rng.choice(4, MARKET_USERS, p=[0.1, 0.8, 0.1, 0.0])
    plan = rng.choice(3, count, p=[0.7, 0.2, 0.1])
    age = np.clip(rng.normal(36 + 4 * plan - 8 * market, 10), 16, 90)
    # Who likes weekends is younger, on phones, on the free plan: so the composition changes, not only the volume.
    lean = 0.04 * (36 - age) + 0.5 * (device < 2) - 0.4 * plan + rng.normal(0, 0.5, count)
    return Users(
        born,
        np.maximum(born, 0) + rng.exponential(USER_LIFE, count),
        np.minimum(rng.pareto(1.6, count) + 0.3, 12),
        np.exp(week * 0.4 * lean),
        rng.normal(0, 1, count),
        country,
        language,
        device,
        plan,
        age,
        market,
    )


def make_items(rng: np.random.Generator) -> Items:
    """Items of the whole stream."""
    old, new = BASE_ITEMS, ITEMS_A_DAY * DAYS
    count = old + new + MARKET_ITEMS
    market = np.arange(count) >= old + new
    there, coming = rng.uniform(-old / ITEMS_A_DAY, 0, old), rng.uniform(0, DAYS, new)
    born = np.concatenate([there, coming, rng.uniform(0, DAYS, MARKET_ITEMS)])
    zipf = 1 / np.arange(1, CATEGORIES + 1) ** 0.7
    category = rng.choice(CATEGORIES, count, p=zipf / zipf.sum())
    category[market] = CATEGORIES + rng.integers(0, NEW_CATEGORIES, MARKET_ITEMS)
    creators = 1 / np.arange(1, CREATORS + 1) ** 0.8
    creator = rng.choice(CREATORS, count, p=creators / creators.sum())
    creator[market] += CREATORS
    fashion = wander(rng, 2, 0.15)[np.clip(born, 0, DAYS - 1).astype(int)]  # what is uploaded wanders from week to week
    centroids = rng.normal(0, 1, (CATEGORIES + NEW_CATEGORIES, WIDTH))
    embedding = centroids[category] + rng.normal(0, 0.8, (count, WIDTH))
    return Items(
        born,
        np.minimum(rng.pareto(1.5, count) + 0.3, 15),
        rng.normal(0, 1, count),
        category,
        rng.choice(FORMATS, count, p=[0.4, 0.25, 0.2, 0.1, 0.05]),
        creator,
        np.exp(rng.normal(3 + 0.1 * (category % 5), 0.7) + 0.7 * fashion[:, 0]),
        rng.normal(20 + category % 7, 6) + 6 * fashion[:, 1],
        embedding.astype(np.float32),
        market,
    )
