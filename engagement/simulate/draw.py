"""Drawing a world: its users and items once, then the requests of each day in blocks of bounded memory.

A block is a function of (world, scale, day, number of the block); nothing else is random, so days can be drawn in any
order. All chances are kept in float32.

Shapes: U users, I items, G countries, C categories, F formats, S seasons, K taste dimensions, D days, R requests of a
block, A items alive on a day, P items that the logging policy looks at, N candidates of a request, 3 actions.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from engagement.errors import EvergreenError
from engagement.simulate.worlds import Scale, World

ACTIONS = ("save", "click", "hide")
HOUR_US = 3_600_000_000
DAY_US = 24 * HOUR_US
BLOCK = 4096  # requests drawn at a time; part of what makes the draw reproducible
_TASTES = 8  # K
_NEW_CATEGORIES = 3  # of a new country
_LOOKED_AT = 3  # times as many items as candidates: what the logging policy chooses from
_CHOICE = 1.0  # noise (Gumbel) in the relevance by which the logging policy orders, in logits
_HOURS = 1.0 + 0.8 * np.sin((np.arange(24) - 13) * np.pi / 12)  # a day's rhythm: busiest at 19:00, quiet at 07:00
_LIVES, _CHANCES = 1, 2  # streams of random numbers beside those of the blocks


@dataclass(frozen=True)
class Block:
    """Some requests of one day, in time order.

    Attributes:
        first: Number of the first request in the whole feed.
        time_R: int64, microseconds since the world's start.
        user_R: int32.
        item_RN: int32, in the order in which they were shown.
        truth_RN3: float32, chance of each action were every item looked at.
        acted_RN3: bool, what happened.
    """

    first: int
    time_R: np.ndarray
    user_R: np.ndarray
    item_RN: np.ndarray
    truth_RN3: np.ndarray
    acted_RN3: np.ndarray


@dataclass(frozen=True)
class Population:
    """Everything that is drawn once.

    Users are sorted by the day on which they join. A taste is a unit vector that rotates from `taste` towards
    `towards`, which is perpendicular to it; so the angle between two days is known exactly.

    Attributes:
        world: The laws.
        scale: The numbers.
        joined_U: int32, day from which a user sends requests.
        country_U: int32.
        activity_U: float64, running sum of the users' activities.
        taste_UK, towards_UK: float32.
        born_I, died_I: int32, days: an item is shown on the days `born <= day < died`.
        category_I, format_I: int32.
        vector_IK: float32, unit vectors around their category's.
        quality_I: float32.
        country_SGC, format_SF: float32, effects of the seasons.
        shock_C: float64, change of effects by the shock.
        wave_C: float64, phase of each category's popularity, radians.
        requests_D: int64, requests of each day.
    """

    world: World
    scale: Scale
    joined_U: np.ndarray
    country_U: np.ndarray
    activity_U: np.ndarray
    taste_UK: np.ndarray
    towards_UK: np.ndarray
    born_I: np.ndarray
    died_I: np.ndarray
    category_I: np.ndarray
    format_I: np.ndarray
    vector_IK: np.ndarray
    quality_I: np.ndarray
    country_SGC: np.ndarray
    format_SF: np.ndarray
    shock_C: np.ndarray
    wave_C: np.ndarray
    requests_D: np.ndarray

    def season(self, day: int) -> str:
        """The season of a day, as requests show it."""
        return self.world.seasons[self._season(day)]

    def tastes(self, day: int) -> np.ndarray:
        """(U, K) every user's taste on a day."""
        angle = np.deg2rad(self.world.turn * day)
        return (np.cos(angle) * self.taste_UK + np.sin(angle) * self.towards_UK).astype(np.float32)

    def effects(self, day: int) -> np.ndarray:
        """(G, C, F) what country, category and format add to the utility on a day: seasons, shock and popularity."""
        season, since = self._season(day), day - half_time(self.scale.days)
        shocked = 0.0 if since < 0 else 1.0 if since < 14 else 0.5
        wave_C = np.sin(self.wave_C + np.deg2rad(self.world.popularity_turn * day))
        total_GC = self.country_SGC[season] + np.sqrt(2) * self.world.popularity * wave_C + shocked * self.shock_C
        return (total_GC[:, :, None] + self.format_SF[season]).astype(np.float32)

    def alive(self, day: int) -> np.ndarray:
        """(A,) items that can be shown on a day."""
        return np.flatnonzero((self.born_I <= day) & (day < self.died_I)).astype(np.int32)

    def _season(self, day: int) -> int:
        return day // self.world.season_days % len(self.world.seasons)


def half_time(days: int) -> int:
    """The day on which the shock strikes and the new country joins."""
    return days // 2


def populate(world: World, scale: Scale) -> Population:
    """Draw users, items and effects.

    Raises:
        EvergreenError: The scale cannot be drawn, or on some day fewer items are alive than a request has candidates.
    """
    scale.check(world)
    lives, rng = (np.random.default_rng([scale.seed, stream]) for stream in (_LIVES, _CHANCES))
    newcomers = min(round(world.market * scale.users), scale.users - 1)
    new = np.arange(scale.users) >= scale.users - newcomers
    centre_CK = _unit(lives.normal(size=(world.categories + _NEW_CATEGORIES * (newcomers > 0), _TASTES)))
    country_U = np.where(new, world.countries, lives.integers(0, world.countries, scale.users)).astype(np.int32)
    born_I, died_I, category_I = _lives(world, scale, newcomers, lives)
    home_GK = _unit(lives.normal(size=(world.countries + 1, _TASTES)))  # of the people of a country
    taste_UK = _unit(0.7 * home_GK[country_U] + _unit(lives.normal(size=(scale.users, _TASTES))))
    towards_UK = lives.normal(size=(scale.users, _TASTES))
    towards_UK = _unit(towards_UK - (towards_UK * taste_UK).sum(1, keepdims=True) * taste_UK)
    week = np.tile([1, 1, 1, 1, 1.1, 1.3, 1.3], -(-scale.days // 7))[: scale.days]
    until = np.rint(np.cumsum(week) / week.sum() * (scale.impressions // world.candidates)).astype(np.int64)
    found = Population(
        world=world,
        scale=scale,
        joined_U=np.where(new, half_time(scale.days), 0).astype(np.int32),
        country_U=country_U,
        activity_U=np.cumsum(np.exp(world.activity * lives.normal(size=scale.users))),
        taste_UK=taste_UK.astype(np.float32),
        towards_UK=towards_UK.astype(np.float32),
        born_I=born_I,
        died_I=died_I,
        category_I=category_I,
        format_I=lives.integers(0, world.formats, scale.items).astype(np.int32),
        vector_IK=_unit(centre_CK[category_I] + 0.7 * _unit(lives.normal(size=(scale.items, _TASTES)))).astype(
            np.float32
        ),
        quality_I=(world.quality * lives.normal(size=scale.items)).astype(np.float32),
        country_SGC=_country_effects(world, len(centre_CK), rng),
        format_SF=_format_effects(world, rng),
        shock_C=world.shock * rng.normal(size=len(centre_CK)),
        wave_C=rng.uniform(0, 2 * np.pi, len(centre_CK)),
        requests_D=np.diff(until, prepend=0),
    )
    fewest = min((len(found.alive(day)), day) for day in range(scale.days))
    if fewest[0] < world.candidates:
        raise EvergreenError(
            f"on day {fewest[1]} only {fewest[0]} items are alive, and a request has {world.candidates} candidates",
            "Ask for more items or fewer candidates",
        )
    return found


def blocks(population: Population, day: int) -> Iterator[Block]:
    """The requests of a day, in time order."""
    of_day, requests = _Day(population, day), int(population.requests_D[day])
    for start in range(0, requests, BLOCK):
        yield of_day.draw(start, min(start + BLOCK, requests))


class _Day:
    """What holds for a day, and the drawing of its blocks."""

    def __init__(self, population: Population, day: int) -> None:
        world = population.world
        self._population, self._world, self._day = population, world, day
        self._alive = population.alive(day)
        self._tastes_UK, self._effects_GCF = population.tastes(day), population.effects(day)
        age_A = day - population.born_I[self._alive]
        self._vector_AK = population.vector_IK[self._alive] * np.float32(world.taste)
        self._worth_A = population.quality_I[self._alive] + world.freshness * np.exp(-age_A / world.fade_days)
        self._worth_A = self._worth_A.astype(np.float32)
        users = int(np.searchsorted(population.joined_U, day, side="right"))
        self._activity_U = population.activity_U[:users]

    def draw(self, start: int, end: int) -> Block:
        """Requests `start` to `end` of the day."""
        world, people = self._world, self._population
        rng = np.random.default_rng([people.scale.seed, _CHANCES + 1, self._day, start])
        requests = end - start
        user_R = np.searchsorted(self._activity_U, rng.random(requests) * self._activity_U[-1], side="right")
        alive_RP = self._looked_at(rng, requests)
        known_RP = np.einsum("rk,rpk->rp", self._tastes_UK[user_R], self._vector_AK[alive_RP]) + self._worth_A[alive_RP]
        place_RN = self._shown(rng, known_RP)
        alive_RN, known_RN = (np.take_along_axis(x, place_RN, 1) for x in (alive_RP, known_RP))
        item_RN = self._alive[alive_RN]
        country_R1 = people.country_U[user_R][:, None]
        effect_RN = self._effects_GCF[country_R1, people.category_I[item_RN], people.format_I[item_RN]]
        truth_RN3 = chances(world, known_RN + effect_RN)
        looked_N = (1.0 + np.arange(world.candidates, dtype=np.float32)) ** np.float32(-world.examination)
        looked_RN = rng.random((requests, world.candidates), np.float32) < looked_N
        acted_RN3 = rng.random(truth_RN3.shape, np.float32) < truth_RN3
        return Block(
            first=int(people.requests_D[: self._day].sum()) + start,
            time_R=self._day * DAY_US + self._times(rng, start, end),
            user_R=user_R.astype(np.int32),
            item_RN=item_RN,
            truth_RN3=truth_RN3,
            acted_RN3=acted_RN3 & looked_RN[:, :, None],
        )

    def _looked_at(self, rng: np.random.Generator, requests: int) -> np.ndarray:
        """(R, P) distinct alive items: one from each of P nearly equal parts of a list shuffled for each block."""
        alive = len(self._alive)
        looked = min(_LOOKED_AT * self._world.candidates, alive)
        edge = np.arange(looked + 1) * alive // looked
        place_RP = edge[:-1] + (rng.random((requests, looked), np.float32) * np.diff(edge)).astype(np.int64)
        return rng.permutation(alive)[place_RP]

    def _shown(self, rng: np.random.Generator, known_RP: np.ndarray) -> np.ndarray:
        """(R, N) places in P that are shown, best first, by an old ranker that knows no season and no shock.

        Its order is relevance with Gumbel noise (a draw without replacement from softmax, Yellott 1977); a share of
        the requests is pure chance.
        """
        wanted = self._world.candidates
        relevant_R1 = rng.random((len(known_RP), 1), np.float32) >= self._world.explore
        noise_RP = -np.log(rng.standard_exponential(known_RP.shape, np.float32))
        key_RP = np.where(relevant_R1, -known_RP, 0) - _CHOICE * noise_RP
        return np.argsort(key_RP, axis=1)[:, :wanted]

    def _times(self, rng: np.random.Generator, start: int, end: int) -> np.ndarray:
        """(R,) ascending: the day's requests at equal steps of its rhythm, each at a random place within its step."""
        share_R = (np.arange(start, end) + rng.random(end - start)) / self._population.requests_D[self._day]
        rhythm = np.concatenate([[0], np.cumsum(_HOURS) / _HOURS.sum()])
        time_R = np.interp(share_R, rhythm, np.arange(25) * float(HOUR_US)).astype(np.int64)
        return np.minimum(time_R, DAY_US - 1)


def chances(world: World, utility: np.ndarray) -> np.ndarray:
    """(..., 3) float32: the chance of save, click and hide at a utility, were the item looked at."""
    logits = np.stack(
        [
            world.save_bias + utility,
            world.click_bias + world.click_slope * utility,
            world.hide_bias - utility,
        ],
        axis=-1,
    ).astype(np.float32)
    return 1 / (1 + np.exp(-logits))


def _lives(
    world: World, scale: Scale, newcomers: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Births, deaths (days) and categories of all items, sorted by birth; a new country's are born once it joins."""
    born_I = np.sort(np.floor(rng.uniform(-world.lifetime_days, scale.days, scale.items))).astype(np.int32)
    half = world.lifetime_days / 2
    life_I = np.ceil(half + rng.exponential(half, scale.items)).astype(np.int32)
    category_I = rng.integers(0, world.categories, scale.items)
    new_I = (born_I >= half_time(scale.days)) & (rng.random(scale.items) < world.market) & (newcomers > 0)
    category_I = np.where(new_I, world.categories + rng.integers(0, _NEW_CATEGORIES, scale.items), category_I)
    # Every item of the past has the rest of its life before it, so that none is dead from the start.
    return born_I, np.maximum(born_I, 0) + life_I, category_I.astype(np.int32)


def _country_effects(world: World, categories: int, rng: np.random.Generator) -> np.ndarray:
    """(S, G, C) float32: effects of seasons on categories, in common and in each country; over the seasons zero."""
    shape = (len(world.seasons), world.countries + 1, categories)
    common_SGC, own_SGC = rng.normal(size=(shape[0], 1, categories)), rng.normal(size=shape)
    total_SGC = np.zeros(shape)
    for strength, drawn in (
        (world.season_category, common_SGC),
        (world.season_country, own_SGC - own_SGC.mean(1, keepdims=True)),
    ):
        centred = drawn - drawn.mean(0, keepdims=True)
        total_SGC += strength * centred / max(centred.std(), 1e-9)
    return total_SGC.astype(np.float32)


def _format_effects(world: World, rng: np.random.Generator) -> np.ndarray:
    """(S, F) float32: a wave over the formats in random order that moves on with the seasons; zero over either.

    One season alone has no effects: there is nothing to compare it with.
    """
    seasons = len(world.seasons)
    phase_F = rng.permutation(world.formats) / world.formats
    wave_SF = np.cos(2 * np.pi * (phase_F - np.arange(seasons)[:, None] / seasons))
    return (np.sqrt(2) * world.season_format * wave_SF * (seasons > 1)).astype(np.float32)


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)
