"""The engagement store: an append-only log in day partitions, committed import by import.

    manifest.json                                what the data is
    index.json                                   which parts make up the store; replacing it commits an import
    engagements/day=YYYY-MM-DD/part-<sha>.parquet
    items/part-<sha>.parquet, users/part-<sha>.parquet
    quarantine/<sha>.parquet                     rows that could not be used, with their reason
    quarantine/corrupt-*                         damaged parts that a check took out
    snapshots/<digest>.json                      what a run has read
    forgotten.json                               marks of the users who must not come back

Parts are named by their own bytes and never change. An import, as every other change, writes its parts first and the
index last, under a file lock: killed anywhere, it leaves the store as it was, and the same import again ends with the
same bytes.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import filelock
import numpy as np
import polars as pl

from engagement.check import check
from engagement.compact import compact, retain
from engagement.contract import Dataset, Manifest
from engagement.errors import EvergreenError
from engagement.forget import Tombstones, forget
from engagement.index import INDEX, from_us, load_index, to_us
from engagement.ingest import Import
from engagement.report import CheckReport, CompactReport, ForgetReport, ImportReport
from engagement.snapshot import Snapshot, seen_manifest

LOCK_SECONDS = 600.0  # how long an import waits for another one


class EngagementStore:
    """The log of one dataset, under one directory.

    Args:
        root: The store's directory; made by the first import.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(root)

    def exists(self) -> bool:
        """Whether an import was ever finished."""
        return (self.root / INDEX).exists()

    @property
    def manifest(self) -> Manifest:
        """What the stored data is, with all features that were ever delivered.

        Raises:
            EvergreenError: There is no data yet.
        """
        self._require()
        return seen_manifest(Manifest.load(self.root), load_index(self.root))

    def append(
        self,
        dataset: Dataset,
        now: datetime | None = None,
        progress: Callable[[str, int], None] | None = None,
    ) -> ImportReport:
        """Import a dataset: the first one makes the store, later ones add to it.

        Rows that the store already holds are counted and left alone, so that importing again changes nothing. A later
        dataset may have more features; rows from before have no value in them.

        Args:
            dataset: What to import; its engagements are read once, as a stream.
            now: Rows from later than this go to quarantine; default is the present.
            progress: Called with the stage (`read`, `settle` or `write`) and the rows done in it.

        Raises:
            EvergreenError: The dataset is another one than the store's, lacks a feature that the store has, breaks
                the contract, or has more bad rows than `MAX_BAD_SHARE`; nothing was imported then.
        """
        now_us = to_us(now or datetime.now(UTC))
        with self._alone("the import"):
            if self.exists():
                dataset = replace(dataset, manifest=self._grown(dataset.manifest))
            return Import(self.root, dataset, now_us, progress).run()

    def compact(self) -> CompactReport:
        """Merge the parts of each day into one (`PART_ROWS` rows at most); again changes nothing.

        No row, no digest and nothing that is visible at any instant changes; recorded snapshots stay readable.

        Raises:
            EvergreenError: There is no data yet, or a part cannot be read.
        """
        self._require()
        with self._alone("the compaction"):
            return compact(self.root)

    def retain(self, days: int, now: datetime | None = None) -> CompactReport:
        """Keep the newest days of the log, and recorded snapshots for as many days after they were last asked for.

        Files of older days stay on disk while a recorded snapshot needs them, so that its run can be repeated.
        Importing older days again brings them back.

        Args:
            days: UTC days to keep, at least 1; the day of the newest engagement is the first.
            now: The present instant.

        Raises:
            EvergreenError: There is no data yet, or `days` is less than 1.
        """
        self._require()
        if days < 1:
            raise EvergreenError(f"{days} days cannot be kept", "Keep at least 1")
        with self._alone("the retention"):
            return retain(self.root, days, now or datetime.now(UTC))

    def check(self) -> CheckReport:
        """Verify every part; damaged ones move to `quarantine/corrupt-...`, and the next import brings their rows back.

        Raises:
            EvergreenError: There is no data yet.
        """
        self._require()
        with self._alone("the check"):
            return check(self.root)

    def forget(self, user_id: str) -> ForgetReport:
        """Remove every row of a user, now and in later imports; again changes nothing.

        Raises:
            EvergreenError: There is no data yet, or a part cannot be searched.
        """
        self._require()
        with self._alone("the removal"):
            return forget(self.root, user_id)

    def forgotten(self, users: np.ndarray) -> np.ndarray:
        """Which of these ids (bytes) are of users whom the store has forgotten; a bool each."""
        ids = pl.Series([u.decode() for u in users.tolist()], dtype=pl.String)
        return Tombstones.load(self.root).of(ids).to_numpy()

    def snapshot(self, as_of: datetime) -> Snapshot:
        """What was known strictly before an instant; may hold no rows.

        Raises:
            EvergreenError: There is no data yet, or the instant has no time zone.
        """
        self._require()
        return Snapshot.of(self.root, Manifest.load(self.root), load_index(self.root), as_of)

    def time_range(self) -> tuple[datetime, datetime]:
        """The earliest and the latest `event_timestamp`.

        Raises:
            EvergreenError: There is no data yet.
        """
        self._require()
        parts = [p for p in load_index(self.root) if p.room == "engagements"]
        if not parts:
            raise EvergreenError(f"{self.root} holds no engagement", "Import a dataset first")
        return from_us(min(p.first for p in parts)), from_us(max(p.last for p in parts))

    @contextmanager
    def _alone(self, job: str) -> Iterator[None]:
        """Hold the store's lock; what the disk refuses becomes one line."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with filelock.FileLock(self.root / ".lock", timeout=LOCK_SECONDS):
                yield
        except filelock.Timeout as error:
            raise EvergreenError(
                f"another import into {self.root} is running", "Wait for it to end, then try again"
            ) from error
        except OSError as error:
            raise EvergreenError(
                f"{job} stopped: {error.strerror or error} ({error.filename or self.root})",
                "Nothing was changed or lost; free space or correct the rights, then run it again",
            ) from error

    def _require(self) -> None:
        if not self.exists():
            raise EvergreenError(
                f"there is no data in {self.root}",
                "Run evergreen data fetch movielens-100k, or evergreen data import DIR",
            )

    def _grown(self, manifest: Manifest) -> Manifest:
        """A delivery's manifest with the store's features first."""
        held = self.manifest
        differing = held.difference(manifest)
        if differing:
            raise EvergreenError(
                f"{self.root} holds '{self.manifest.name}', and '{manifest.name}' differs in {', '.join(differing)}",
                "Choose another --home for it",
            )
        vanished = held.vanished(manifest)
        if vanished:
            raise EvergreenError(
                f"'{manifest.name}' lacks the feature {', '.join(vanished)}, which {self.root} holds",
                "Deliver it, null where there is no value, or choose another --home",
            )
        return held.with_features(manifest.features())
