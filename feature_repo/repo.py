"""The feature repository of one home: build the views, make training tables, publish and read online features."""

import contextlib
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

import filelock
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from engagement.errors import EvergreenError
from engagement.index import to_us
from engagement.snapshot import Snapshot
from engagement.table import RankingTable, TableSpec
from evergreen.settings import Settings
from feature_repo import definitions
from feature_repo.assemble import RawTable
from feature_repo.features import SERVICE, views
from feature_repo.generations import CURRENT, Generation, served
from feature_repo.history import ActionLog, text
from feature_repo.materialize import forget_user, materialize
from feature_repo.online import OnlineReader
from feature_repo.online_rows import OnlineRows
from feature_repo.partials import Partials
from feature_repo.requests import CONTEXT, Asked, Requests, as_asked, collect, with_category
from feature_repo.views import Inputs, build_views

LOCK_SECONDS = 600.0
REQUEST_SPAN = timedelta(days=1)  # all items of a request are shown within it; a longer one would be cut at a window


class FeatureRepo:
    """Feast's repository under a home directory.

    Every method may be called again with the same arguments, also after it was killed: the result is the same, and
    what is there already is not computed again. Methods of one home wait for each other.

    Args:
        root: The directory; made when it is first needed.
        online_store: Address of the Redis that holds the served rows; empty for SQLite in the directory.
        offline_store: Who joins and materialises: `asof` (this process) or `spark`.
    """

    def __init__(self, root: Path, online_store: str = "", offline_store: str = "asof") -> None:
        self.root, self._url, self._offline = Path(root).resolve(), online_store, offline_store

    @classmethod
    def of(cls, settings: Settings) -> "FeatureRepo":
        """The features of a home."""
        return cls(settings.features, settings.online_store, settings.offline_store)

    def build(self, snapshot: Snapshot) -> None:
        """Write the views up to the snapshot's `as_of` and register them with Feast.

        Raises:
            EvergreenError: A file of the snapshot is missing or corrupt, or a feature has a type that none can have.
        """
        with self._alone():
            self._build(Inputs(snapshot))

    def table(
        self, snapshot: Snapshot, start: datetime, end: datetime, out: Path, sample_from: datetime | None = None
    ) -> RankingTable:
        """Join the features to the requests of a window and save them as a ranking table.

        Requests are in time order, candidates sorted by item id. Beside the table, `out/sample.parquet` holds raw
        feature values of up to 20,000 candidates (see `RawTable.sample`).

        Args:
            snapshot: What was known; its views are built if they are not.
            start: First instant, inclusive.
            end: Last instant, exclusive.
            out: Directory of the table; replaced if it exists.
            sample_from: The sample is of requests from then on; of the whole window by default.

        Returns:
            The saved table, memory-mapped.

        Raises:
            EvergreenError: No request was ranked in the window.
        """
        inputs = Inputs(snapshot)
        log = pl.DataFrame(pl.from_arrow(snapshot.engagements(start - REQUEST_SPAN, end + REQUEST_SPAN)))
        requests = collect(log, inputs.spec, start, end)
        with self._alone():
            self._build(inputs)
            raw = self._raw_table(inputs, requests)
        _save(raw, Path(out), to_us(sample_from) if sample_from else None)
        return RankingTable.load(Path(out))

    def as_asked(
        self, snapshot: Snapshot, asked: Sequence[Asked], known_by: Sequence[datetime] | None = None
    ) -> RankingTable:
        """What training would read for requests that are not in the log: the offline twin of `OnlineReader.read`.

        Args:
            snapshot: What was known; its views are built if they are not.
            asked: The requests, each at its own instant.
            known_by: For each, use only what was known by then, as an online store does that was materialised then.
        """
        inputs = Inputs(snapshot)
        at = np.array([to_us(a.at) for a in asked], np.int64)
        seen = at if known_by is None else np.minimum(at, [to_us(k) for k in known_by])
        with self._alone():
            self._build(inputs)
            raw = self._raw_table(inputs, as_asked(asked, inputs.spec, seen))
        return replace(raw, time=at).table()

    def materialize(self, snapshot: Snapshot) -> None:
        """Publish the values as of the snapshot for serving; readers move on to them at once, and never in between.

        Raises:
            EvergreenError: As for `build`; or the online store does not answer.
        """
        inputs = Inputs(snapshot)
        with self._alone():
            self._build(inputs)
            materialize(self.root, self._url, self._offline, inputs)

    def online(self) -> OnlineReader:
        """A reader of the published values.

        Raises:
            EvergreenError: Nothing was materialised yet; or the online store does not answer.
        """
        return OnlineReader(self.root, self._url)

    def published(self) -> bool:
        """Whether anything was ever materialised."""
        return (self.root / CURRENT).is_symlink()

    def rows(self) -> tuple[OnlineRows, TableSpec]:
        """The packed rows of the generation that is served now, and the declaration that they follow.

        Raises:
            EvergreenError: As for `online`.
        """
        generation = Generation.load(served(self.root))
        return generation.rows(self._url), generation.spec

    def forget_user(self, user_id: str) -> int:
        """Delete a user's rows from the online store; returns how many there were."""
        with self._alone():
            return forget_user(self.root, self._url, user_id)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        self.root.mkdir(parents=True, exist_ok=True)
        try:
            with filelock.FileLock(self.root / ".lock", timeout=LOCK_SECONDS):
                yield
        except filelock.Timeout as error:
            raise EvergreenError(f"another run holds {self.root}", "Wait for it to end, then try again") from error

    def _build(self, inputs: Inputs) -> None:
        build_views(self.root / "views", inputs)
        definitions.apply(self.root, inputs.spec, self._url, self._offline)

    def _raw_table(self, inputs: Inputs, requests: Requests) -> RawTable:
        """The requests with all their features, before hashing and transforming."""
        spec, frame = inputs.spec, requests.requests
        joined = self._join(with_category(requests.candidates, inputs.categories), requests)
        levels = {f"{v.name}__{c}": v.level for v in views(spec) for c, _ in v.columns}
        first = pa.array(requests.offsets[:-1])
        of_user = {n: c.take(first) for n, c in joined.items() if levels[n] == "request"}
        context = {c: text(frame[c]) for c in frame.columns if c.startswith(CONTEXT)}
        users = text(frame["user_id"])
        actions = Partials(self.root / "partials", inputs.snapshot).actions()
        history = ActionLog.of(actions, frame["user_id"], before_us=int(requests.time.max()))
        start, end = history.pointers(users, requests.time)
        return RawTable(
            spec=spec,
            request_id=text(frame["request_id"]),
            user_id=users,
            time=requests.time,
            offsets=requests.offsets,
            request={**of_user, **context},
            item_id=text(requests.candidates["item_id"]),
            candidate={n: c for n, c in joined.items() if levels[n] == "candidate"},
            labels=requests.labels(spec.actions),
            sampled=requests.candidates["sampled"].to_numpy(),
            history_start=start,
            history_end=end,
            history_time=history.time,
            history_item=history.item,
            history_actions=history.actions,
        )

    def _join(self, rows: pl.DataFrame, requests: Requests) -> dict[str, pa.Array]:
        """Feast's point-in-time join: every offline feature by name, one value a candidate."""
        users = requests.requests["user_id"].gather(rows[":request"])
        keys = {"user_id": users, "item_id": rows["item_id"], "category": rows["category"]}
        entities = pd.DataFrame(
            {
                **{name: pd.Series(text(key), dtype=pd.ArrowDtype(pa.string())) for name, key in keys.items()},
                "event_timestamp": pd.to_datetime(rows[":time"].to_numpy(), unit="us", utc=True).as_unit("us"),
            }
        )
        store = definitions.open_store(self.root, offline=self._offline)
        job = store.get_historical_features(
            entities, store.get_feature_service(SERVICE), full_feature_names=True, filter_by_created_timestamp=True
        )
        joined = job.to_arrow()
        if joined.num_rows != len(rows):
            raise EvergreenError(f"the join gave {joined.num_rows} rows for {len(rows)} candidates", "Report this")
        return {n: joined.column(n).combine_chunks() for n in joined.column_names if "__" in n}


def _save(raw: RawTable, out: Path, sample_from: int | None) -> None:
    """Write the table beside its place and rename it: `out` is whole or as it was before."""
    building = out.with_name(f".{out.name}.{os.getpid()}.building")
    shutil.rmtree(building, ignore_errors=True)
    raw.table().save(building)
    pq.write_table(raw.sample(sample_from), building / "sample.parquet", compression="zstd")
    shutil.rmtree(out, ignore_errors=True)
    building.replace(out)
