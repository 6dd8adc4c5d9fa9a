"""What serving reads: one user and the candidates out of Feast's online store, as a ranking table of one request.

A materialised version is a directory that never changes after it is published (`repo.FeatureRepo.materialize`):

    online/<as_of>-<mark>/online.db      Feast's SQLite online store
    online/<as_of>-<mark>/registry.db    the registry that it was written with
    online/<as_of>-<mark>/version.json   the declaration
    online/current                       link to the version that is served

A reader keeps the version that it opened and moves on when the link does, so that values never mix two versions.
"""

import json
import threading
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from engagement.errors import EvergreenError
from engagement.index import to_us
from engagement.table import RankingTable, TableSpec
from feature_repo.assemble import RawTable
from feature_repo.definitions import CURRENT, open_store
from feature_repo.features import ARROW, ColumnType, Entity, View, views
from feature_repo.requests import CONTEXT

_FIELD: dict[ColumnType, str] = {
    "string": "string_val",
    "strings": "string_list_val",
    "float": "double_val",
    "floats": "float_list_val",
    "int": "int64_val",
    "ints": "int64_list_val",
}


class OnlineReader:
    """Reads the features of one ranking request.

    Args:
        root: The Feast repository of a home.

    Raises:
        EvergreenError: Nothing was materialised yet.
    """

    def __init__(self, root: Path) -> None:
        self._root = Path(root).resolve()
        self._lock = threading.Lock()
        self._version = _Version(self._root, self._target())

    @property
    def spec(self) -> TableSpec:
        """The declaration of the version that is served."""
        return self._version.spec

    @property
    def as_of(self) -> datetime:
        """The instant whose knowledge is served."""
        return self._version.as_of

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
            EvergreenError: There is no candidate.
        """
        if not item_ids:
            raise EvergreenError("a ranking request without candidates", "Send at least one item id")
        version, at_us = self._fresh(), to_us(at)
        user = version.read("user", [user_id], at_us)
        items = version.read("item", item_ids, at_us)
        names = [f.name for f in version.spec.features if f.name.startswith(CONTEXT)]
        values = {n: pa.array([context.get(n.removeprefix(CONTEXT))], pa.string()) for n in names}
        time, actions, item = (user.pop(f"user_history__{n}")[0].as_py() or [] for n in ("time", "actions", "item"))
        shown = np.array(time, np.int64)
        earlier = shown < at_us  # a replayed request must not see what came after it
        count = int(earlier.sum())
        raw = RawTable(
            spec=version.spec,
            request_id=pa.array([""]),
            user_id=pa.array([user_id]),
            time=np.array([at_us], np.int64),
            offsets=np.array([0, len(item_ids)], np.int64),
            request={**user, **values},
            item_id=pa.array(item_ids),
            candidate=items,
            labels=np.zeros((len(item_ids), len(version.spec.actions)), np.uint8),
            sampled=np.zeros(len(item_ids), bool),
            history_start=np.zeros(1, np.int64),
            history_end=np.array([count], np.int64),
            history_time=shown[earlier],
            history_item=pa.array(item, pa.string()).filter(pa.array(earlier)),
            history_actions=np.array(actions, np.int64)[earlier],
        )
        return raw.table()

    def _target(self) -> Path:
        try:
            return (self._root / CURRENT).readlink()
        except OSError as error:
            raise EvergreenError(
                f"no features were materialised in {self._root}", "Run evergreen retrain first"
            ) from error

    def _fresh(self) -> "_Version":
        target = self._target()
        if target.name != self._version.name:
            with self._lock:
                if target.name != self._version.name:
                    self._version = _Version(self._root, target)
        return self._version


class _Version:
    """One published version, open for reading."""

    def __init__(self, root: Path, target: Path) -> None:
        directory = root / "online" / target
        self.name = target.name
        try:
            recorded = json.loads((directory / "version.json").read_text())
        except (OSError, ValueError) as error:
            raise EvergreenError(
                f"the online features in {directory} are damaged ({error})", "Run evergreen retrain"
            ) from error
        self.spec = TableSpec.from_json(recorded["spec"])
        self.as_of = datetime.fromisoformat(recorded["as_of"])
        self._store = open_store(root, registry=directory, online=directory)
        self._views = {v.name: v for v in views(self.spec)}
        for entity in ("user", "item"):
            self.read(entity, [""], 0)  # opens the connection and fills Feast's registry cache before the first request

    def read(self, entity: Entity, ids: list[str], at_us: int) -> dict[str, pa.Array]:
        """Values of all views of an entity by feature name, (n,) each; one read of the online store."""
        mine = [v for v in self._views.values() if v.entity == entity]
        response = self._store.get_online_features(
            features=[f"{v.name}:{c}" for v in mine for c, _ in v.columns],
            entity_rows={f"{entity}_id": ids},
            full_feature_names=True,
        ).proto
        results = dict(zip(response.metadata.feature_names.val, response.results, strict=True))
        return {f"{v.name}__{c}": _column(v, t, results[f"{v.name}__{c}"], at_us) for v in mine for c, t in v.columns}


def _column(view: View, kind: ColumnType, vector: Any, at_us: int) -> pa.Array:
    """One feature's values; null where Feast has none or where the row has expired (SQLite does not check that)."""
    field, is_list = _FIELD[kind], kind in ("strings", "floats", "ints")
    oldest = at_us - view.ttl.total_seconds() * 1e6 if view.ttl else -1
    values = []
    for value, event in zip(vector.values, vector.event_timestamps, strict=True):
        present = value.HasField(field) and event.seconds * 1_000_000 + event.nanos // 1000 >= oldest
        found = getattr(value, field) if present else None
        values.append(list(found.val) if is_list and found is not None else found)
    return pa.array(values, ARROW[kind])
