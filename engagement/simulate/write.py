"""Writing a simulated feed: a directory in the contract, and the truth beside it, block by block."""

import shutil
from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from engagement.contract import TIMESTAMP, Manifest
from engagement.errors import EvergreenError
from engagement.simulate.draw import ACTIONS, DAY_US, Block, Population, blocks, populate
from engagement.simulate.worlds import START, Scale, World

Progress = Callable[[int, int], None]  # (days written, days)
TRUTH = "truth"  # folder beside the contract's; an import does not look at it
_START_US = int(START.timestamp()) * 1_000_000
_TOGETHER = 32  # blocks in a row group


def simulate(world: World, scale: Scale, out: Path, progress: Progress = lambda done, days: None) -> dict[str, Any]:
    """Draw a world and write it to `out`, which appears whole or not at all.

    `out` holds the contract's files (an engagement file a day) and `truth/`: for each engagement row, in the same
    order, `request_id`, `item_id` and the chance of each action without position bias (float32).

    Returns:
        What was written: world, seed and counts.

    Raises:
        EvergreenError: The scale cannot be drawn, or `out` is there already and not empty.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise EvergreenError(f"{out} is not empty", "Name a new directory")
    population = populate(world, scale)
    room = out.with_name(f".{out.name}.writing")
    shutil.rmtree(room, ignore_errors=True)
    for name in ("engagements", "items", "users", TRUTH):
        (room / name).mkdir(parents=True)
    manifest(world, scale).save(room)
    pq.write_table(_items(population), room / "items" / "items.parquet")
    pq.write_table(_users(population), room / "users" / "users.parquet")
    for day in range(scale.days):
        _write_day(population, day, room)
        progress(day + 1, scale.days)
    if out.exists():
        out.rmdir()
    room.replace(out)
    requests = int(population.requests_D.sum())
    return {
        "world": world.name,
        "seed": scale.seed,
        "out": str(out),
        "impressions": requests * world.candidates,
        "requests": requests,
        "users": scale.users,
        "items": scale.items,
        "first": START.isoformat(),
        "days": scale.days,
    }


def manifest(world: World, scale: Scale) -> Manifest:
    """What a simulated dataset says about itself."""
    return Manifest(
        name=f"simulated-{world.name}-{scale.seed}",
        actions=ACTIONS,
        primary_action="save",
        negative_actions=("hide",),
        exposure="impressions",
        user_features=("country",),
        item_features=("category", "format"),
        context_features=("season",),
        licence="CC0-1.0",
        source=f"simulated: world {world.name}, {scale.users} users, {scale.items} items, seed {scale.seed}",
    )


def _write_day(population: Population, day: int, room: Path) -> None:
    name = f"{START + timedelta(days=day):%Y-%m-%d}.parquet"
    season, found = population.season(day), blocks(population, day)
    with ExitStack() as files:
        writers: list[pq.ParquetWriter] = []
        group: list[tuple[pa.Table, pa.Table]] = []
        while group or not writers:
            group = [_tables(population, block, season) for _, block in zip(range(_TOGETHER), found, strict=False)]
            for place, folder in enumerate(("engagements", TRUTH)):
                if not group:
                    continue
                table = pa.concat_tables([pair[place] for pair in group])
                if len(writers) <= place:
                    # Without the arrow schema inside, dictionaries are how strings are kept, not a type of their own.
                    options: dict[str, Any] = {"compression": "zstd", "store_schema": False}
                    writer = pq.ParquetWriter(room / folder / name, table.schema, **options)
                    writers.append(files.enter_context(writer))
                writers[place].write_table(table)
            if not group:
                break


def _tables(population: Population, block: Block, season: str) -> tuple[pa.Table, pa.Table]:
    """Engagements and truth of a block, row by row the same."""
    requests, shown = block.item_RN.shape
    request = _coded(np.repeat(np.arange(requests, dtype=np.int32), shown), _named("r", requests, block.first))
    item = _coded(*_codes(block.item_RN.ravel(), "i"))
    users, names = _codes(block.user_R, "u")
    columns = {
        "request_id": request,
        "user_id": _coded(np.repeat(users, shown), names),
        "item_id": item,
        "event_timestamp": pa.array(np.repeat(_START_US + block.time_R, shown), TIMESTAMP),
        "position": pa.array(np.tile(np.arange(shown, dtype=np.int16), requests)),
        **{a: pa.array(block.acted_RN3[:, :, k].ravel()) for k, a in enumerate(ACTIONS)},
        "season": _coded(np.zeros(requests * shown, np.int32), pa.array([season])),
    }
    chances = {a: pa.array(block.truth_RN3[:, :, k].ravel()) for k, a in enumerate(ACTIONS)}
    return pa.table(columns), pa.table({"request_id": request, "item_id": item, **chances})


def _items(population: Population) -> pa.Table:
    return pa.table(
        {
            "item_id": _named("i", len(population.born_I)),
            "created_timestamp": pa.array(_START_US + population.born_I.astype(np.int64) * DAY_US, TIMESTAMP),
            "category": _named("c", int(population.category_I.max()) + 1).take(pa.array(population.category_I)),
            "format": _named("f", int(population.format_I.max()) + 1).take(pa.array(population.format_I)),
        }
    )


def _users(population: Population) -> pa.Table:
    return pa.table(
        {
            "user_id": _named("u", len(population.country_U)),
            "event_timestamp": pa.array(_START_US + population.joined_U.astype(np.int64) * DAY_US, TIMESTAMP),
            "country": _named("land", int(population.country_U.max()) + 1).take(pa.array(population.country_U)),
        }
    )


def _codes(numbers: np.ndarray, letter: str) -> tuple[np.ndarray, pa.Array]:
    """Codes of a block's own users or items, and their names."""
    found, codes = np.unique(numbers, return_inverse=True)
    return codes.astype(np.int32), _text(letter, found)


def _named(letter: str, count: int, first: int = 0) -> pa.Array:
    return _text(letter, np.arange(first, first + count))


def _text(letter: str, numbers: np.ndarray) -> pa.Array:
    return pc.binary_join_element_wise(letter, pa.array(numbers).cast(pa.string()), "")


def _coded(codes: np.ndarray, names: pa.Array) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(pa.array(codes), names)
