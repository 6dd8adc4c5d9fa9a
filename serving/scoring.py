"""Features and scores of one request: the same lines for the server and for whoever checks its answers."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

import numpy as np

from engagement.table import RankingTable
from evergreen.settings import Settings
from model.served import SERVED, ServedRanker
from serving.protocol import RankRequest


class Reader(Protocol):
    """Reads the features of one request from the online store (`feature_repo`'s `OnlineReader`)."""

    def read(self, user_id: str, item_ids: list[str], context: dict[str, str], at: datetime) -> RankingTable:
        """The request as a ranking table with one request."""
        ...


class Scorer:
    """A model with its features.

    Attributes:
        ranker: The exported model, without features.

    Args:
        bundle: Directory of the bundle, which holds its export.
        reader: Reads the features.

    Raises:
        EvergreenError: The bundle was not exported, or its files were changed.
    """

    def __init__(self, bundle: Path, reader: Reader) -> None:
        self.ranker = ServedRanker.load(bundle / SERVED)
        self.spec = self.ranker.spec
        self._reader = reader

    def __call__(self, request: RankRequest) -> np.ndarray:
        """(C, A) float32 probabilities, rows in the order of the request's candidates."""
        at = request.time or datetime.now(UTC)
        table = self._reader.read(request.user_id, list(request.item_ids), dict(request.context), at)
        (scores_CA,) = self.ranker.score([table])
        return scores_CA


def open_features(settings: Settings) -> Reader:
    """The home's online features.

    Raises:
        EvergreenError: Nothing was materialised yet.
    """
    from feature_repo.repo import FeatureRepo

    return FeatureRepo.of(settings).online()
