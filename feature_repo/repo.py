"""The feature repository of one home: build the views, make training tables, publish and read online features."""

import contextlib
import io
import json
import os
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import filelock
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from engagement.errors import EvergreenError
from engagement.files import write_text
from engagement.snapshot import Snapshot
from engagement.table import RankingTable
from feature_repo import definitions
from feature_repo.assemble import RawTable
from feature_repo.definitions import CURRENT
from feature_repo.features import SERVICE, views
from feature_repo.history import ActionLog
from feature_repo.online import OnlineReader
from feature_repo.requests import CONTEXT, Requests, collect
from feature_repo.views import Inputs, build_views, fingerprint

LOCK_SECONDS = 600.0
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class FeatureRepo:
    """Feast's repository under a home directory.

    Every method may be called again with the same arguments, also after it was killed: the result is the same, and
    what is there already is not computed again. Methods of one home wait for each other.

    Args:
        root: The directory; made when it is first needed.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(root).resolve()

    def build(self, snapshot: Snapshot) -> None:
        """Write the views up to the snapshot's `as_of` and register them with Feast.

        Raises:
            EvergreenError: A file of the snapshot is missing or corrupt, or a feature has a type that none can have.
        """
        with self._alone():
            self._build(Inputs(snapshot))

    def table(self, snapshot: Snapshot, start: datetime, end: datetime, out: Path) -> RankingTable:
        """Join the features to the requests of a window and save them as a ranking table.

        Requests are in time order, candidates sorted by item id. Beside the table, `out/sample.parquet` holds raw
        feature values of up to 20,000 candidates (see `RawTable.sample`).

        Args:
            snapshot: What was known; its views are built if they are not.
            start: First instant, inclusive.
            end: Last instant, exclusive.
            out: Directory of the table; replaced if it exists.

        Returns:
            The saved table, memory-mapped.

        Raises:
            EvergreenError: No request was ranked in the window.
        """
        inputs = Inputs(snapshot)
        requests = collect(inputs.log, inputs.spec, start, end)
        with self._alone():
            self._build(inputs)
            joined = self._join(requests)
        raw = _raw_table(inputs, requests, joined)
        _save(raw, Path(out))
        return RankingTable.load(Path(out))

    def materialize(self, snapshot: Snapshot) -> None:
        """Publish the values as of the snapshot for serving; readers move on to them at once, and never in between.

        Raises:
            EvergreenError: As for `build`.
        """
        inputs = Inputs(snapshot)
        with self._alone():
            self._build(inputs)
            name = f"{snapshot.as_of:%Y%m%dT%H%M%S}-{fingerprint(inputs)[:16]}"
            version = self.root / "online" / name
            if not version.exists():
                self._write_version(inputs, version)
            self._publish(name)

    def online(self) -> OnlineReader:
        """A reader of the published values.

        Raises:
            EvergreenError: Nothing was materialised yet.
        """
        return OnlineReader(self.root)

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
        definitions.apply(self.root, inputs.spec)

    def _join(self, requests: Requests) -> dict[str, pa.Array]:
        """Feast's point-in-time join: every offline feature by name, one value a candidate."""
        rows = requests.candidates
        users = requests.requests["user_id"].gather(rows[":request"])
        entities = pd.DataFrame(
            {
                "user_id": users.to_list(),
                "item_id": rows["item_id"].to_list(),
                "event_timestamp": pd.to_datetime(rows[":time"].to_numpy(), unit="us", utc=True).as_unit("us"),
            }
        )
        store = definitions.open_store(self.root)
        job = store.get_historical_features(
            entities, store.get_feature_service(SERVICE), full_feature_names=True, filter_by_created_timestamp=True
        )
        joined = job.to_arrow()
        if joined.num_rows != len(rows):
            raise EvergreenError(f"the join gave {joined.num_rows} rows for {len(rows)} candidates", "Report this")
        return {n: joined.column(n).combine_chunks() for n in joined.column_names if "__" in n}

    def _write_version(self, inputs: Inputs, version: Path) -> None:
        building = version.with_name(f".{version.name}.building")
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir(parents=True)
        as_of = inputs.snapshot.as_of
        store = definitions.open_store(self.root, online=building)
        feature_views = [o for o in definitions.objects(inputs.spec) if hasattr(o, "ttl")]
        store.provider.update_infra(definitions.PROJECT, [], feature_views, [], [], partial=True)
        for view in views(inputs.spec):
            # What has expired by `as_of` has expired for every later request.
            start = as_of - view.ttl if view.ttl else _EPOCH
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                store.materialize(start, as_of, feature_views=[view.name])
        shutil.copyfile(self.root / "registry.db", building / "registry.db")
        recorded = {"as_of": as_of.isoformat(), "snapshot": inputs.snapshot.digest, "spec": inputs.spec.to_json()}
        write_text(building / "version.json", json.dumps(recorded, indent=1))
        building.replace(version)

    def _publish(self, name: str) -> None:
        """Point `online/current` at a version; the version before it stays for readers that are still opening it."""
        current = self.root / CURRENT
        before = current.readlink().name if current.is_symlink() else name
        if before != name:
            link = current.with_name(".current.tmp")
            link.unlink(missing_ok=True)
            link.symlink_to(name)
            link.replace(current)
        elif not current.is_symlink():
            current.symlink_to(name)
        for other in current.parent.iterdir():
            if other.name not in (name, before, current.name):
                shutil.rmtree(other, ignore_errors=True)


def _raw_table(inputs: Inputs, requests: Requests, joined: dict[str, pa.Array]) -> RawTable:
    spec, frame = inputs.spec, requests.requests
    first = pa.array(requests.offsets[:-1])
    of_user = {n: c.take(first) for n, c in joined.items() if n.startswith("user_")}
    context = {c: frame[c].to_arrow().cast(pa.string()) for c in frame.columns if c.startswith(CONTEXT)}
    users = frame["user_id"].to_arrow().cast(pa.string())
    history = ActionLog.of(inputs.log, spec.actions, frame["user_id"], before_us=int(requests.time.max()))
    start, end = history.pointers(users, requests.time)
    return RawTable(
        spec=spec,
        request_id=frame["request_id"].to_arrow().cast(pa.string()),
        user_id=users,
        time=requests.time,
        offsets=requests.offsets,
        request={**of_user, **context},
        item_id=requests.candidates["item_id"].to_arrow().cast(pa.string()),
        candidate={n: c for n, c in joined.items() if n.startswith("item_")},
        labels=requests.labels(spec.actions),
        sampled=requests.candidates["sampled"].to_numpy(),
        history_start=start,
        history_end=end,
        history_time=history.time,
        history_item=history.item,
        history_actions=history.actions,
    )


def _save(raw: RawTable, out: Path) -> None:
    """Write the table beside its place and rename it: `out` is whole or as it was before."""
    building = out.with_name(f".{out.name}.{os.getpid()}.building")
    shutil.rmtree(building, ignore_errors=True)
    raw.table().save(building)
    pq.write_table(raw.sample(), building / "sample.parquet", compression="zstd")
    shutil.rmtree(out, ignore_errors=True)
    building.replace(out)
