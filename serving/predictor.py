"""The ranker as a KServe model: a small request in, features read here, a ranking with probabilities out.

KServe holds the model (readiness, metadata); its requests come through the doors (`rest_door.py`, `grpc_door.py`),
which skip KServe's way from bytes to tensors and back.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Protocol

import numpy as np
from kserve import Model

from engagement.table import RankingTable, TableSpec
from serving.admission import Admission, LateError, ShedError, Terms
from serving.batcher import Batcher
from serving.degrade import Features
from serving.metrics import Metrics
from serving.protocol import CONTEXT, TOO_MANY, Answer, RankRequest, RefusedError, Tensor, parse
from serving.serving_log import Served

BATCH_ROWS = 1024  # candidates in one run of the model: more of them leave the processor's caches
FEATURES_SHARE = 0.5  # of the deadline that reading features may take, before the answer does without
WARM_UP_SECONDS = 10.0  # for the first read of the features
CLIENT_LEFT = 499  # as nginx counts a caller who hung up before the answer was there
_log = logging.getLogger(__name__)


class Ranker(Protocol):
    """An exported model (`model.served.ServedRanker`)."""

    @property
    def spec(self) -> TableSpec:
        """What the model was trained on."""
        ...

    def score(self, tables: Sequence[RankingTable]) -> list[np.ndarray]:
        """For each table of one request (C, A) float32 probabilities."""
        ...

    def popular(self, item_ids: Sequence[str]) -> np.ndarray:
        """(C, A) float32 rates of the items, whoever asks."""
        ...


class RankerPredictor(Model):
    """Ranks the candidates of requests.

    Args:
        name: Name of the model in URLs.
        version: Registered version; in each answer and in its header `x-model-version`.
        ranker: The model.
        features: Features of a request as of an instant, within so many seconds (`FeatureSource.read`).
        log: Takes what was served; must not block (`ServingLog.write`).
        metrics: Counts.
    """

    def __init__(
        self,
        name: str,
        version: str,
        ranker: Ranker,
        features: Callable[[RankRequest, datetime, float], Awaitable[Features]],
        log: Callable[[Served], None],
        metrics: Metrics | None = None,
    ) -> None:
        super().__init__(name)
        self.version, self.actions = version, ranker.spec.actions
        self._ranker, self._features, self._log = ranker, features, log
        self._metrics = metrics or Metrics(version)
        self._primary = self.actions.index(ranker.spec.primary_action)
        self._context = frozenset(f.name for f in ranker.spec.features if f.name.startswith(CONTEXT))
        self._admission = Admission()
        self._batcher = Batcher[RankingTable, np.ndarray](
            self._together, lambda table: table.rows, BATCH_ROWS, self._metrics.run
        )

    def load(self) -> bool:
        """Rank for nobody; only then is the model ready: what is loaded on first use is there."""
        asyncio.run(self._warm_up())
        self.ready = True
        return self.ready

    async def _warm_up(self) -> None:
        request = RankRequest("warm-up", "nobody", ("nothing",))
        found = await self._features(request, datetime.now(UTC), WARM_UP_SECONDS)
        if found.table is not None:
            self._ranker.score([found.table])
        self._ranker.popular(request.item_ids)

    def get_input_types(self) -> list[dict]:
        """The inputs, for the protocol's metadata call."""
        names = {"user_id": [1], "item_id": [-1], **{name: [1] for name in sorted(self._context)}}
        text = [{"name": name, "datatype": "BYTES", "shape": shape} for name, shape in names.items()]
        return [*text, {"name": "time", "datatype": "INT64", "shape": [1]}]

    def get_output_types(self) -> list[dict]:
        """The outputs, for the protocol's metadata call."""
        scores = [{"name": action, "datatype": "FP32", "shape": [-1]} for action in self.actions]
        return [{"name": "item_id", "datatype": "BYTES", "shape": [-1]}, *scores]

    async def rank(self, request_id: str, tensors: Sequence[Tensor], headers: Mapping[str, str]) -> Answer:
        """Answer one request, log and count it.

        Args:
            request_id: Comes back in the answer.
            tensors: The inputs.
            headers: HTTP headers or gRPC metadata, names in lower case.

        Raises:
            RefusedError: There is no ranking: the caller's fault (4xx), overload (429), too late (504), or the model
                yields NaN or infinity (500), so that the canary sees it.
        """
        start, ranking = time.perf_counter(), _Ranking()
        try:
            terms = ranking.terms = Terms.of(headers)
            ranking.request = parse(request_id, tensors, self._context)
            with self._admission.let_in(len(ranking.request.item_ids), terms):
                await self._score(ranking, ranking.request, terms.deadline)
            ranking.status = 200
            return ranking.answer(self._primary)
        except RefusedError as error:
            ranking.status = error.status
            if isinstance(error, ShedError):
                self._metrics.shed(error.priority)
            raise
        except asyncio.CancelledError:
            ranking.status = CLIENT_LEFT
            raise
        except Exception:
            _log.exception("a request failed")
            raise RefusedError(500, "internal error; the log of the server says more") from None
        finally:
            self._note(ranking, time.perf_counter() - start)

    @contextmanager
    def counting_refusals(self) -> Iterator[None]:
        """Around what a door does to a request before it calls `rank`."""
        try:
            yield
        except RefusedError as error:
            self._metrics.refused(error.status)
            raise

    def _together(self, tables: list[RankingTable]) -> list[np.ndarray]:
        """The scores of a batch. Where some are no numbers, each request is scored alone: an INT8 model takes the range
        of its activations from the whole run, so that one of them spoils its company."""
        scores = self._ranker.score(tables)
        if len(tables) > 1 and not all(np.isfinite(scores_CA).all() for scores_CA in scores):
            scores = [self._ranker.score([table])[0] for table in tables]
        return scores

    async def _score(self, ranking: "_Ranking", request: RankRequest, deadline: float) -> None:
        start = time.perf_counter()
        try:
            async with asyncio.timeout(deadline):
                found = await self._features(request, ranking.at, FEATURES_SHARE * deadline)
                ranking.features = found
                self._metrics.features(time.perf_counter() - start)
                table = found.table
                scores = self._ranker.popular(request.item_ids) if table is None else await self._batcher(table)
        except TimeoutError:
            raise LateError(deadline) from None
        if not np.isfinite(scores).all():
            raise RefusedError(500, "model yields non-finite scores")
        ranking.scores_CA = scores

    def _note(self, ranking: "_Ranking", seconds: float) -> None:
        """Count a request, and log it unless it was the caller's fault."""
        features, scores = ranking.features, ranking.scores_CA
        self._metrics.answered(ranking.status, features.degraded, seconds)
        if ranking.request is None or 400 <= ranking.status < 500 and ranking.status != TOO_MANY:
            return
        self._log(
            Served(
                request=ranking.request,
                at=ranking.at,
                status=ranking.status,
                latency_ms=seconds * 1000,
                order_C=ranking.order_C,
                scores_CA=scores,
                bucket=ranking.terms.bucket,
                purpose=ranking.terms.purpose,
                degraded=features.degraded,
                features=features.table,
                as_of=features.as_of,
            )
        )


@dataclass
class _Ranking:
    """What is known of a request so far."""

    terms: Terms = field(default_factory=Terms)
    request: RankRequest | None = None
    status: int = 500
    features: Features = field(default_factory=lambda: Features(None))
    scores_CA: np.ndarray | None = None
    order_C: np.ndarray | None = None
    now: datetime = field(default_factory=lambda: datetime.now(UTC))

    @property
    def at(self) -> datetime:
        """As of when the request is ranked."""
        return (self.request.time if self.request else None) or self.now

    def answer(self, primary: int) -> Answer:
        """Best first, by the primary action; equals stay in the order given."""
        request, scores_CA = self.request, self.scores_CA
        assert request is not None and scores_CA is not None
        self.order_C = order_C = np.argsort(-scores_CA[:, primary], kind="stable")
        item_ids = [request.item_ids[i] for i in order_C.tolist()]
        return Answer(request.request_id, item_ids, scores_CA[order_C], self.features.degraded)
