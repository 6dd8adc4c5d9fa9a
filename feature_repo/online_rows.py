"""Where the packed rows of the online store lie: SQLite on one machine, Redis on a cluster.

A row is what `packed.Codec` makes; here it is bytes that begin with (event, created). Of two rows of one key the newer
by that pair stays, whatever order they come in; of two with the same pair the one that was written last, so that a
repeated write changes nothing and a completed one takes the place of its first part.
"""

import contextlib
import itertools
import re
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from engagement.errors import EvergreenError
from feature_repo.packed import HEADER, instants

Wanted = Sequence[tuple[str, Sequence[bytes]]]  # (view, keys) groups

_SCHEMA = """
CREATE TABLE IF NOT EXISTS rows (
  view TEXT NOT NULL, key BLOB NOT NULL, event INTEGER NOT NULL, created INTEGER NOT NULL, value BLOB NOT NULL,
  PRIMARY KEY (view, key)
) WITHOUT ROWID
"""
_PUT = """
INSERT INTO rows VALUES (?, ?, ?, ?, ?)
ON CONFLICT DO UPDATE SET event = excluded.event, created = excluded.created, value = excluded.value
WHERE (excluded.event, excluded.created) >= (event, created)
"""
_SCAN = """
SELECT key, value FROM rows WHERE view = ? AND key >= ? AND key < ? AND event > ? ORDER BY key LIMIT 10000
"""
_SQLITE_VARIABLES = 30_000  # its limit is 32,766 a statement
_BUSY_SECONDS = 60.0
_REDIS_CHUNK = 2_000  # keys a script; bounds how long Redis serves nobody else
_REDIS_SECONDS = 10.0
READER_SECONDS = 1.0
"""A ranking waits much less for its features (`serving.degrade`): a read that nobody waits for any more ends then."""

# KEYS: the rows' keys; ARGV: the rows.
_PUT_SCRIPT = """
for i, key in ipairs(KEYS) do
  local old = redis.call('GETRANGE', key, 0, 15)
  local keep = false
  if #old == 16 then
    local event, created = struct.unpack('<i8<i8', old)
    local newer_event, newer_created = struct.unpack('<i8<i8', ARGV[i])
    keep = event > newer_event or (event == newer_event and created > newer_created)
  end
  if not keep then redis.call('SET', key, ARGV[i]) end
end
"""


class OnlineRows(Protocol):
    """The packed rows of one generation; safe to share between threads."""

    def get(self, wanted: Wanted) -> list[list[bytes | None]]:
        """The rows of each group's keys in their order, None where there is none; one read for all groups."""
        ...

    def put(self, view: str, keys: Sequence[bytes], rows: Sequence[bytes]) -> None:
        """Store rows unless a newer one is there."""
        ...

    def delete(self, view: str, keys: Sequence[bytes]) -> int:
        """Remove rows; returns how many there were."""
        ...

    def scan(self, view: str, prefix: bytes = b"", after_us: int = -1) -> Iterator[tuple[list[bytes], list[bytes]]]:
        """A view's rows with keys that begin so, of events after an instant, in blocks of keys and rows."""
        ...

    def clear(self) -> None:
        """Remove all rows of the generation."""
        ...

    def transaction(self) -> contextlib.AbstractContextManager[None]:
        """Everything put inside appears at once where the store can do that (SQLite), and piece by piece elsewhere."""
        ...


class SQLiteRows:
    """Rows in one SQLite file, for any number of threads and processes.

    A read is one statement and therefore sees one state. Each thread has a connection of its own.

    Args:
        path: The file; made if it is not there, its directory is not.
        patience: Seconds to wait for others who lock the file.

    Raises:
        EvergreenError: The file cannot be opened or is no database.
    """

    def __init__(self, path: Path, patience: float | None = None) -> None:
        self.path = Path(path)
        self._patience = _BUSY_SECONDS if patience is None else patience
        self._local = threading.local()
        with self._told():
            # A reader does not wait for a writer to end, nor a writer for readers.
            self._connection().execute("PRAGMA journal_mode = WAL")
            self._connection().execute(_SCHEMA)

    def get(self, wanted: Wanted) -> list[list[bytes | None]]:
        """See `OnlineRows`; beyond 30,000 keys it takes several reads of one transaction."""
        pieces = [(v, list(keys[i : i + _SQLITE_VARIABLES])) for v, keys in wanted for i in _starts(keys)]
        found: dict[str, dict[bytes, bytes]] = {view: {} for view, _ in wanted}
        with self._told(), self._reading(len(pieces)) as connection:
            for batch in _batches(pieces, _SQLITE_VARIABLES):
                for view, key, value in connection.execute(_select(batch), _flat(batch)):
                    found[view][key] = value
        return [[found[view].get(key) for key in keys] for view, keys in wanted]

    def put(self, view: str, keys: Sequence[bytes], rows: Sequence[bytes]) -> None:
        """See `OnlineRows`; one transaction."""
        # In the order of the keys, the tree is filled page by page instead of all over.
        order = sorted(range(len(keys)), key=keys.__getitem__)
        event, created = instants(rows)
        with self.transaction(), self._told():
            self._connection().executemany(_PUT, ((view, keys[i], event[i], created[i], rows[i]) for i in order))

    def delete(self, view: str, keys: Sequence[bytes]) -> int:
        """See `OnlineRows`."""
        with self.transaction(), self._told():
            done = self._connection().executemany(
                "DELETE FROM rows WHERE view = ? AND key = ?", ((view, k) for k in keys)
            )
        return done.rowcount

    def scan(self, view: str, prefix: bytes = b"", after_us: int = -1) -> Iterator[tuple[list[bytes], list[bytes]]]:
        """See `OnlineRows`."""
        start, end = prefix, prefix + b"\xff" * 256
        while True:
            with self._told():
                found = self._connection().execute(_SCAN, (view, start, end, after_us)).fetchall()
            if not found:
                return
            yield [k for k, _ in found], [v for _, v in found]
            start = found[-1][0] + b"\0"  # the smallest key beyond

    def clear(self) -> None:
        """See `OnlineRows`."""
        with self.transaction(), self._told():
            self._connection().execute("DELETE FROM rows")

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """What this thread puts and deletes inside is there at the end, all of it or nothing; may be nested."""
        connection = self._connection()
        if connection.in_transaction:
            yield
            return
        with self._told():
            connection.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            connection.rollback()
            raise
        with self._told():
            connection.commit()

    @contextlib.contextmanager
    def _reading(self, statements: int) -> Iterator[sqlite3.Connection]:
        connection = self._connection()
        if statements <= 1 or connection.in_transaction:
            yield connection
            return
        connection.execute("BEGIN")
        try:
            yield connection
        finally:
            connection.rollback()

    def _connection(self) -> sqlite3.Connection:
        connection = getattr(self._local, "connection", None)
        if connection is None:
            with self._told():
                # Autocommit: transactions begin and end where this module says so.
                connection = sqlite3.connect(self.path, timeout=self._patience, isolation_level=None)
                connection.execute("PRAGMA synchronous = NORMAL")  # in WAL mode: whole after a crash
                connection.execute("PRAGMA mmap_size = 1073741824")
            self._local.connection = connection
        return connection

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise EvergreenError(
                f"the online features in {self.path} cannot be used ({error})", "Run evergreen retrain"
            ) from error


class RedisRows:
    """Rows in a Redis under `<prefix>:<view>:<key>`.

    Args:
        url: As `redis://host:port/db`.
        prefix: What sets a generation's rows apart from all others.
        patience: Seconds to wait for an answer, or for a connection; then a call fails, after one more try at once.

    Raises:
        EvergreenError: The address cannot be understood; from every method: Redis does not answer.
    """

    def __init__(self, url: str, prefix: str, patience: float | None = None) -> None:
        import redis
        from redis.backoff import NoBackoff
        from redis.retry import Retry

        parts = urlsplit(url)
        self._address, self._prefix = f"{parts.hostname}:{parts.port or 6379}", prefix  # without a password
        self._errors = redis.RedisError
        try:
            seconds = _REDIS_SECONDS if patience is None else patience
            # Without being told, the client makes many more tries, with pauses of seconds between them.
            retry = {} if patience is None else {"retry": Retry(NoBackoff(), 1)}
            self._client: Any = redis.Redis.from_url(
                url, socket_timeout=seconds, socket_connect_timeout=seconds, **retry
            )
        except ValueError as error:
            raise EvergreenError(
                f"the address of the online store is none of a Redis ({error})", "Set it as redis://host:port/db"
            ) from error
        self._script = self._client.register_script(_PUT_SCRIPT)

    def get(self, wanted: Wanted) -> list[list[bytes | None]]:
        """See `OnlineRows`; one MGET."""
        names = [name for view, keys in wanted for name in self._names(view, keys)]
        if not names:
            return [[] for _ in wanted]
        with self._told():
            found = iter(self._client.mget(names))
        return [list(itertools.islice(found, len(keys))) for _, keys in wanted]

    def put(self, view: str, keys: Sequence[bytes], rows: Sequence[bytes]) -> None:
        """See `OnlineRows`; one script a chunk of keys."""
        names = self._names(view, keys)
        with self._told():
            for i in range(0, len(names), _REDIS_CHUNK):
                self._script(keys=names[i : i + _REDIS_CHUNK], args=rows[i : i + _REDIS_CHUNK])

    def delete(self, view: str, keys: Sequence[bytes]) -> int:
        """See `OnlineRows`."""
        names = self._names(view, keys)
        with self._told():
            return sum(self._client.unlink(*names[i : i + _REDIS_CHUNK]) for i in range(0, len(names), _REDIS_CHUNK))

    def scan(self, view: str, prefix: bytes = b"", after_us: int = -1) -> Iterator[tuple[list[bytes], list[bytes]]]:
        """See `OnlineRows`."""
        start = len(self._name(view))
        for names in self._scan(self._name(view) + _escaped(prefix) + b"*"):
            with self._told():
                heads = self._client.pipeline(transaction=False)
                for name in names:
                    heads.getrange(name, 0, HEADER - 1)
                whole = [(n, h) for n, h in zip(names, heads.execute(), strict=True) if len(h) == HEADER]
                event, _ = instants([h for _, h in whole])
                wanted = [n for (n, _), e in zip(whole, event, strict=True) if e > after_us]
                rows = self._client.mget(wanted) if wanted else []
            there = [(n[start:], r) for n, r in zip(wanted, rows, strict=True) if r is not None]
            yield [k for k, _ in there], [r for _, r in there]

    def clear(self) -> None:
        """See `OnlineRows`."""
        for names in self._scan(f"{self._prefix}:*".encode()):
            with self._told():
                self._client.unlink(*names)

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Redis shows each chunk when it is written; a row is whole at any time."""
        yield

    def _scan(self, pattern: bytes) -> Iterator[list[bytes]]:
        cursor = 0
        while True:
            with self._told():
                cursor, names = self._client.scan(cursor, match=pattern, count=_REDIS_CHUNK)
            if names:
                yield names
            if cursor == 0:
                return

    def _name(self, view: str) -> bytes:
        return f"{self._prefix}:{view}:".encode()

    def _names(self, view: str, keys: Sequence[bytes]) -> list[bytes]:
        name = self._name(view)
        return [name + key for key in keys]

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except self._errors as error:
            raise EvergreenError(
                f"the Redis at {self._address} does not answer ({str(error) or type(error).__name__})",
                "Start Redis there, or set EVERGREEN_ONLINE_STORE to where it runs",
            ) from error


def _escaped(text: bytes) -> bytes:
    """Text that matches only itself in Redis' patterns."""
    return re.sub(rb"([*?\[\]\\^-])", rb"\\\1", text)


def _starts(keys: Sequence[bytes]) -> range:
    return range(0, len(keys), _SQLITE_VARIABLES)


def _batches(pieces: list[tuple[str, list[bytes]]], limit: int) -> Iterator[list[tuple[str, list[bytes]]]]:
    """Pieces together as long as they fit one statement."""
    batch: list[tuple[str, list[bytes]]] = []
    for piece in pieces:
        if batch and sum(len(k) for _, k in [*batch, piece]) > limit:
            yield batch
            batch = []
        batch.append(piece)
    if batch:
        yield batch


def _select(groups: Iterable[tuple[str, list[bytes]]]) -> str:
    one = "SELECT view, key, value FROM rows WHERE view = ? AND key IN ({})"
    return " UNION ALL ".join(one.format(",".join("?" * len(keys))) for _, keys in groups)


def _flat(groups: Iterable[tuple[str, list[bytes]]]) -> list[Any]:
    return [value for view, keys in groups for value in (view, *keys)]
