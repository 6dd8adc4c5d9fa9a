"""KuaiRand in its publisher's file layout: `log_standard*.csv`, `video_features_basic*.csv`, `user_features*.csv`.

C. Gao et al., "KuaiRand: An Unbiased Sequential Recommendation Dataset with Randomly Exposed Videos", CIKM
2022.

*Requests.* A user sees 1.2 videos per 30 minutes, so a user's local day (column `date`, UTC+8) is one
request, and a video shown twice in it is one row: the first time shown, with the actions of all of them. Of
120,496 requests in the last 14 days of KuaiRand-Pure, 11,806 have more than three candidates (63,594 rows).

*Actions.* They keep their own names. No save is logged. Of the three that come nearest, `like` occurs in 6.3
% of the 11,806 requests and `follow` in 0.5 %, so that HIT@3 would rest on some 700 and 60 requests in two
weeks; `long_view` occurs in 71.8 % (28.7 % of the rows). It is the primary action. `hate` (0.1 % of the rows)
is the negative one. `follow`, `comment` and `forward` (0.1 %, 0.2 % and 0.1 %) are too rare to learn and are
left out.

*Features.* The user table is one snapshot without a date: it counts as valid from the start of the log,
though parts of it may have become true later. `author_id` is left out because 7,583 videos have 6,510
authors, and those `onehot_feat*` that take hundreds of values or nearly always the same one. `tab` is that of
the request's first row. Of the log, only the standard policy's files are read: `log_random*` was shown at
random, not by a feed.
"""

from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pyarrow as pa

from engagement.contract import REJECTED, Dataset, Manifest, Remarks
from engagement.errors import EvergreenError

ACTIONS = {"long_view": "long_view", "click": "is_click", "like": "is_like", "hate": "is_hate"}
USER_FEATURES = (
    "user_active_degree",
    "is_live_streamer",
    "is_video_author",
    "follow_user_num_range",
    "fans_user_num_range",
    "friend_user_num_range",
    "register_days_range",
    *(f"onehot_feat{n}" for n in (0, 1, 2, 4, 6, 7, 9, 10, 11)),
)
MANIFEST = Manifest(
    name="kuairand",
    actions=tuple(ACTIONS),
    primary_action="long_view",
    negative_actions=("hate",),
    exposure="impressions",
    user_features=USER_FEATURES,
    item_features=("video_type", "upload_type", "music_type", "tag", "video_duration"),
    context_features=("tab",),
    licence="CC BY-SA 4.0: credit Gao et al. (CIKM 2022), share alike",
    source=(
        "KuaiRand, standard log. A proxy for a feed with saves: a user's local day counts as one request, "
        "long_view stands where a save would."
    ),
)
_LOG = ("user_id", "video_id", "date", "time_ms", "tab", *ACTIONS.values())
_UTC = pl.Datetime("us", "UTC")


def read(path: Path) -> Dataset:
    """A dataset from a directory that holds KuaiRand's files; one local day is in memory at a time.

    Raises:
        EvergreenError: A file or a column is missing, or a file cannot be read; the error names it.
    """
    path = Path(path)
    logs = _find(path, "log_standard*.csv")
    videos, users = _find(path, "video_features_basic*.csv"), _find(path, "user_features*.csv")
    log = pl.concat([_scan(f, _LOG).with_columns(_file=pl.lit(f.name)) for f in logs], how="diagonal")
    days, start = (
        _collect(log.select(pl.col("date").unique().sort()), logs)["date"],
        _collect(log.select(_instant().min()), logs).item(),
    )
    remarks = Remarks(
        notes=["KuaiRand is a proxy: a local day counts as a request, long_view stands where a save would"]
    )
    return Dataset(
        manifest=MANIFEST,
        engagements=_days(log, logs, days.to_list(), remarks),
        items=_items(videos),
        users=_users(users, start),
        remarks=remarks,
    )


def _days(log: pl.LazyFrame, logs: list[Path], days: list[str | None], remarks: Remarks) -> Iterator[pa.Table]:
    """One table of engagement rows a local day; `remarks` are filled on the way."""
    for day in days:
        raw = _collect(log.filter(pl.col("date").eq_missing(pl.lit(day, pl.String))), logs)
        numbers = raw.select(pl.col(_LOG).cast(pl.Int64, strict=False))
        odd = raw.select(pl.any_horizontal(pl.col(c).is_not_null() & numbers[c].is_null() for c in _LOG)).to_series()
        null = raw.select(pl.any_horizontal(pl.col(c).is_null() for c in _LOG)).to_series()
        again = ~raw.select(pl.struct(pl.exclude("_file")).is_first_distinct()).to_series()
        reason = (
            pl.when(null).then(pl.lit("null_key")).when(odd).then(pl.lit("bad_type")).when(again).then(pl.lit("duplicate"))
        )  # fmt: skip
        judged = raw.with_columns(reason=reason)
        bad = judged.drop_nulls("reason")
        if bad.height:
            shown = pl.struct(pl.exclude("reason", "_file")).struct.json_encode()
            remarks.rejected.append(bad.select("reason", file="_file", row=shown).to_arrow().cast(REJECTED))
        good = raw.filter(judged["reason"].is_null())
        rows = _requests(good)
        remarks.merged += good.height - rows.height
        yield rows.to_arrow().replace_schema_metadata({"file": ", ".join(f.name for f in logs)})
    remarks.notes.append(
        f"{remarks.merged:,} rows were further views of a video on the same day, merged into the first"
    )


def _requests(rows: pl.DataFrame) -> pl.DataFrame:
    shown = rows.with_columns(_instant().alias("event_timestamp")).sort("event_timestamp", "video_id")
    shown = shown.with_columns(tab=pl.col("tab").first().over("user_id", "date"))
    acted = [(pl.col(column).cast(pl.Int64) > 0).any().alias(name) for name, column in ACTIONS.items()]
    merged = shown.group_by("user_id", "date", "video_id", maintain_order=True).agg(
        pl.col("event_timestamp").first(), pl.col("tab").first(), *acted
    )
    return merged.select(
        pl.format("{}-{}", "user_id", "date").alias("request_id"),
        "user_id",
        pl.col("video_id").alias("item_id"),
        "event_timestamp",
        *ACTIONS,
        "tab",
    )


def _instant() -> pl.Expr:
    # `time_ms` is UTC, whereas `date` and `hourmin` are local.
    return (pl.col("time_ms").cast(pl.Int64, strict=False) * 1000).cast(pl.Datetime("us")).dt.replace_time_zone("UTC")


def _items(files: list[Path]) -> pa.Table:
    needed = ("video_id", "upload_dt", *MANIFEST.item_features)
    raw = pl.concat([_collect(_scan(f, needed), [f]) for f in files], how="diagonal")
    uploaded = pl.col("upload_dt").str.to_datetime("%Y-%m-%d", time_unit="us", strict=False)
    return raw.select(
        pl.col("video_id").alias("item_id"),
        # The date is local, so its day begins eight hours before the UTC day.
        (uploaded - pl.duration(hours=8)).dt.replace_time_zone("UTC").alias("created_timestamp"),
        "video_type",
        "upload_type",
        pl.col("music_type").cast(pl.Float64, strict=False).cast(pl.Int64).cast(pl.String),
        pl.col("tag").str.split(","),
        pl.col("video_duration").cast(pl.Float64, strict=False),
    ).to_arrow()


def _users(files: list[Path], start: object) -> pa.Table:
    raw = pl.concat([_collect(_scan(f, ("user_id", *USER_FEATURES)), [f]) for f in files], how="diagonal")
    return raw.select("user_id", pl.lit(start, _UTC).alias("event_timestamp"), *USER_FEATURES).to_arrow()


def _find(path: Path, pattern: str) -> list[Path]:
    files = sorted(path.rglob(pattern)) if path.is_dir() else []
    if not files:
        raise EvergreenError(f"{path} holds no {pattern}", "Name the directory with KuaiRand's CSV files")
    return files


def _scan(file: Path, needed: tuple[str, ...]) -> pl.LazyFrame:
    """A CSV file as text columns: what has no reading as a number is judged row by row, not by the reader."""
    try:
        frame = pl.scan_csv(file, infer_schema=False)
        names = frame.collect_schema().names()
    except (OSError, pl.exceptions.PolarsError) as error:
        raise _unreadable([file], error) from error
    for name in needed:
        if name not in names:
            raise EvergreenError(f"{file} lacks the column '{name}'", "Use the file as KuaiRand publishes it")
    return frame


def _collect(frame: pl.LazyFrame, files: list[Path]) -> pl.DataFrame:
    try:
        return frame.collect()
    except (OSError, pl.exceptions.PolarsError) as error:
        raise _unreadable(files, error) from error


def _unreadable(files: list[Path], error: Exception) -> EvergreenError:
    named, reason = ", ".join(str(f) for f in files), " ".join(str(error).split())[:160]
    return EvergreenError(
        f"{named} cannot be read ({reason})", "Nothing was imported: get the file again, then import again"
    )
