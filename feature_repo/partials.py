"""What the features need of the log, computed once a part: a later build reads the log's new parts only.

A part of the log never changes, so what was computed from it is named by the part's digest and never changes either:

    partials/<sha256>-counts.parquet     rows and actions by user, item, hour shown and hour known
    partials/<sha256>-actions.parquet    one row an action: user, item, when shown, when known, which (a bit mask)

Both hold all real rows of the part, also those that a snapshot does not see yet: whoever reads them compares the times.
Hours are numbered since 1970 UTC. Columns of ours have a colon, which no name of a dataset has.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from engagement.errors import EvergreenError
from engagement.files import read_part
from engagement.index import Part, load_index, to_us
from engagement.snapshot import Snapshot
from feature_repo.encode import HOUR_US

COUNTS, ACTIONS = "counts", "actions"
KNOWN = pl.max_horizontal("event_timestamp", "created_timestamp").dt.timestamp("us")


@dataclass(frozen=True)
class Partials:
    """The partials of a store.

    Attributes:
        root: Their directory.
        snapshot: The log.
    """

    root: Path
    snapshot: Snapshot

    def update(self) -> int:
        """Read the parts of the snapshot that were not read before; returns how many."""
        parts = self.snapshot.parts("engagements")
        new = [p for p in parts if not all(self._file(p, kind).exists() for kind in (COUNTS, ACTIONS))]
        for part in new:
            self._write(part)
        # A part that left the store, because a user is to be forgotten, must not live on here.
        kept = {p.sha256 for p in (*parts, *load_index(self.snapshot.root))}
        for file in self.root.glob("*.parquet"):
            if file.name.split("-")[0] not in kept:
                file.unlink()
        return len(new)

    def counts(self, parts: Iterable[Part]) -> pl.DataFrame:
        """Counts of some parts: user_id, item_id, `:shown`, `:known`, `n:` (impressions) and `n:<action>`, integers."""
        schema = {":shown": pl.Int64, ":known": pl.Int64, **dict.fromkeys(self._numbers(), pl.Int64)}
        return self._read(parts, COUNTS, {"user_id": pl.String, "item_id": pl.String, **schema})

    def actions(self) -> pl.DataFrame:
        """All actions known before `as_of`: user_id, item_id, `time`, `known` (microseconds), `actions` (bit mask)."""
        schema = {"user_id": pl.String, "item_id": pl.String, "time": pl.Int64, "known": pl.Int64, "actions": pl.Int64}
        rows = self._read(self.snapshot.parts("engagements"), ACTIONS, schema)
        return rows.filter(pl.col("known") < to_us(self.snapshot.as_of))

    def _numbers(self) -> list[str]:
        return ["n:", *(f"n:{a}" for a in self.snapshot.manifest.actions)]

    def _file(self, part: Part, kind: str) -> Path:
        return self.root / f"{part.sha256}-{kind}.parquet"

    def _read(self, parts: Iterable[Part], kind: str, schema: dict[str, type[pl.DataType]]) -> pl.DataFrame:
        files = [self._file(p, kind) for p in parts]
        if not files:
            return pl.DataFrame(schema=schema)
        try:
            return pl.read_parquet(files, glob=False, hive_partitioning=False)
        except (OSError, pl.exceptions.PolarsError) as error:
            reason = " ".join(str(error).split())[:160]
            raise EvergreenError(
                f"a file in {self.root} cannot be read ({reason})", "Delete that directory; it is made again"
            ) from error

    def _write(self, part: Part) -> None:
        actions = self.snapshot.manifest.actions
        columns = ["user_id", "item_id", "event_timestamp", "created_timestamp", "sampled", *actions]
        table = pl.from_arrow(read_part(self.snapshot.root / part.path, columns))
        assert isinstance(table, pl.DataFrame)
        rows = table.filter(~pl.col("sampled"))
        shown, known = (pl.col(f"{n}_timestamp").dt.timestamp("us") // HOUR_US for n in ("event", "created"))
        sums = [pl.len().cast(pl.Int64).alias("n:"), *(pl.col(a).sum().cast(pl.Int64).alias(f"n:{a}") for a in actions)]
        hours = [shown.alias(":shown"), known.alias(":known")]
        _save(rows.group_by("user_id", "item_id", *hours, maintain_order=True).agg(sums), self._file(part, COUNTS))
        _save(taken(table, actions), self._file(part, ACTIONS))


def taken(log: pl.DataFrame, actions: tuple[str, ...]) -> pl.DataFrame:
    """The real rows of a log that hold an action, with the columns of `Partials.actions`."""
    mask = pl.sum_horizontal([pl.col(a).fill_null(False).cast(pl.Int64) * (1 << i) for i, a in enumerate(actions)])
    rows = log.filter(~pl.col("sampled")).select(
        "user_id", "item_id", time=pl.col("event_timestamp").dt.timestamp("us"), known=KNOWN, actions=mask
    )
    return rows.filter(pl.col("actions") != 0)


def _save(frame: pl.DataFrame, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    frame.write_parquet(temporary, compression="zstd")
    temporary.replace(path)
