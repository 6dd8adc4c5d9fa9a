"""What serving reads: one user and the candidates out of the online store, as a ranking table of one request.

Feast is not imported here: a serving process reads packed rows (`packed`, `online_rows`) in one batch, and in a second
one what belongs to the candidates' categories. A reader notices by the stamp that it reads with every batch that the
rows stand for a new instant, and by the link `online/current` that another generation is served; it then reads again,
so that a request never mixes two states (see `generations`).
"""

import threading
from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from engagement.errors import EvergreenError
from engagement.index import from_us, to_us
from engagement.table import RankingTable, TableSpec
from feature_repo.assemble import RawTable
from feature_repo.features import HISTORY, Entity, View, views
from feature_repo.generations import STAMP, Generation, check_stamp, served
from feature_repo.online_cache import CACHE_ROWS, RowCache, Rows
from feature_repo.packed import Codec, row_keys
from feature_repo.requests import CONTEXT

_CATEGORY = "item_profile___category"  # the item's category by which the category views are read
Values = dict[str, pa.Array | np.ndarray]


class OnlineReader:
    """Reads the features of one ranking request; safe to share between threads.

    Args:
        root: The feature repository of a home.
        url: Address of the Redis that holds the rows; empty for SQLite under the home.
        cache_rows: How many items and how many categories are kept for a short while; 0 for none.

    Raises:
        EvergreenError: Nothing was materialised yet, what was is damaged, or the store does not answer.
    """

    def __init__(self, root: Path, url: str = "", cache_rows: int = CACHE_ROWS) -> None:
        self._root, self._url, self._cache_rows = Path(root).resolve(), url, cache_rows
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
        """Features of one request, candidates in the order given.

        Unknown users and items have nulls, and so has whatever is older than its view's time to live at `at`.

        Args:
            user_id: Who asks.
            item_ids: The candidates, N >= 1.
            context: Context features by their name in the manifest; others are ignored, absent ones are null.
            at: When the request is ranked.

        Returns:
            A table with R = 1, no label set.

        Raises:
            EvergreenError: There is no candidate, or the store does not answer.
        """
        if not item_ids:
            raise EvergreenError("a ranking request without candidates", "Send at least one item id")
        at_us = to_us(at)
        spec, user, items = self._values(user_id, item_ids, at_us)
        names = [f.name for f in spec.features if f.name.startswith(CONTEXT)]
        values = {n: pa.array([context.get(n.removeprefix(CONTEXT))], pa.string()) for n in names}
        time, known, actions, item = (pc.list_flatten(user.pop(f"user_history__{n}")) for n, _ in HISTORY)
        shown = time.to_numpy()
        earlier = known.to_numpy() < at_us  # a replayed request must not see what came after it
        raw = RawTable(
            spec=spec,
            request_id=pa.array([""]),
            user_id=pa.array([user_id]),
            time=np.array([at_us], np.int64),
            offsets=np.array([0, len(item_ids)], np.int64),
            request={**user, **values},
            item_id=pa.array(item_ids),
            candidate=items,
            labels=np.zeros((len(item_ids), len(spec.actions)), np.uint8),
            sampled=np.zeros(len(item_ids), bool),
            history_start=np.zeros(1, np.int64),
            history_end=np.array([earlier.sum()], np.int64),
            history_time=shown[earlier],
            history_item=item.filter(pa.array(earlier)),
            history_actions=actions.to_numpy()[earlier],
        )
        return raw.table()

    def _values(self, user_id: str, item_ids: list[str], at_us: int) -> tuple[TableSpec, Values, Values]:
        """The declaration, values of the user (1,) and of the candidates (N,), all of one state of the store."""
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
                return version.spec, *found

    def _open(self, directory: Path) -> "_Version":
        return _Version(Generation.load(directory), self._url, self._cache_rows)


class _Version:
    """One generation, open for reading."""

    def __init__(self, generation: Generation, url: str, cache_rows: int) -> None:
        self.directory, self.spec = generation.directory, generation.spec
        self._rows = generation.rows(url)
        codecs = [Codec(v) for v in views(generation.spec)]
        self._user, self._item = (_about(codecs, ("user",)), _about(codecs, ("item",)))
        self._category = _about(codecs, ("category",))
        self._user_category = _about(codecs, ("user", "category"))
        self._items, self._categories = RowCache("item", cache_rows), RowCache("category", cache_rows)
        self.as_of_us = check_stamp(self._rows.get([STAMP])[0], self.directory)

    def read(self, user_id: str, item_ids: list[str], at_us: int) -> tuple[Values, Values] | None:
        """Values of the user and of the candidates; None when the store moved on meanwhile and all is to be read again.

        Expired values are null.
        """
        user_keys, item_keys = [user_id.encode()], [i.encode() for i in item_ids]
        rows = self._get(self._user, user_keys, self._item, item_keys, self._items)
        if rows is None:
            return None
        of_user, of_items = rows
        user: Values = {}
        for codec, packed in zip(self._user, of_user, strict=True):
            user |= _alive(codec, packed, at_us)
        items: Values = {}
        for codec, packed in zip(self._item, of_items, strict=True):
            items |= _alive(codec, packed, at_us)
        if self._category or self._user_category:
            more = self._of_categories(user_id, items[_CATEGORY], at_us)
            if more is None:
                return None
            items |= more
        return user, items

    def _of_categories(self, user_id: str, category: pa.Array, at_us: int) -> Values | None:
        """Values of each candidate's category, and of the user with it; null where an item has none."""
        coded = category.dictionary_encode()
        names = coded.dictionary.to_pylist()
        of_candidate = pc.fill_null(coded.indices, len(names)).to_pylist()
        pair = self._user_category[0].view if self._user_category else None
        keys = row_keys(pair, {"user_id": [user_id] * len(names), "category": names}) if pair else []
        rows = self._get(self._user_category, keys, self._category, [n.encode() for n in names], self._categories)
        if rows is None:
            return None
        found: Values = {}
        for codec, packed in zip([*self._user_category, *self._category], [*rows[0], *rows[1]], strict=True):
            rows_or_none = [*packed, None]
            found |= _alive(codec, [rows_or_none[i] for i in of_candidate], at_us)
        return found

    def _get(
        self,
        plain: Sequence[Codec],
        plain_keys: list[bytes],
        cached: Sequence[Codec],
        cached_keys: list[bytes],
        cache: RowCache,
    ) -> tuple[list[list[bytes | None]], list[list[bytes | None]]] | None:
        """Rows of two sets of views, the second by way of the cache; None when the store moved on.

        Returns:
            For each set a list a view, with a row a key.
        """
        known = cache.get(cached_keys)
        missing = list(dict.fromkeys(k for k in cached_keys if k not in known))
        first = [(c.view.name, plain_keys) for c in plain]
        rest = [(c.view.name, missing) for c in cached]
        found = self._rows.get([STAMP, *first, *rest])
        as_of_us = check_stamp(found[0], self.directory)
        if as_of_us != self.as_of_us:
            self._items.clear()
            self._categories.clear()
            self.as_of_us = as_of_us
            return None
        read: dict[bytes, Rows] = dict(zip(missing, zip(*found[1 + len(first) :], strict=True), strict=True))
        cache.put(read)
        known |= read
        together = [[known[k][i] for k in cached_keys] for i in range(len(cached))]
        return found[1 : 1 + len(first)], together


def _about(codecs: Sequence[Codec], entities: tuple[Entity, ...]) -> list[Codec]:
    return [c for c in codecs if c.view.entities == entities]


def _alive(codec: Codec, rows: Sequence[bytes | None], at_us: int) -> Values:
    """The values of a view's rows by feature name; null where there is no row or it has expired."""
    view: View = codec.view
    if view.ttl:
        oldest = at_us - view.ttl // timedelta(microseconds=1)
        rows = [r if r and int.from_bytes(r[:8], "little", signed=True) >= oldest else None for r in rows]
    return {f"{view.name}__{n}": v for n, v in codec.columns(rows).items()}
