"""The contract: what a dataset of engagement looks like, version 1.

A dataset is a directory with `manifest.json`, `engagements/*.parquet`, `items/*.parquet` and, when anything
is known about users, `users/*.parquet`. This module says which columns those hold and of which types;
`validate` applies it to rows, `importers.contract_dir` to directories.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from engagement.errors import EvergreenError
from engagement.files import write_text

VERSION = 1
EXPOSURES = ("impressions", "positives")
TIMESTAMP = pa.timestamp("us", tz="UTC")
IDS = ("request_id", "user_id", "item_id")
ENGAGEMENT_REQUIRED = (*IDS, "event_timestamp")  # and one column an action
ENGAGEMENT_FIXED = (*ENGAGEMENT_REQUIRED, "created_timestamp", "position", "sampled")
ITEM_FIXED = ("item_id", "created_timestamp", "embedding")
USER_FIXED = ("user_id", "event_timestamp")
FEATURES = {"engagements": "context_features", "items": "item_features", "users": "user_features"}
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,62}")


@dataclass(frozen=True)
class Manifest:
    """What a dataset says about itself.

    Attributes:
        name: The dataset's name; a store holds one dataset.
        actions: Names of the action columns, at least `primary_action`.
        primary_action: The action that HIT@3 is about.
        negative_actions: Actions that a good ranking avoids.
        exposure: `impressions` when everything shown was logged, `positives` when only what people acted on
            was; then each request is completed with sampled candidates.
        user_features: Feature columns of `users/`.
        item_features: Feature columns of `items/`, besides the optional `embedding`.
        context_features: String columns of `engagements/` that hold for a whole request.
        licence: Under which terms the data may be used.
        source: Where it comes from, and what it is a proxy for.
        version: Version of the contract.
    """

    name: str
    actions: tuple[str, ...]
    primary_action: str
    exposure: str
    negative_actions: tuple[str, ...] = ()
    user_features: tuple[str, ...] = ()
    item_features: tuple[str, ...] = ()
    context_features: tuple[str, ...] = ()
    licence: str = ""
    source: str = ""
    version: int = VERSION

    def to_json(self) -> dict[str, Any]:
        """A JSON form that `from_json` reads back."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_json(cls, data: object, where: str = "manifest.json") -> "Manifest":
        """Read a manifest, telling all its problems at once.

        Args:
            data: The decoded JSON.
            where: Named in the error.

        Raises:
            EvergreenError: The manifest breaks the contract; one line names every problem.
        """
        problems = _problems(data)
        if problems:
            raise EvergreenError(f"{where} breaks the contract: {'; '.join(problems)}", "Correct the manifest")
        assert isinstance(data, dict)
        known = {f.name for f in fields(cls)}
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items() if k in known}
        return cls(**values)

    @classmethod
    def load(cls, directory: Path) -> "Manifest":
        """Read `directory/manifest.json`.

        Raises:
            EvergreenError: There is none, it is no JSON, or it breaks the contract.
        """
        path = Path(directory) / "manifest.json"
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise EvergreenError(
                f"{directory} holds no readable manifest.json ({error.strerror})",
                "Name a directory in the contract",
            ) from error
        except ValueError as error:
            raise EvergreenError(f"{path} is no JSON ({error})", "Correct the manifest") from error
        return cls.from_json(data, str(path))

    def save(self, directory: Path) -> None:
        """Write `directory/manifest.json` atomically."""
        write_text(Path(directory) / "manifest.json", json.dumps(self.to_json(), indent=1) + "\n")

    def difference(self, other: "Manifest") -> list[str]:
        """Names of the fields in which two manifests describe different data; licence, source and features may."""
        compared = [f.name for f in fields(self) if f.name not in ("licence", "source", *FEATURES.values())]
        return [n for n in compared if getattr(self, n) != getattr(other, n)]

    def vanished(self, other: "Manifest") -> list[str]:
        """Features that this manifest names and the other one does not, each with its table."""
        held, given = self.features(), other.features()
        return [f"'{name}' of {room}" for room in FEATURES for name in held[room] if name not in given[room]]

    def with_features(self, added: Mapping[str, Iterable[str]]) -> "Manifest":
        """This manifest with further features by table, behind those that it names."""
        named: dict[str, Any] = {}
        for room, new in added.items():
            named[FEATURES[room]] = tuple(dict.fromkeys((*self.features()[room], *new)))
        return replace(self, **named)

    def features(self) -> dict[str, tuple[str, ...]]:
        """The features by table."""
        return {room: getattr(self, name) for room, name in FEATURES.items()}


REJECTED = pa.schema([("reason", pa.string()), ("file", pa.string()), ("row", pa.string())])


@dataclass
class Remarks:
    """What an importer has to say about its conversion; complete once the engagements were read.

    Attributes:
        rejected: Rows that it could not use, such as exact duplicates in a format whose rows it merges, as
            tables in the columns of `REJECTED`. They count as read and as bad, and go to quarantine.
        merged: Rows that became part of another row.
        notes: One line each, for the report.
        unreadable: Table, file and reason of each file that was left out because it is damaged.
    """

    rejected: list[pa.Table] = field(default_factory=list)
    merged: int = 0
    notes: list[str] = field(default_factory=list)
    unreadable: list[tuple[str, str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Dataset:
    """What an importer hands to the store.

    Attributes:
        manifest: What the data is.
        engagements: Batches of rows in the contract's columns, in a stable order; read once, never all at
            once. Schema metadata `file` names the file that a batch comes from.
        items: All items.
        users: All users; may be empty.
        remarks: Filled by the importer while the engagements are read.
    """

    manifest: Manifest
    engagements: Iterable[pa.Table]
    items: pa.Table
    users: pa.Table
    remarks: Remarks = field(default_factory=Remarks)


def engagement_schema(manifest: Manifest) -> pa.Schema:
    """Columns of a stored engagement row, in order."""
    return pa.schema(
        [
            *((name, pa.string()) for name in IDS),
            ("event_timestamp", TIMESTAMP),
            ("created_timestamp", TIMESTAMP),
            ("position", pa.int16()),
            ("sampled", pa.bool_()),
            *((name, pa.bool_()) for name in manifest.actions),
            *((name, pa.string()) for name in manifest.context_features),
        ]
    )


def item_schema(manifest: Manifest, found: pa.Schema) -> pa.Schema:
    """Columns of a stored item; each feature is string, list<string> or double, after the type found.

    Raises:
        EvergreenError: A feature is missing from `found`, or of a type that is none of the three.
    """
    columns = [("item_id", pa.string()), ("created_timestamp", TIMESTAMP)]
    columns += [(name, feature_type("items", name, found)) for name in manifest.item_features]
    if "embedding" in found.names:
        columns.append(("embedding", pa.list_(pa.float32())))
    return pa.schema(columns)


def user_schema(manifest: Manifest, found: pa.Schema) -> pa.Schema:
    """Columns of a stored user; features as in `item_schema`."""
    columns = [("user_id", pa.string()), ("event_timestamp", TIMESTAMP)]
    return pa.schema(columns + [(name, feature_type("users", name, found)) for name in manifest.user_features])


def feature_type(room: str, name: str, found: pa.Schema) -> pa.DataType:
    """The stored type of a feature column.

    Numbers of every width become double, so that a later delivery with a null or a fraction still fits.

    Raises:
        EvergreenError: The column is missing or neither text, a list of text nor a number.
    """
    if name not in found.names:
        raise EvergreenError(
            f"{room} lack the column '{name}' that the manifest names", "Add it or correct the manifest"
        )
    kind = found.field(name).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if _is_text(kind) or pa.types.is_null(kind):
        return pa.string()
    if (
        pa.types.is_integer(kind)
        or pa.types.is_floating(kind)
        or pa.types.is_decimal(kind)
        or pa.types.is_boolean(kind)
    ):
        return pa.float64()
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        inner = kind.value_type
        inner = inner.value_type if pa.types.is_dictionary(inner) else inner
        if _is_text(inner) or pa.types.is_null(inner):
            return pa.list_(pa.string())
    raise EvergreenError(
        f"column '{name}' of {room} has the type {kind}", "Give it as string, list<string> or a number"
    )


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _problems(data: object) -> list[str]:
    """Every way in which decoded JSON breaks the contract, in words."""
    if not isinstance(data, dict):
        return ["it is not a JSON object"]
    lists = {
        n: data.get(n, [])
        for n in ("actions", "negative_actions", "user_features", "item_features", "context_features")
    }
    problems = [f"'{n}' must be a list of names" for n, v in lists.items() if not _names_only(v)]
    problems += [f"'{n}' must be text" for n in ("licence", "source") if not isinstance(data.get(n, ""), str)]
    if not isinstance(data.get("name"), str) or not data["name"].strip():
        problems.append("'name' is missing or no text")
    if data.get("version") != VERSION or isinstance(data.get("version"), bool):
        problems.append(f"'version' must be {VERSION}, not {data.get('version')!r}")
    if data.get("exposure") not in EXPOSURES:
        problems.append(f"'exposure' must be 'impressions' or 'positives', not {data.get('exposure')!r}")
    if problems:
        return problems
    actions = lists["actions"]
    if data.get("primary_action") not in actions:
        problems.append(f"primary_action {data.get('primary_action')!r} is not among the actions {actions}")
    problems += [
        f"negative action '{n}' is not among the actions" for n in lists["negative_actions"] if n not in actions
    ]
    if data.get("primary_action") in lists["negative_actions"]:
        problems.append(f"primary_action {data['primary_action']!r} cannot be negative")
    problems += _name_problems("engagements", [*actions, *lists["context_features"]], ENGAGEMENT_FIXED)
    problems += _name_problems("items", lists["item_features"], ITEM_FIXED)
    problems += _name_problems("users", lists["user_features"], (*USER_FIXED, "created_timestamp"))
    return problems


def _names_only(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(v, str) for v in value)


def _name_problems(room: str, names: list[str], fixed: tuple[str, ...]) -> list[str]:
    # Compared without case: DuckDB and SQLite would take "Save" and "save" for one column.
    problems, seen = [], {f.lower() for f in fixed}
    for name in names:
        if not _NAME.fullmatch(name):
            problems.append(f"'{name}' cannot name a column (a letter, then letters, digits or _, at most 63)")
        elif name.lower() in {f.lower() for f in fixed}:
            problems.append(f"'{name}' is a fixed column of {room}")
        elif name.lower() in seen:
            problems.append(f"'{name}' is named twice for {room}")
        seen.add(name.lower())
    return problems
