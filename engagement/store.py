"""The engagement store: an append-only log in day partitions, committed import by import.

    manifest.json                                what the data is
    index.json                                   which parts make up the store; replacing it commits an import
    engagements/day=YYYY-MM-DD/part-<sha>.parquet
    items/part-<sha>.parquet, users/part-<sha>.parquet
    quarantine/<sha>.parquet                     rows that could not be used, with their reason
    snapshots/<digest>.json                      what a run has read

Parts are named by their own bytes and never change. An import writes its parts first and the index last,
under a file lock: killed anywhere, it leaves the store as it was, and the same import again ends with the
same bytes.
"""

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import filelock

from engagement.contract import Dataset, Manifest
from engagement.errors import EvergreenError
from engagement.index import INDEX, from_us, load_index, to_us
from engagement.ingest import Import
from engagement.report import ImportReport
from engagement.snapshot import Snapshot

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
        """What the stored data is.

        Raises:
            EvergreenError: There is no data yet.
        """
        self._require()
        return Manifest.load(self.root)

    def append(
        self,
        dataset: Dataset,
        now: datetime | None = None,
        progress: Callable[[str, int], None] | None = None,
    ) -> ImportReport:
        """Import a dataset: the first one makes the store, later ones add to it.

        Rows that the store already holds are counted and left alone, so that importing again changes nothing.

        Args:
            dataset: What to import; its engagements are read once, as a stream.
            now: Rows from later than this go to quarantine; default is the present.
            progress: Called with the stage (`read`, `settle` or `write`) and the rows done in it.

        Raises:
            EvergreenError: The dataset is another one than the store's, breaks the contract, or has more bad
                rows than `MAX_BAD_SHARE`; nothing was imported then.
        """
        now_us = to_us(now or datetime.now(UTC))
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with filelock.FileLock(self.root / ".lock", timeout=LOCK_SECONDS):
                if self.exists():
                    self._require_same(dataset.manifest)
                return Import(self.root, dataset, now_us, progress).run()
        except filelock.Timeout as error:
            raise EvergreenError(
                f"another import into {self.root} is running", "Wait for it to end, then try again"
            ) from error
        except OSError as error:
            raise EvergreenError(
                f"the import stopped: {error.strerror or error} ({error.filename or self.root})",
                "Nothing was imported; free space or correct the rights, then import again",
            ) from error

    def snapshot(self, as_of: datetime) -> Snapshot:
        """What was known strictly before an instant; may hold no rows.

        Raises:
            EvergreenError: There is no data yet, or the instant has no time zone.
        """
        self._require()
        return Snapshot.of(self.root, self.manifest, load_index(self.root), as_of)

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

    def _require(self) -> None:
        if not self.exists():
            raise EvergreenError(
                f"there is no data in {self.root}",
                "Run evergreen data fetch movielens-100k, or evergreen data import DIR",
            )

    def _require_same(self, manifest: Manifest) -> None:
        differing = self.manifest.difference(manifest)
        if differing:
            raise EvergreenError(
                f"{self.root} holds '{self.manifest.name}', and '{manifest.name}' differs in {', '.join(differing)}",
                "Choose another --home for it",
            )
