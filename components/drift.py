"""Step 5: has the world moved away from what the serving model was trained on?"""

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from kfp import dsl

from components.base import step, tell
from engagement.table import RankingTable, micros
from evergreen.settings import Settings
from monitoring.drift import Skew
from monitoring.frame import sample_frame
from monitoring.verdict import DriftVerdict

if TYPE_CHECKING:
    from model.bundle import Bundle

SAMPLE_REQUESTS = 1500  # enough rows for a distribution, few enough to score in a second
REFERENCE = "reference.parquet"


def scored_sample(
    bundle: "Bundle", table: RankingTable, directory: Path, start: datetime, end: datetime
) -> tuple[pa.Table, float]:
    """A sample of what was shown in [start, end): raw feature values, the model's scores, the labels.

    Args:
        bundle: The model whose predictions are watched.
        table: The ranking table that `directory` holds, with `sample.parquet` beside it.
        directory: Its directory.
        start: Start of the window.
        end: End of the window, exclusive.

    Returns:
        The sample, one row a candidate, and the model's HIT@3 of the primary action on its requests (NaN if none
        has more than three candidates).
    """
    from model.metrics import hit3, hits
    from model.predict import score

    sample = pq.read_table(directory / "sample.parquet")
    rows = sample["row"].to_numpy()
    request = table.request_of_row[rows]
    inside = (table.time[request] >= micros(start)) & (table.time[request] < micros(end))
    chosen = np.unique(request[inside])
    chosen = chosen[:: max(1, -(-len(chosen) // SAMPLE_REQUESTS))]
    kept = np.flatnonzero(inside & np.isin(request, chosen))
    part = table.select(chosen)
    # A row's index in `part`: the start of its request there, plus its place in the request.
    place = rows[kept] - table.offsets[request[kept]] + part.offsets[np.searchsorted(chosen, request[kept])]
    sample = sample.take(kept)
    sample = sample.set_column(sample.column_names.index("row"), "row", pa.array(place))
    scores = score(bundle, part)
    return sample_frame(sample, part, scores), hit3(hits(part, scores))[table.spec.primary_action]


def check_window(
    settings: Settings,
    served_by: tuple[str, Path],
    table_dir: Path,
    window: tuple[datetime, datetime],
    out: Path,
    skew: Skew | None,
) -> DriftVerdict:
    """Compare a window with the training window of the model that served it; record the check in the workspace.

    Args:
        settings: The home.
        served_by: The model's version (`first` for one that is not registered yet) and its bundle directory, which
            holds its reference.
        table_dir: Directory of a ranking table that covers the window.
        window: Start and end of the window; the check is dated at its end.
        out: Directory for the page and the verdict.
        skew: The parity of served and training features, if it could be asked.
    """
    from model.bundle import Bundle
    from monitoring.drift import check
    from monitoring.workspace import record

    version, directory = served_by
    table = RankingTable.load(table_dir)
    current, quality = scored_sample(Bundle.load(directory), table, table_dir, *window)
    tell(f"comparing {current.num_rows} rows with the training window of model {version}")
    reference = pq.read_table(directory / REFERENCE)
    name = f"HIT@3/{table.spec.primary_action}"
    verdict = check(reference, current, table.spec, window[1], version, out, quality={name: quality}, skew=skew)
    record(settings.evidently, settings.model_name, out)
    return verdict


@step
def check_drift(
    plan: str,
    table: dsl.Input[dsl.Dataset],
    bundle: dsl.Input[dsl.Model],
    parity: dsl.Input[dsl.Artifact],
    verdict: dsl.Output[dsl.Artifact],
    page: dsl.Output[dsl.HTML],
) -> None:
    """Compare the slot's later requests with the training window of the model that served them."""
    import shutil
    from pathlib import Path

    from components.base import begin
    from components.drift import check_window
    from components.parity import read_skew
    from components.plan import Plan
    from components.train import champion_directory

    settings, p = begin(), Plan.from_json(plan)
    directory = champion_directory(settings, p) or Path(bundle.path)
    out = p.directory(settings) / "drift"
    served_by, window, skew = (p.champion or "first", directory), (p.train_end, p.as_of), read_skew(Path(parity.path))
    check_window(settings, served_by, Path(table.path), window, out, skew)
    shutil.copyfile(out / "drift.json", verdict.path)
    shutil.copyfile(out / "drift.html", page.path)
