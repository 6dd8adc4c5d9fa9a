"""The columns of a simulated feed: its table, and which of them each scenario moves."""

from functools import cache

import numpy as np

from benchmarks.drift import world
from engagement.table import Feature, TableSpec

SPEC = TableSpec(
    (
        Feature("user_id", "request", "categorical"),
        Feature("user_profile__country", "request", "categorical"),
        Feature("user_profile__device", "request", "categorical"),
        Feature("user_profile__plan", "request", "categorical"),
        Feature("context__surface", "request", "categorical"),
        Feature("context__language", "request", "categorical"),
        Feature("user_profile__age", "request", "numeric"),
        Feature("user_profile__tenure", "request", "numeric"),
        Feature("user_stats__impressions_7d", "request", "numeric", transform="log1p"),
        Feature("user_stats__count_click_7d", "request", "numeric", transform="log1p"),
        Feature("user_stats__rate_click_7d", "request", "numeric"),
        Feature("days_since_action", "request", "numeric", transform="log1p"),
        Feature("item_id", "candidate", "categorical"),
        Feature("item_profile__category", "candidate", "categorical"),
        Feature("item_profile__format", "candidate", "categorical"),
        Feature("item_profile__creator", "candidate", "categorical"),
        Feature("item_profile__length", "candidate", "numeric"),
        Feature("item_profile__price", "candidate", "numeric"),
        Feature("item_profile__embedding", "candidate", "embedding", world.WIDTH),
        Feature("item_stats__impressions_1d", "candidate", "numeric", transform="log1p"),
        Feature("item_stats__impressions_7d", "candidate", "numeric", transform="log1p"),
        Feature("item_stats__rate_click_7d", "candidate", "numeric"),
        Feature("item_stats__rate_save_30d", "candidate", "numeric"),
        Feature("category_stats__rate_click_7d", "candidate", "numeric"),
        Feature("user_category_stats__rate_click_7d", "candidate", "numeric"),
        Feature("item_age_days", "candidate", "numeric", transform="log1p"),
    ),
    ("save", "click", "hide"),
    "save",
    ("hide",),
)

RATES = (
    "user_stats__rate_click_7d",
    "item_stats__rate_click_7d",
    "item_stats__rate_save_30d",
    "category_stats__rate_click_7d",
    "user_category_stats__rate_click_7d",
)
SHOCKED = (*RATES, "user_stats__count_click_7d", "days_since_action")
SLOW = {
    "population": ("user_profile__age", "user_profile__tenure", "item_profile__price", "item_profile__length"),
    "behaviour": (*RATES[:3], "category_stats__rate_click_7d"),
}
MARKET_COLUMNS = (
    *(
        "user_profile__country",
        "user_profile__device",
        "user_profile__age",
        "user_profile__tenure",
        "context__language",
    ),
    *("item_profile__category", "item_profile__creator", "item_profile__embedding", "user_id", "item_id"),
    *(f"user_stats__{s}" for s in ("impressions_7d", "count_click_7d", "rate_click_7d")),
)
BREAKABLE = (
    *("user_profile__country", "user_profile__device", "user_profile__age", "user_profile__tenure", "context__surface"),
    *("item_profile__category", "item_profile__creator", "item_profile__length", "item_profile__price"),
    *("user_stats__impressions_7d", "user_stats__rate_click_7d", "item_stats__impressions_7d"),
    *("item_stats__rate_click_7d", "item_age_days"),
)


@cache
def numbered(prefix: str, count: int) -> tuple[str, ...]:
    """Names of so many values."""
    return tuple(f"{prefix}{i}" for i in range(count))


@cache
def coded(column: str, values: tuple[str, ...]) -> np.ndarray:
    """(len,) int64 hashes of the values of a column."""
    return world.hashes(column, values)


@cache
def names() -> dict[str, dict[int, str]]:
    """Names of the hashed categories."""
    known = {
        "user_profile__country": world.COUNTRIES,
        "user_profile__device": world.DEVICES,
        "user_profile__plan": world.PLANS,
        "context__surface": world.SURFACES,
        "context__language": world.LANGUAGES,
        "item_profile__category": numbered("c", 24),
        "item_profile__format": numbered("f", world.FORMATS),
        "item_profile__creator": numbered("by", 600),
    }
    found = {n: (*values, "unknown") for n, values in known.items()}
    return {n: dict(zip(coded(n, v).tolist(), v, strict=True)) for n, v in found.items()}
