"""The model as MLflow loads it: code and a bundle directory, nothing pickled ("models from code").

`mlflow.pyfunc.load_model("models:/homefeed-ranker@champion").predict(frame)` scores ranking tables on disk.
A table and not a row a candidate is the input, because the users' action histories belong to a request's
features.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext


class RankerModel(PythonModel):
    """Scores every candidate of the ranking tables that it is given."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load the bundle; it verifies itself."""
        from model.bundle import Bundle

        self.bundle = Bundle.load(Path(context.artifacts["bundle"]))

    def predict(self, context: PythonModelContext, model_input: pd.DataFrame, params: Any = None) -> pd.DataFrame:
        """Score saved ranking tables.

        Args:
            context: Given by MLflow.
            model_input: Column `table`: directory of a saved ranking table, one a row.
            params: Not used.

        Returns:
            A row a candidate: `request_id`, `item_id` and a probability for each action.
        """
        from engagement.table import RankingTable
        from model.predict import score

        frames = []
        for directory in model_input["table"]:
            table = RankingTable.load(Path(directory))
            names = {
                "request_id": np.char.decode(table.request_id[table.request_of_row], "utf-8"),
                "item_id": np.char.decode(table.item_id, "utf-8"),
            }
            scores = score(self.bundle, table)
            columns = {action: scores[:, i].astype(float) for i, action in enumerate(table.spec.actions)}
            frames.append(pd.DataFrame(names | columns))
        return pd.concat(frames, ignore_index=True)


set_model(RankerModel())
