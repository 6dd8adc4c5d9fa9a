"""Step 5: has the world moved away from what the serving model was trained on?"""

from datetime import datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from kfp import dsl

from components.base import step
from engagement.table import RankingTable, micros
from model.bundle import Bundle

SAMPLE_REQUESTS = 1500  # enough rows for a distribution, few enough to score in a second


def scored_sample(bundle: Bundle, table: RankingTable, table_dir: Path, start: datetime, end: datetime) -> pa.Table:
    """Raw feature values of a sample of the candidates shown in [start, end), with the model's scores and the labels.

    Args:
        bundle: The model whose predictions are watched.
        table: The ranking table that `table_dir` holds.
        table_dir: Directory with `sample.parquet`, written beside the table.
        start: Start of the window.
        end: End of the window, exclusive.
    """
    from model.predict import score
    from monitoring.frame import sample_frame

    sample = pq.read_table(table_dir / "sample.parquet")
    rows = sample["row"].to_numpy()
    request = table.request_of_row[rows]
    inside = (table.time[request] >= micros(start)) & (table.time[request] < micros(end))
    chosen = np.unique(request[inside])
    chosen = chosen[:: max(1, -(-len(chosen) // SAMPLE_REQUESTS))]
    part = table.select(chosen)
    keep = np.flatnonzero(inside & np.isin(request, chosen))
    # Position of each sampled row inside `part`: its request's start there, plus its place in the request.
    place = rows[keep] - table.offsets[request[keep]] + part.offsets[np.searchsorted(chosen, request[keep])]
    scores = score(bundle, part)
    return sample_frame(sample.take(keep), scores[place], part.labels[place], table.spec)


@step
def check_drift(
    plan: str,
    table: dsl.Input[dsl.Dataset],
    bundle: dsl.Input[dsl.Model],
    verdict: dsl.Output[dsl.Artifact],
    page: dsl.Output[dsl.HTML],
) -> None:
    """Compare the slot's window with the training window of the model that served it."""
    from pathlib import Path

    from components.base import begin
    from components.drift import drift_of_window
    from components.plan import Plan
    from components.train import champion_bundle
    from model.bundle import Bundle

    settings, p = begin(), Plan.from_json(plan)
    served_by = champion_bundle(settings, p.champion) or Bundle.load(Path(bundle.path))
    drift_of_window(settings, p, served_by, Path(table.path), Path(verdict.path), Path(page.path))
