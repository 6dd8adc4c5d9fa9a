"""`python -m model`: train on a ranking table by hand, alone or under `torchrun`; print the sizes of the recipes."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from engagement.errors import EvergreenError
from engagement.table import Feature, RankingTable, TableSpec
from model.bundle import Bundle
from model.config import RECIPES, STRATEGY_NAMES
from model.distributed import Ranks, joined
from model.sizes import sizes_of
from model.train import train

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)

# Features for `sizes` where no table is given: about what a small Homefeed has.
EXAMPLE = TableSpec(
    (
        Feature("user_id", "request", "categorical"),
        Feature("context", "request", "numeric", width=20),
        Feature("item_id", "candidate", "categorical"),
        Feature("topics", "candidate", "categories", width=3),
        Feature("counts", "candidate", "numeric", width=40),
    ),
    ("save", "click", "hide"),
    "save",
    ("hide",),
)


@contextmanager
def _bar(shown: bool) -> Iterator[Callable[[int, int, float], None]]:
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not shown) as bar:
        task = bar.add_task("", total=None)
        yield lambda step, steps, loss: bar.update(task, completed=step, total=steps, description=f"loss {loss:.4f}")


@app.command("train")
def train_command(
    table: Annotated[Path, typer.Argument(help="Directory of a ranking table.")],
    out: Annotated[Path, typer.Option(help="Where the bundle goes; checkpoints lie beside it.")],
    recipe: Annotated[str, typer.Option(help=f"One of {', '.join(RECIPES)}.")] = "laptop",
    strategy: Annotated[str, typer.Option(help=f"One of {', '.join(STRATEGY_NAMES)}.")] = "scratch",
    parent: Annotated[Path | None, typer.Option(help="Bundle of the champion to continue from.")] = None,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
) -> None:
    """Train on all requests of a table and write the bundle. A run that was killed continues."""
    if recipe not in RECIPES:
        raise EvergreenError(f"there is no recipe {recipe!r}", f"Choose one of {', '.join(RECIPES)}")
    champion = Bundle.load(parent) if parent else None
    data, kept = RankingTable.load(table), out.with_name(f"{out.name}.checkpoints")
    with joined():
        first = Ranks.current().rank == 0
        with _bar(first and sys.stderr.isatty()) as progress:
            bundle = train(data, RECIPES[recipe](), strategy, champion, seed, kept, progress)
        if first:
            bundle.save(out)
            told = " · ".join(f"{name} {value:.4g}" for name, value in bundle.metrics.items())
            Console().print(f"{out} · {bundle.digest[:12]} · {bundle.train_rows:,} rows · {told}", soft_wrap=True)


@app.command()
def sizes(
    table: Annotated[Path | None, typer.Option(help="Ranking table whose features to take.")] = None,
) -> None:
    """Parameters and FLOPs per candidate of every recipe; takes no memory for them."""
    spec = RankingTable.load(table).spec if table else EXAMPLE
    shown = Table("recipe", "in the table", "dense", "FLOPs per candidate", title="Parameters")
    for column in shown.columns[1:]:
        column.justify = "right"
    for name, make in RECIPES.items():
        measured = sizes_of(make().ranker, spec)
        shown.add_row(name, f"{measured.table:,}", f"{measured.dense:,}", f"{measured.flops:,.0f}")
    Console().print(shown)


def main() -> None:
    """Run the command; one clear line an error."""
    torch.set_num_threads(1)  # until training sets its own
    try:
        app(prog_name="python -m model")
    except EvergreenError as error:
        Console(stderr=True).print(f"error: {error}", style="red", soft_wrap=True, markup=False)
        sys.exit(1)


if __name__ == "__main__":
    main()
