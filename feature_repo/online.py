"""What serving reads: one user and the candidates out of the online store, as a ranking table of one request.

Feast is not imported here: a serving process reads packed rows (`packed`, `online_rows`) in one batch, and in a second
one what belongs to the candidates' categories. A reader notices by the stamp that it reads with every batch that the
rows stand for a new instant, and by the link `online/current` that another generation is served; it then reads again,
so that a request never mixes two states (see `generations`).

What was read is remembered for a while, row by row, so that a request can also be answered from memory when the store
does not answer (`OnlineReader.remembered`).
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
import pyarrow as pa

from engagement.errors import EvergreenError
from engagement.index import from_us, to_us
from engagement.table import RankingTable, TableSpec
from feature_repo.encode import age_days, blank, fill, request_values
from feature_repo.features import HISTORY, ITEM_CATEGORY, ITEM_CREATED
from feature_repo.generations import STAMP, Generation, check_stamp, served
from feature_repo.online_cache import CACHE_ROWS, PAIR_ROWS, USER_ROWS
from feature_repo.online_rooms import Room, Wanted
from feature_repo.packed import NEVER, row_key
from feature_repo.requests import CONTEXT

# Columns of the items that are no features: by which the category views are read, and what gives the age.
_CATEGORY, _CREATED = f"item_profile__{ITEM_CATEGORY}", f"item_profile__{ITEM_CREATED}"
_NO_ACTIONS = np.empty(0, np.int64)


@dataclass(frozen=True)
class Reading:
    """The features of one request.

    Attributes:
        table: The request as a ranking table with R = 1, no label set.
        as_of: The instant whose knowledge the store held.
    """

    table: RankingTable
    as_of: datetime


class OnlineReader:
    """Reads the features of one ranking request; safe to share between threads.

    Args:
        root: The feature repository of a home.
        url: Address of the Redis that holds the rows; empty for SQLite under the home.
        cache_rows: How many items and how many categories are kept for a short while; 0 for none.
        patience: Seconds to wait for the store; None: as long as suits whoever writes.

    Raises:
        EvergreenError: Nothing was materialised yet, what was is damaged, or the store does not answer.
    """

    def __init__(self, root: Path, url: str = "", cache_rows: int = CACHE_ROWS, patience: float | None = None) -> None:
        self._root, self._url, self._cache_rows = Path(root).resolve(), url, cache_rows
        self._patience = patience
        self._lock = threading.Lock()
        self._version = self._open(served(self._root))

    @property
    def spec(self) -> TableSpec:
        """The declaration of the generation that is served."""
        return self._version.spec

    @property
    def as_of(self) -> datetime:
        """The instant whose knowledge was served last."""
        return from_us(self._version.as_of_us)

    def read(self, user_id: str, item_ids: list[str], context: dict[str, str], at: datetime) -> RankingTable:
        """The table of a `reading`."""
        return self.reading(user_id, item_ids, context, at).table

    def reading(self, user_id: str, item_ids: list[str], context: dict[str, str], at: datetime) -> Reading:
        """Features of one request, candidates in the order given.

        Unknown users and items have nulls, and so has whatever is older than its view's time to live at `at`.

        Args:
            user_id: Who asks.
            item_ids: The candidates, N >= 1.
            context: Context features by their name in the manifest; others are ignored, absent ones are null.
            at: When the request is ranked.

        Raises:
            EvergreenError: There is no candidate, or the store does not answer.
        """
        if not item_ids:
            raise EvergreenError("a ranking request without candidates", "Send at least one item id")
        items = [i.encode() for i in item_ids]
        version, found = self._read(user_id, items, to_us(at))
        return _reading(version, found, user_id, items, context, to_us(at))

    def remembered(self, user_id: str, item_ids: list[str], context: dict[str, str], at: datetime) -> Reading | None:
        """The same from what earlier readings left in memory; the store is not asked.

        What is not known of an item is null. Rows may be of different states of the store; `as_of` is the last.

        Returns:
            None if nothing is known of the user.
        """
        version, items = self._version, [i.encode() for i in item_ids]
        found = version.remembered(user_id, items, to_us(at))
        return None if found is None else _reading(version, found, user_id, items, context, to_us(at))

    def _read(self, user_id: str, item_ids: list[bytes], at_us: int) -> tuple["_Version", "_Found"]:
        """What is found, all of one state of the store, and in which generation."""
        while True:
            target = served(self._root)
            try:
                if target != self._version.directory:
                    with self._lock:
                        if target != self._version.directory:
                            self._version = self._open(target)
                version = self._version
                found = version.read(user_id, item_ids, at_us)
            except EvergreenError:
                if target == served(self._root):
                    raise
                continue
            # The rows of a generation may be removed as soon as the link has left it.
            if found is not None and version.directory == served(self._root):
                return version, found

    def _open(self, directory: Path) -> "_Version":
        return _Version(Generation.load(directory), self._url, self._cache_rows, self._patience)


@dataclass(frozen=True)
class _Found:
    """What a request is told by the store; N candidates.

    Attributes:
        user: The user's row, (1,).
        items: The candidates' rows, (N,).
        item_cat: (N, C) hashes of the candidates.
        item_num: (N, D) numbers of the candidates, without what follows from the request's time.
        as_of_us: Microseconds of the store's instant.
    """

    user: np.ndarray
    items: np.ndarray
    item_cat: np.ndarray
    item_num: np.ndarray
    as_of_us: int


class _Version:
    """One generation, open for reading."""

    def __init__(self, generation: Generation, url: str, cache_rows: int, patience: float | None) -> None:
        self.directory, self.spec = generation.directory, generation.spec
        self._rows = generation.rows(url, patience)
        self.user, self._pair = Room(self.spec, ("user",), USER_ROWS), Room(self.spec, ("user", "category"), PAIR_ROWS)
        self._item, self._category = (Room(self.spec, (e,), cache_rows) for e in ("item", "category"))
        self.as_of_us = check_stamp(self._rows.get([STAMP])[0], self.directory)

    def read(self, user_id: str, item_ids: list[bytes], at_us: int) -> _Found | None:
        """What has not expired; None when the store moved on meanwhile and all is to be read again."""
        state = self.as_of_us
        user, items = Wanted.unread(self.user, [user_id.encode()]), Wanted.cached(self._item, item_ids, state)
        waiting = [user]
        if len(items.missing):
            if not self._fetch(state, [user, items]):
                return None
            waiting = []
        # Where no item was missing, the categories are known already, and everything is read together.
        names, category_N = self._categories(items, at_us)
        pairs = Wanted.unread(self._pair, [row_key(user_id, name) for name in names])
        categories = Wanted.cached(self._category, [name.encode() for name in names], state)
        waiting += [wanted for wanted in (pairs, categories) if len(wanted.missing)]
        if waiting and not self._fetch(state, waiting):
            return None
        return self._found(user, items, (pairs, categories), category_N, state, at_us)

    def remembered(self, user_id: str, item_ids: list[bytes], at_us: int) -> _Found | None:
        """The same from memory; None when nothing is known of the user."""
        user = Wanted.known(self.user, [user_id.encode()])
        if len(user.missing):
            return None
        items = Wanted.known(self._item, item_ids)
        names, category_N = self._categories(items, at_us)
        pairs = Wanted.known(self._pair, [row_key(user_id, name) for name in names])
        categories = Wanted.known(self._category, [name.encode() for name in names])
        return self._found(user, items, (pairs, categories), category_N, self.as_of_us, at_us)

    def _fetch(self, state: int, wanted: Sequence[Wanted]) -> bool:
        """Read all that is missing in one read; False when the store is not in the state that it was thought to be."""
        absent = [w.absent() for w in wanted]
        groups = [(c.view.name, keys) for w, keys in zip(wanted, absent, strict=True) for c in w.room.codecs]
        stamp, *packed = self._rows.get([STAMP, *groups])
        self.as_of_us = check_stamp(stamp, self.directory)
        if self.as_of_us != state:
            return False
        for w, keys in zip(wanted, absent, strict=True):
            own, packed = packed[: len(w.room.codecs)], packed[len(w.room.codecs) :]
            w.room.cache.put(keys, w.take(keys, own), state)
        return True

    def _categories(self, items: Wanted, at_us: int) -> tuple[list[str], np.ndarray]:
        """The items' categories, each once, and (N,) the place of each item's among them, -1 for none."""
        self._item.expire(items.rows, at_us)
        if not self._category.codecs:
            return [], np.full(len(items.rows), -1)
        of_items = items.rows[_CATEGORY].tolist()
        names = [name for name in dict.fromkeys(of_items) if name is not None]
        place = {name: i for i, name in enumerate(names)} | {None: -1}
        return names, np.array([place[name] for name in of_items])

    def _found(
        self,
        user: Wanted,
        items: Wanted,
        of_categories: Sequence[Wanted],
        category_N: np.ndarray,
        state: int,
        at_us: int,
    ) -> _Found:
        cat, num = blank(self.spec, "candidate", len(items.rows))
        self.user.expire(user.rows, at_us)
        self._item.write(items.rows, slice(None), cat, num)
        where = np.flatnonzero(category_N >= 0)
        for wanted in of_categories:
            wanted.room.expire(wanted.rows, at_us)
            wanted.room.write(wanted.rows[category_N[where]], where, cat, num)
        return _Found(user.rows, items.rows, cat, num, state)


def _reading(
    version: _Version, found: _Found, user_id: str, item_ids: list[bytes], context: dict[str, str], at_us: int
) -> Reading:
    spec, user, time = version.spec, found.user, np.array([at_us], np.int64)
    history = {n: _NO_ACTIONS if (v := user[f"user_history__{n}"][0]) is None else v for n, _ in HISTORY}
    earlier = history["known"] < at_us  # a replayed request must not see what came after it
    shown = history["time"][earlier]
    last = shown[-1:].astype(np.float64) if len(shown) else np.array([np.nan])
    named = {f.name: context.get(f.name.removeprefix(CONTEXT)) for f in spec.features if f.name.startswith(CONTEXT)}
    request_cat, request_num = blank(spec, "request", 1)
    version.user.write(user, slice(None), request_cat, request_num)
    raw = {n: pa.array([value], pa.string()) for n, value in named.items()} | request_values(time, last)
    fill(spec, "request", raw, request_cat, request_num)
    created_us = found.items[_CREATED]
    age = np.where(created_us == NEVER, np.nan, age_days(time, created_us))
    fill(spec, "candidate", {"item_age_days": age}, found.item_cat, found.item_num)
    table = RankingTable(
        spec=spec,
        request_id=np.array([b""]),
        user_id=np.array([user_id.encode()]),
        time=time,
        offsets=np.array([0, len(item_ids)], np.int64),
        history_start=np.zeros(1, np.int64),
        history_end=np.array([len(shown)], np.int64),
        request_cat=request_cat,
        request_num=request_num,
        item_id=np.array(item_ids),
        item_cat=found.item_cat,
        item_num=found.item_num,
        labels=np.zeros((len(item_ids), len(spec.actions)), np.uint8),
        sampled=np.zeros(len(item_ids), bool),
        history_time=shown,
        history_item=history["item"][earlier],
        history_actions=history["actions"][earlier],
    )
    return Reading(table, from_us(found.as_of_us))
