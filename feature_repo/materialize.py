"""Publishing the values as of an instant: into the served generation where that is only moved on, or as a new one.

Readers see the store of before until everything is there: on SQLite an update in place is one transaction, and a new
generation is served by moving a link when it is whole. Redis has no transaction of that length: there an update in
place shows row by row, each of them whole and none older than before. Killed anywhere, it is done by doing it again.
"""

import contextlib
import io
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from engagement.errors import EvergreenError
from engagement.index import to_us
from feature_repo import definitions
from feature_repo.features import View, views
from feature_repo.generations import (
    CURRENT,
    Generation,
    directories,
    fresh_directory,
    remove,
    serve,
    served,
    settled,
    stamp,
    store_mark,
)
from feature_repo.online_rows import OnlineRows
from feature_repo.packed import row_keys
from feature_repo.views import Inputs

_EVER = datetime(1, 1, 1, tzinfo=UTC)  # not 1970: films are older


def materialize(root: Path, url: str, offline: str, inputs: Inputs) -> None:
    """Publish the values as of a snapshot whose views are built; the caller sees to it that nobody else does.

    Args:
        root: The feature repository.
        url: Address of the Redis that holds the rows; empty for SQLite.
        offline: Who materialises: `asof` or `spark`.
        inputs: The snapshot.

    Raises:
        EvergreenError: Spark is asked to write into SQLite, or the store does not answer.
    """
    if offline == "spark" and not url:
        raise EvergreenError(
            "Spark's workers cannot write into a SQLite file", "Set EVERGREEN_ONLINE_STORE to a Redis address"
        )
    before = _published(root)
    for directory in directories(root):
        if before is None or directory != before.directory:
            remove(directory, url)  # what a killed run left
    after = _Next(inputs, url, offline)
    if before is None or not after.extends(before):
        after.fill_anew(root, before)
    elif before.as_of != inputs.snapshot.as_of or before.snapshot != inputs.snapshot.digest:
        after.update(root, before)


class _Next:
    """The state to be published."""

    def __init__(self, inputs: Inputs, url: str, offline: str) -> None:
        self._snapshot, self._spec, self._url, self._offline = inputs.snapshot, inputs.spec, url, offline
        # By leaves, so that a compaction of the log is no change.
        self._leaves = [(p.room, leaf) for p in inputs.snapshot.files for leaf in p.seen(to_us(inputs.snapshot.as_of))]
        self._files = {leaf.path: leaf.sha256 for _, leaf in self._leaves}

    def extends(self, before: Generation) -> bool:
        """Whether this is `before` and what became known since, so that its rows can be moved on in place."""
        new = [leaf for room, leaf in self._leaves if room == "engagements" and leaf.path not in before.files]
        late = any(leaf.known_from < to_us(before.as_of) for leaf in new)
        same = before.files.items() <= self._files.items() and before.spec == self._spec
        if late or not same or self._snapshot.as_of < before.reaching or before.store != store_mark(self._url):
            return False
        try:
            before.rows(self._url)
        except EvergreenError:
            return False  # Redis came back empty, or the file is damaged
        return True

    def update(self, root: Path, before: Generation) -> None:
        """Write what became known since into the served generation."""
        as_of = self._snapshot.as_of
        # Were this run killed, nothing earlier than `as_of` may be published on top of what it wrote.
        self._generation(before.directory, before.as_of, reaching=as_of).save()
        rooms = {room for room, leaf in self._leaves if leaf.path not in before.files}
        profiles = {"user_profile": "users" in rooms, "item_profile": "items" in rooms}
        # New profile rows may be valid from any instant; everything else became known only since `before`.
        since = {v: _EVER if profiles.get(v.name) else before.as_of for v in views(self._spec)}
        self._write(root, root / CURRENT, since)
        self._generation(before.directory, as_of, reaching=as_of).save()

    def fill_anew(self, root: Path, before: Generation | None) -> None:
        """Fill a new generation, serve it and remove the one before."""
        as_of = self._snapshot.as_of
        directory = fresh_directory(root, as_of)
        # What has expired by `as_of` has expired for every later request.
        since = {v: as_of - v.ttl if v.ttl else _EVER for v in views(self._spec)}
        rows = self._write(root, directory, since)
        self._generation(directory, as_of, reaching=as_of).save()
        with settled(directory.parent, exclusive=True):
            if before is not None and before.reaching <= as_of:
                self._carry(before, rows)
            serve(directory)
        if before is not None:
            remove(before.directory, self._url)

    def _carry(self, before: Generation, rows: OnlineRows) -> None:
        """Take over the histories that were streamed since `as_of`: the views do not know of them yet."""
        histories = [v for v in views(self._spec) if not v.offline and v in views(before.spec)]
        if before.store != store_mark(self._url) or before.spec.actions != self._spec.actions:
            return
        try:
            found = before.rows(self._url)
        except EvergreenError:
            return  # they are gone
        with rows.transaction():
            for view in histories:
                for keys, packed in found.scan(view.name, after_us=to_us(self._snapshot.as_of)):
                    rows.put(view.name, keys, packed)

    def _write(self, root: Path, online: Path, since: dict[View, datetime]) -> OnlineRows:
        """Let Feast materialise the views, each with what became known since an instant, and stamp the rows."""
        store = definitions.open_store(root, online=online, url=self._url, offline=self._offline)
        provider: Any = store.provider
        rows: OnlineRows = provider.online_store.rows(store.config)
        quiet = io.StringIO()
        with rows.transaction(), contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
            for view, start in since.items():
                store.materialize(start, self._snapshot.as_of, feature_views=[view.name])
            stamp(rows, self._snapshot.as_of)
        return rows

    def _generation(self, directory: Path, as_of: datetime, reaching: datetime) -> Generation:
        return Generation(
            directory, self._spec, as_of, reaching, self._snapshot.digest, self._files, store_mark(self._url)
        )


def _published(root: Path) -> Generation | None:
    try:
        return Generation.load(served(root))
    except EvergreenError:
        return None  # nothing yet, or nothing that could be read: it is made anew


def forget_user(root: Path, url: str, user_id: str) -> int:
    """Delete a user's rows from every view of every generation; returns how many there were."""
    deleted = 0
    for directory in directories(root):
        try:
            generation = Generation.load(directory)
            rows = generation.rows(url)
        except EvergreenError:
            if not (root / CURRENT).exists() or directory != served(root):
                remove(directory, url)  # what a killed run left
                continue
            raise
        for view in views(generation.spec):
            if "user" in view.entities:
                deleted += sum(rows.delete(view.name, keys) for keys in _keys_of(view, user_id, rows))
    return deleted


def _keys_of(view: View, user_id: str, rows: OnlineRows) -> Iterator[list[bytes]]:
    """The keys of a view that belong to a user, who is the first of its entities."""
    if view.keys == ("user_id",):
        yield [user_id.encode()]
        return
    others = {n: [""] for n in view.keys if n != "user_id"}
    for keys, _ in rows.scan(view.name, prefix=row_keys(view, {"user_id": [user_id], **others})[0]):
        yield keys
