"""A snapshot: what was known of the log at one instant, as an immutable list of files.

A snapshot lists the parts that hold a row known before `as_of`, and its digest names their leaves: the parts as they
were imported. Importing newer days and compaction leave the digest as it was; a late row that was known by then
rightly changes it.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import polars as pl
import pyarrow as pa

from engagement.contract import TIMESTAMP, Manifest, engagement_schema
from engagement.errors import EvergreenError
from engagement.files import read_part, unreadable
from engagement.index import Part, Room, to_us
from engagement.reading import frame
from engagement.records import Record, present

ORDER = ["event_timestamp", "request_id", "item_id"]  # unique: the store keeps one row a request and item


@dataclass(frozen=True)
class Snapshot:
    """What a store knew at an instant.

    Attributes:
        root: The store's directory.
        as_of: Only rows known strictly before it are seen; UTC.
        digest: Hex SHA-256 over the manifest, the list of (path, sha256) of the visible leaves, and `as_of`.
        manifest: What the data is, with the features of which it sees a row.
        files: The parts that hold at least one visible row, in path order, as they were when the snapshot was taken.
    """

    root: Path
    as_of: datetime
    digest: str
    manifest: Manifest
    files: tuple[Part, ...]

    @classmethod
    def of(cls, root: Path, manifest: Manifest, parts: tuple[Part, ...], as_of: datetime) -> "Snapshot":
        """The snapshot of a store that consists of `parts` and had this manifest at first."""
        cut = to_us(as_of)
        manifest = seen_manifest(manifest, parts, cut)
        files = tuple(sorted((p for p in parts if p.known_from < cut), key=lambda p: p.path))
        leaves = sorted((leaf.path, leaf.sha256) for p in files for leaf in p.seen(cut))
        named = {"manifest": manifest.to_json(), "files": leaves, "as_of": cut}
        digest = hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()
        return cls(Path(root), as_of.astimezone(UTC), digest, manifest, files)

    def parts(self, room: Room) -> list[Part]:
        """The files of one table, in path order (for engagements: day order).

        A file that was merged into another since the snapshot was taken is replaced by that one.
        """
        listed = tuple(p for p in self.files if p.room == room)
        return list(present(self.root, listed, to_us(self.as_of)))

    def engagements(self, start: datetime | None = None, end: datetime | None = None) -> pa.Table:
        """Rows shown in [start, end) that were known before `as_of`, sorted by time, request and item.

        Where `exposure` is `positives`, a sampled candidate whose real row arrived later is left out as soon
        as the real row is known.

        Raises:
            EvergreenError: A part is missing or corrupt; the error names it.
        """
        low = None if start is None else to_us(start)
        high = min(to_us(end), to_us(self.as_of)) if end is not None else to_us(self.as_of)
        frames = []
        for part in self.parts("engagements"):
            if (low is None or part.last >= low) and part.first < high:
                frames.append(_between(self._read(part), low, high, to_us(self.as_of)))
        schema = engagement_schema(self.manifest)
        if not frames:
            return schema.empty_table()
        rows = together(frames, schema)
        if self.manifest.exposure == "positives":
            rows = _without_shadowed(rows)
        return rows.sort(ORDER).to_arrow().cast(schema)

    def items(self) -> pa.Table:
        """Items that were available before `as_of`, sorted by (created_timestamp, item_id)."""
        return self._profiles("items", ["created_timestamp", "item_id"])

    def users(self) -> pa.Table:
        """User rows valid from before `as_of`, sorted by (event_timestamp, user_id); several a user are possible."""
        return self._profiles("users", ["event_timestamp", "user_id"])

    def save(self) -> Path:
        """Record the snapshot under `<root>/snapshots/<digest>.json`; saving it again changes nothing."""
        path = self.root / "snapshots" / f"{self.digest}.json"
        Record(path, self.digest, self.as_of, self.manifest.to_json(), self.files).save()
        return path

    @classmethod
    def load(cls, root: Path, digest: str) -> "Snapshot":
        """Read a recorded snapshot and verify that its files are there, whole in size.

        The content of each page is verified by its checksum when it is read.

        Raises:
            EvergreenError: There is no such record, it is damaged, a file is missing or has another size, or it held
                data of a user who was forgotten since.
        """
        record = Record.load(root, digest)
        if record.forgotten is not None:
            raise EvergreenError(
                f"data of a forgotten user was removed from the snapshot {digest[:12]} ({record.as_of:%Y-%m-%d %H:%M})",
                "Plan the run anew: ask for the retrain again",
            )
        manifest = Manifest.from_json(record.manifest, str(record.path))
        snapshot = cls.of(root, manifest, record.files(Path(root)), record.as_of)
        if snapshot.digest != digest:
            raise EvergreenError(
                f"the snapshot record {record.path} was changed", "Delete it and run the retrain again"
            )
        for part in snapshot.files:
            file = Path(root) / part.path
            if not file.exists():
                raise unreadable(file, FileNotFoundError())
            if file.stat().st_size != part.size:
                raise unreadable(file, ValueError(f"{file.stat().st_size} bytes instead of {part.size}"))
        return snapshot

    def _read(self, part: Part) -> pa.Table:
        return read_part(self.root / part.path)

    def _profiles(self, room: Room, order: list[str]) -> pa.Table:
        tables = [self._read(p) for p in self.parts(room)]
        if not tables:
            key = "item_id" if room == "items" else "user_id"
            features = self.manifest.item_features if room == "items" else self.manifest.user_features
            columns = [(key, pa.string()), (order[0], TIMESTAMP), *((f, pa.string()) for f in features)]
            return pa.schema(columns).empty_table()
        # Deliveries may differ in having embeddings; what is absent becomes null.
        table = pa.concat_tables(tables, promote_options="default")
        known = frame(table).filter(pl.col(order[0]).dt.timestamp("us") < to_us(self.as_of)).sort(order)
        return known.to_arrow().cast(table.schema)


def seen_manifest(manifest: Manifest, parts: Iterable[Part], before: int | None = None) -> Manifest:
    """A store's first manifest with the features that later parts brought, of those with a row known before an instant.

    The features that one part added begin with those that an earlier one did: no import may leave one out.
    """
    added: dict[str, tuple[str, ...]] = {}
    for part in parts:
        for leaf in part.leaves if before is None else part.seen(before):
            added[part.room] = max(added.get(part.room, ()), leaf.added, key=len)
    return manifest.with_features(added)


def together(frames: list[pl.DataFrame], schema: pa.Schema) -> pl.DataFrame:
    """Rows of several parts in the columns of a schema: null in a feature that came after a part was written."""
    rows = pl.concat(frames, how="diagonal")
    absent = [pl.lit(None, pl.String).alias(n) for n in schema.names if n not in rows.columns]
    return rows.with_columns(absent).select(schema.names)


def _between(table: pa.Table, low: int | None, high: int, as_of: int) -> pl.DataFrame:
    event, created = (pl.col(f"{n}_timestamp").dt.timestamp("us") for n in ("event", "created"))
    wanted = (event < high) & (created < as_of)
    return frame(table).filter(wanted if low is None else wanted & (event >= low))


def _without_shadowed(rows: pl.DataFrame) -> pl.DataFrame:
    key = ["request_id", "item_id"]
    real = rows.filter(~pl.col("sampled")).select(key)
    drawn = rows.filter("sampled").join(real, on=key, how="anti")
    return pl.concat([rows.filter(~pl.col("sampled")), drawn])
