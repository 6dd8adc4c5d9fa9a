"""One import, from delivered rows to committed parts, in memory bounded by the largest group or day.

    read    validate batch after batch; good rows are split by request, bad ones go to the quarantine
    settle  per group of requests: duplicates, what is already present, completion with sampled candidates
    write   per day: sort, write a part; then the index; then days of many small parts are merged

Rows of users who were forgotten are left out before all this, and go nowhere. The share of bad rows is judged between
`settle` and `write`, before anything reaches the store.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa

from engagement import profiles
from engagement.compact import MANY_PARTS, compact
from engagement.contract import Dataset, Manifest, engagement_schema
from engagement.errors import EvergreenError
from engagement.files import read_part
from engagement.forget import Tombstones
from engagement.index import Room, from_us, load_index, save_index
from engagement.parts import sweep, write_days, write_profiles
from engagement.profiles import Profiles
from engagement.quarantine import Quarantine
from engagement.reading import frame
from engagement.report import ImportReport
from engagement.sampling import CANDIDATES
from engagement.settle import STORED, settle
from engagement.snapshot import together
from engagement.spill import RequestSpill, TimeSpill, request_hash
from engagement.validate import BAD, Checked, check_engagements


@dataclass
class _Tally:
    """Running counts of an import."""

    read: int = 0
    imported: int = 0
    present: int = 0
    sampled: int = 0
    forgotten: int = 0
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
        first = Manifest.load(root) if self._parts else self._manifest
        self._late = [n for n in self._manifest.context_features if n not in first.context_features]
        self._tombstones = Tombstones.load(root)
        self._work = root / ".tmp"
        self._tally = _Tally()
        self._files: list[str] = []  # of the batches, by number
        self._quarantine = Quarantine(self._work / "quarantine.parquet")

    def run(self) -> ImportReport:
        """Do it all; see the module's text for the stages.

        Raises:
            EvergreenError: As `EngagementStore.append`.
        """
        shutil.rmtree(self._work, ignore_errors=True)
        sweep(self._root, self._parts)
        self._work.mkdir()
        try:
            items, users = (
                self._profiles("items", self._dataset.items),
                self._profiles("users", self._without_forgotten(self._dataset.users)),
            )
            if not items.known.height:
                raise EvergreenError(
                    "the dataset holds no items", "Deliver items/*.parquet with item_id and created_timestamp"
                )
            settled = self._settle(self._read(items.known), items.known)
            kept = self._quarantine.close(self._root / "quarantine")
            self._quarantine.judge({"engagements": self._tally.read, "items": items.read, "users": users.read}, kept)
            added = [*write_profiles(self._root, "items", items), *write_profiles(self._root, "users", users)]
            added += write_days(self._root, settled, self._schema, self._progress)
            if not self._parts:
                self._manifest.save(self._root)
            save_index(self._root, (*self._parts, *added))
            return self._report(items, kept, self._compact())
        finally:
            shutil.rmtree(self._work, ignore_errors=True)

    def _profiles(self, room: Room, table: pa.Table) -> Profiles:
        held = [p for p in self._parts if p.room == room]
        merged = profiles.merge(self._root, held, room, table, self._manifest, self._now)
        self._quarantine.add(merged.bad)
        return merged

    def _compact(self) -> tuple[str, ...]:
        """The import is done: a part that cannot be merged is told, and no failure."""
        try:
            compact(self._root, more_than=MANY_PARTS)
        except EvergreenError as error:
            return (f"days of many parts were not merged: {error}",)
        return ()

    def _without_forgotten(self, table: pa.Table) -> pa.Table:
        return table.filter((~self._tombstones.delivered(table)).to_arrow()) if self._tombstones.users else table

    def _read(self, items: pl.DataFrame) -> RequestSpill:
        """Validate every batch; good rows, and the stored rows of the same requests, split by request."""
        spill, seen = RequestSpill(self._work / "requests"), []
        known = items.select("item_id")
        for table in self._dataset.engagements:
            checked = self._checked(table, known)
            self._quarantine.add(checked.bad)
            self._tally.read += table.num_rows
            if checked.good.height:
                self._files.append(checked.good["_file"][0])
                number = pl.lit(len(self._files) - 1, pl.Int32)
                spill.add(checked.good.with_columns(_file=number).select(self._columns))
                seen.append(request_hash(checked.good["request_id"]).unique().to_numpy())
            self._progress("read", self._tally.read)
        remarks = self._dataset.remarks
        for table in remarks.rejected:
            rejected = frame(table).with_columns(table=pl.lit("engagements"), row_number=None)
            rejected = rejected.select(BAD.names()).cast(BAD)
            gone = self._tombstones.quarantined(rejected)
            self._quarantine.add(rejected.filter(~gone))
            self._tally.forgotten += int(gone.sum())
            self._tally.read += rejected.height
        self._tally.read += remarks.merged
        for room, file, reason in remarks.unreadable:
            self._quarantine.add_file(room, file, reason)
        if not self._tally.read:
            raise EvergreenError("the dataset holds no engagement rows", "Deliver at least one")
        self._pull_stored(spill, np.unique(np.concatenate(seen)) if seen else np.zeros(0, np.uint64))
        return spill

    def _checked(self, table: pa.Table, known: pl.DataFrame) -> Checked:
        """A batch by the row rules, without the rows of forgotten users; the others keep their numbers."""
        first = self._tally.read
        checked = check_engagements(table, self._manifest, known, self._now, first)
        if not self._tombstones.users:
            return checked
        stays = ~self._tombstones.delivered(table)
        self._tally.forgotten += int((~stays).sum())
        good, bad = stays.gather(checked.good["_row"] - first), stays.gather(checked.bad["row_number"] - first)
        return Checked(checked.good.filter(good), checked.bad.filter(bad))

    @property
    def _columns(self) -> list[str]:
        return [*self._schema.names, "_row", "_file"]

    def _pull_stored(self, spill: RequestSpill, touched: np.ndarray) -> None:
        """Add the stored rows of all requests that the delivery touches, wherever in time they lie.

        Of the sampled rows one a request will do: it says that the request has been completed.
        """
        marks = {"_row": pl.lit(STORED, pl.Int64), "_file": pl.lit(-1, pl.Int32)}
        for part in self._parts:
            if part.room != "engagements" or not len(touched):
                continue
            path = self._root / part.path
            hashes = request_hash(frame(read_part(path, ["request_id"]))["request_id"]).to_numpy()
            hit = touched[np.searchsorted(touched[:-1], hashes)] == hashes
            if hit.any():
                rows = frame(read_part(path)).filter(pl.Series(hit))
                rows = rows.filter(~pl.col("sampled") | pl.struct("request_id", "sampled").is_first_distinct())
                spill.add(together([rows], self._schema).with_columns(**marks).select(self._columns))

    def _settle(self, spill: RequestSpill, items: pl.DataFrame) -> TimeSpill:
        by_time, tally = TimeSpill(self._work / "times"), self._tally
        names = dict(enumerate(self._files))
        completes = self._manifest.exposure == "positives"
        for group in spill.groups(growth=CANDIDATES if completes else 1):
            done = settle(group, self._schema.names, items if completes else None, self._late)
            file = pl.col("file").cast(pl.Int32).replace_strict(names, default="")
            self._quarantine.add(done.bad.with_columns(file))
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

    def _report(self, items: Profiles, kept: Path | None, notes: tuple[str, ...]) -> ImportReport:
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
            notes=(*self._dataset.remarks.notes, *notes),
            forgotten=tally.forgotten,
            unreadable={file: reason for _, file, reason in self._dataset.remarks.unreadable},
        )
