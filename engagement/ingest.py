"""One import, from delivered rows to committed parts, in memory bounded by the largest group or day.

    read    validate batch after batch; good rows are split by request, bad ones go to the quarantine
    settle  per group of requests: duplicates, what is already present, completion with sampled candidates
    write   per day: sort, write a part; then the index

The share of bad rows is judged between `settle` and `write`, before anything reaches the store.
"""

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from engagement import profiles
from engagement.contract import Dataset, engagement_schema
from engagement.errors import EvergreenError
from engagement.files import read_part, write_part
from engagement.index import Part, from_us, load_index, save_index
from engagement.profiles import Profiles
from engagement.quarantine import Quarantine
from engagement.settle import STORED, settle
from engagement.snapshot import ORDER
from engagement.spill import DAY_US, RequestSpill, TimeSpill, request_hash
from engagement.validate import BAD, check_engagements, to_stored

PART_ROWS = 1_000_000  # a day with more is written as several parts, each a span of the day
ROOMS = ("engagements", "items", "users")


@dataclass(frozen=True)
class ImportReport:
    """What an import did; `read` = `imported` + `already_present` + `merged` + the sum of `quarantined`.

    Attributes:
        read: Engagement rows delivered.
        imported: Rows that the store did not hold before, sampled ones not counted.
        already_present: Rows that it held.
        merged: Rows that the importer made part of another row.
        quarantined: Engagement rows by the reason for which they could not be used.
        quarantined_items: The same for items.
        quarantined_users: The same for users.
        requests: Distinct requests among the usable rows, new or present.
        users: Distinct users among them.
        items: Items delivered and usable, new or present.
        sampled: Candidates drawn by this import.
        first: Earliest `event_timestamp` of the usable rows; None without any.
        last: Latest.
        quarantine: The file with the quarantined rows.
        notes: The importer's remarks.
    """

    read: int
    imported: int
    already_present: int
    merged: int
    quarantined: dict[str, int]
    quarantined_items: dict[str, int]
    quarantined_users: dict[str, int]
    requests: int
    users: int
    items: int
    sampled: int
    first: datetime | None
    last: datetime | None
    quarantine: Path | None = None
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """A JSON form."""
        plain = {"first": self.first and self.first.isoformat(), "last": self.last and self.last.isoformat()}
        return (
            asdict(self)
            | plain
            | {"quarantine": self.quarantine and str(self.quarantine), "notes": list(self.notes)}
        )


@dataclass
class _Tally:
    """Running counts of an import."""

    read: int = 0
    imported: int = 0
    present: int = 0
    sampled: int = 0
    requests: int = 0
    users: list[np.ndarray] = field(default_factory=list)
    spans: list[tuple[int, int]] = field(default_factory=list)


class Import:
    """One import into a store whose lock is held.

    Args:
        root: The store's directory.
        dataset: What to import.
        now_us: The present instant, microseconds.
        progress: Called with the stage and the rows done in it.
    """

    def __init__(
        self, root: Path, dataset: Dataset, now_us: int, progress: Callable[[str, int], None] | None = None
    ) -> None:
        self._root, self._dataset, self._manifest, self._now = root, dataset, dataset.manifest, now_us
        self._progress = progress or (lambda stage, rows: None)
        self._schema = engagement_schema(dataset.manifest)
        self._parts = load_index(root)
        self._work = root / ".tmp"
        self._tally = _Tally()

    def run(self) -> ImportReport:
        """Do it all; see the module's text for the stages.

        Raises:
            EvergreenError: As `EngagementStore.append`.
        """
        _sweep(self._root, self._work, self._parts)
        self._work.mkdir()
        try:
            self._quarantine = Quarantine(self._work / "quarantine.parquet")
            items, users = (
                self._profiles("items", self._dataset.items),
                self._profiles("users", self._dataset.users),
            )
            if not items.known.height:
                raise EvergreenError(
                    "the dataset holds no items", "Deliver items/*.parquet with item_id and created_timestamp"
                )
            settled = self._settle(self._read(items.known), items.known)
            kept = self._quarantine.close(self._root / "quarantine")
            self._quarantine.judge(
                {"engagements": self._tally.read, "items": items.read, "users": users.read}, kept
            )
            self._write(settled, items, users)
            return self._report(items, kept)
        finally:
            shutil.rmtree(self._work, ignore_errors=True)

    def _profiles(self, room: Any, table: pa.Table) -> Profiles:
        held = [p for p in self._parts if p.room == room]
        merged = profiles.merge(self._root, held, room, table, self._manifest, self._now)
        self._quarantine.add(merged.bad)
        return merged

    def _read(self, items: pl.DataFrame) -> RequestSpill:
        """Validate every batch; good rows, and the stored rows of the same requests, split by request."""
        spill, seen, self._files = RequestSpill(self._work / "requests"), [], []
        known = items.select("item_id")
        for table in self._dataset.engagements:
            checked = check_engagements(table, self._manifest, known, self._now, self._tally.read)
            self._quarantine.add(checked.bad)
            self._tally.read += table.num_rows
            if checked.good.height:
                self._files.append(checked.good["_file"][0])
                spill.add(
                    checked.good.with_columns(_file=pl.lit(len(self._files) - 1, pl.Int32)).select(
                        self._columns
                    )
                )
                seen.append(np.unique(request_hash(checked.good["request_id"]).to_numpy()))
            self._progress("read", self._tally.read)
        for table in self._dataset.remarks.rejected:
            rejected = pl.from_arrow(table)
            assert isinstance(rejected, pl.DataFrame)
            self._tally.read += rejected.height
            self._quarantine.add(
                rejected.select(pl.lit("engagements").alias("table"), pl.all(), row_number=None)
                .select(list(BAD))
                .cast(BAD)
            )  # type: ignore[arg-type]
        self._tally.read += self._dataset.remarks.merged
        if not self._tally.read:
            raise EvergreenError(
                "the dataset holds no engagement rows", "Deliver engagements/*.parquet with at least one row"
            )
        self._pull_stored(spill, seen)
        return spill

    @property
    def _columns(self) -> list[str]:
        return [*self._schema.names, "_row", "_file"]

    def _pull_stored(self, spill: RequestSpill, seen: list[np.ndarray]) -> None:
        """Add the stored rows of all requests that the delivery touches, wherever in time they lie."""
        touched = np.unique(np.concatenate(seen)) if seen else np.zeros(0, np.uint64)
        for part in self._parts:
            if part.room != "engagements" or not len(touched):
                continue
            ids = pl.from_arrow(read_part(self._root / part.path, ["request_id"]))["request_id"]  # type: ignore[index]
            hashes = request_hash(ids).to_numpy()
            hit = touched[np.searchsorted(touched[:-1], hashes)] == hashes
            if hit.any():
                rows = pl.from_arrow(read_part(self._root / part.path))
                assert isinstance(rows, pl.DataFrame)
                marked = rows.filter(pl.Series(hit)).with_columns(
                    _row=pl.lit(STORED, pl.Int64), _file=pl.lit(-1, pl.Int32)
                )
                spill.add(marked.select(self._columns))

    def _settle(self, spill: RequestSpill, items: pl.DataFrame) -> TimeSpill:
        by_time, tally = TimeSpill(self._work / "times"), self._tally
        names = {number: name for number, name in enumerate(self._files)}
        for group in spill.groups():
            done = settle(
                group, self._schema.names, items if self._manifest.exposure == "positives" else None
            )
            self._quarantine.add(
                done.bad.with_columns(pl.col("file").cast(pl.Int32).replace_strict(names, default=""))
            )
            drawn = int(done.new["sampled"].sum())
            tally.imported += done.new.height - drawn
            tally.sampled += drawn
            tally.present += done.present
            tally.requests += done.requests
            tally.users = [np.unique(np.concatenate([*tally.users, done.users.to_numpy()]))]
            tally.spans += [done.span] if done.span else []
            by_time.add(done.new)
            self._progress("settle", tally.imported + tally.present)
        return by_time

    def _write(self, settled: TimeSpill, items: Profiles, users: Profiles) -> None:
        """Write all parts, then commit them by replacing the index."""
        parts, written = list(self._parts), 0
        for room, merged in (("items", items), ("users", users)):
            if merged.new.height:
                time = merged.new[merged.schema.names[1]]
                parts.append(
                    _part(
                        self._root, self._root / room, room, to_stored(merged.new, merged.schema), time, time
                    )
                )
        for day, rows in settled.days().items():
            edges = np.linspace(day * DAY_US, (day + 1) * DAY_US, -(-rows // PART_ROWS) + 1).astype(np.int64)
            directory = self._root / "engagements" / f"day={np.datetime64(day, 'D')}"
            for start, end in zip(edges[:-1], edges[1:], strict=True):
                frame = settled.between(int(start), int(end))
                if frame.height:
                    frame = frame.sort(ORDER)
                    table = to_stored(frame, self._schema)
                    event, known = frame["event_timestamp"], frame["created_timestamp"]
                    parts.append(
                        _part(
                            self._root,
                            directory,
                            "engagements",
                            table,
                            event,
                            known,
                            int(frame["sampled"].sum()),
                        )
                    )
                    written += frame.height
                    self._progress("write", written)
        if not (self._root / "manifest.json").exists() or not self._parts:
            self._manifest.save(self._root)
        save_index(self._root, tuple(parts))

    def _report(self, items: Profiles, kept: Path | None) -> ImportReport:
        tally, spans = self._tally, self._tally.spans
        return ImportReport(
            read=tally.read,
            imported=tally.imported,
            already_present=tally.present,
            merged=self._dataset.remarks.merged,
            quarantined=self._quarantine.counts("engagements"),
            quarantined_items=self._quarantine.counts("items"),
            quarantined_users=self._quarantine.counts("users"),
            requests=tally.requests,
            users=len(tally.users[0]) if tally.users else 0,
            items=items.usable,
            sampled=tally.sampled,
            first=from_us(min(s[0] for s in spans)) if spans else None,
            last=from_us(max(s[1] for s in spans)) if spans else None,
            quarantine=kept,
            notes=tuple(self._dataset.remarks.notes),
        )


def _part(
    root: Path,
    directory: Path,
    room: Any,
    table: pa.Table,
    time: pl.Series,
    known: pl.Series,
    sampled: int = 0,
) -> Part:
    path, digest, size = write_part(directory, table)
    first, last = (int(v) for v in (time.dt.timestamp("us").min(), time.dt.timestamp("us").max()))  # type: ignore[arg-type]
    known_from = int(known.dt.timestamp("us").min())  # type: ignore[arg-type]
    relative = path.relative_to(root).as_posix()
    return Part(room, relative, digest, size, table.num_rows, first, last, known_from, sampled)


def _sweep(root: Path, work: Path, parts: tuple[Part, ...]) -> None:
    """Remove what a killed import left: temporary files, and parts that the index does not name."""
    shutil.rmtree(work, ignore_errors=True)
    named = {p.path for p in parts}
    for room in ROOMS:
        for path in (root / room).rglob("*"):
            leftover = path.name.endswith(".tmp") or path.name.startswith("part-")
            if path.is_file() and leftover and path.relative_to(root).as_posix() not in named:
                path.unlink()
