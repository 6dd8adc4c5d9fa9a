"""What a simulated world is made of, as frozen dataclasses; four worlds by name.

A world says by which laws users and items behave, a `Scale` how many there are. Both together with the seed determine
every byte.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

from engagement.errors import EvergreenError

START = datetime(2020, 1, 6, tzinfo=UTC)  # a Monday
LONGEST = 1461  # days; keeps the whole feed in the past
IMPRESSIONS_A_DAY = 2  # of a user, on average, where no number is asked for


@dataclass(frozen=True)
class World:
    """The laws of a world. Strengths are in logits of the save.

    A save has the logit `save_bias + utility`, a click `click_bias + click_slope * utility`, a hide
    `hide_bias - utility`, and each of the three happens only where the item is examined. The utility is

        taste * cos(user's taste, item) + quality + freshness * exp(-age / fade_days)
        + popularity of the category + effect of (season, format)
        + effect of (season, country, category)

    Attributes:
        name: By which it is asked for.
        seasons: Names in turn, each `season_days` long, over and over; shown as the context feature `season`.
        season_days: Length of a season.
        season_category: Deviation of a category's effect in a season, the same for everyone.
        season_country: Deviation of the effect of a season on a category in one country, balanced over the countries,
            so that no popularity tells it. Of two seasons the one has the other's effects with the opposite sign.
        season_format: Deviation of a format's effect in a season. It is the model's weights that must hold it: no
            statistic is kept of formats, categories come in all of them, and items that live long saw both seasons.
        turn: Degrees a day by which each user's taste rotates.
        popularity: Deviation of a category's popularity, a wave of its own.
        popularity_turn: Degrees a day by which that wave moves on.
        shock: Deviation of the change of effects at half time; two weeks later half of it is gone, the rest stays.
        market: Share of the users that live in a new country, which joins at half time with categories of its own.
        countries: Countries besides a new one.
        formats: Formats of items, balanced over categories.
        categories: Categories besides those of a new country.
        taste: Strength of the taste.
        quality: Deviation of an item's quality.
        freshness: What a new item has on top.
        fade_days: In which that falls to 1/e.
        lifetime_days: Mean life of an item; none is shorter than half of it.
        candidates: Items in one request.
        explore: Share of the requests whose candidates are chosen and ordered at random, not by relevance.
        examination: Power e of the chance (1 + position) ** -e with which an item is looked at.
        activity: Deviation of the logarithm of a user's activity.
        save_bias, click_bias, hide_bias, click_slope: As above.
    """

    name: str
    seasons: tuple[str, ...] = ("ordinary",)
    season_days: int = 14
    season_category: float = 0.0
    season_country: float = 0.0
    season_format: float = 0.0
    turn: float = 0.2
    popularity: float = 0.3
    popularity_turn: float = 0.5
    shock: float = 0.0
    market: float = 0.0
    countries: int = 6
    formats: int = 6
    categories: int = 12
    taste: float = 2.0
    quality: float = 0.6
    freshness: float = 0.5
    fade_days: float = 7.0
    lifetime_days: float = 28.0
    candidates: int = 10
    explore: float = 0.5
    examination: float = 0.3
    activity: float = 1.0
    save_bias: float = -2.0
    click_bias: float = -1.2
    hide_bias: float = -3.5
    click_slope: float = 0.7


def recurring() -> World:
    """Six seasons of two weeks that come back: each has formats of its own that are saved, and a little else.

    Tuned until fine-tuning forgets the seasons that are away; training from scratch on everything does not.
    """
    return World(
        "recurring",
        seasons=("frost", "thaw", "bloom", "sun", "harvest", "fog"),
        season_category=0.2,
        season_country=0.5,
        season_format=1.8,
        taste=1.0,
        quality=0.4,
        turn=0.1,
        lifetime_days=168,
    )


def drift() -> World:
    """Tastes and the popularity of categories move steadily; nothing comes back within a quarter."""
    return World("drift", turn=1.5, popularity=1.2, popularity_turn=2.0)


def shock() -> World:
    """A holiday: at half time every category's effect changes for two weeks, then the world stays half changed."""
    return World("shock", shock=2.0)


def market() -> World:
    """A new country joins at half time, with other tastes and with items of new categories."""
    return World("market", market=0.3)


WORLDS: dict[str, Callable[[], World]] = {w.__name__: w for w in (recurring, drift, shock, market)}


def world(name: str) -> World:
    """The world of that name.

    Raises:
        EvergreenError: There is none.
    """
    if name not in WORLDS:
        raise EvergreenError(f"there is no world {name!r}", f"Choose one of {', '.join(WORLDS)}")
    return WORLDS[name]()


@dataclass(frozen=True)
class Scale:
    """How much of a world is drawn.

    Attributes:
        users: Users, those of a new country included.
        items: Items over the whole time; about a quarter of them is alive at once in 84 days.
        days: Days from `START` on.
        impressions: Rows, at most; whole requests are drawn.
        seed: Of everything random.
    """

    users: int
    items: int
    days: int
    impressions: int
    seed: int = 0

    @classmethod
    def of(cls, users: int, days: int, impressions: int | None = None, seed: int = 0) -> "Scale":
        """The scale for so many users: twice as many items, and at least so many that some 40 are alive at once."""
        items = max(2 * users, 40 * (days + 28) // 28)
        return cls(users, items, days, users * days * IMPRESSIONS_A_DAY if impressions is None else impressions, seed)

    def check(self, world: World) -> None:
        """Refuse what cannot be drawn.

        Raises:
            EvergreenError: A number is out of its range; the error names it and the range.
        """
        for name in ("users", "items", "days"):
            if getattr(self, name) < 1:
                raise EvergreenError(
                    f"a world of {getattr(self, name)} {name} is empty", f"Ask for at least 1 of {name}"
                )
        if self.days > LONGEST:
            raise EvergreenError(f"{self.days} days reach into the future", f"Ask for at most {LONGEST}")
        if self.seed < 0:
            raise EvergreenError(f"the seed {self.seed} is negative", "Choose 0 or more")
        if self.impressions < world.candidates:
            raise EvergreenError(
                f"{self.impressions} impressions are less than one request of {world.candidates} candidates",
                f"Ask for at least {world.candidates}",
            )
        if world.candidates > self.items:
            raise EvergreenError(
                f"a request has {world.candidates} candidates, and there are only {self.items} items",
                "Ask for more items or fewer candidates",
            )
