"""What a predictor does with one request beside ranking it: whom it logs, what it counts, when it gives up."""

import asyncio
import json

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from serving.degrade import Features
from serving.metrics import Metrics
from serving.predictor import FEATURES_SHARE, RankerPredictor
from serving.protocol import RefusedError, Tensor
from tests.fault.serving_small import MODEL, SmallRanker, scores, table_of


class Lab:
    """A predictor whose log, metrics and features can be looked at."""

    def __init__(self, features=None, ranker=None) -> None:
        self.logged, self.registry, self.within = [], CollectorRegistry(), []
        self._answers = features

        async def read(request, at, within):
            self.within.append(within)
            return await self._answers(request) if self._answers else Features(table_of("u", list(request.item_ids)))

        metrics = Metrics("7", self.registry)
        self.predictor = RankerPredictor(MODEL, "7", ranker or SmallRanker(), read, self.logged.append, metrics)

    def rank(self, *items: str, user: str = "u", **headers: str):
        tensors = [Tensor("user_id", "BYTES", (1,), [user]), Tensor("item_id", "BYTES", (len(items),), list(items))]
        return self.predictor.rank("r1", tensors, {k.replace("_", "-"): v for k, v in headers.items()})

    def count(self, status: int, degraded: str = "no") -> float:
        labels = {"version": "7", "status": str(status), "degraded": degraded}
        return self.registry.get_sample_value("ranker_requests_total", labels) or 0.0


def refused(lab: Lab, *items: str, **headers: str) -> RefusedError:
    with pytest.raises(RefusedError) as caught:
        asyncio.run(lab.rank(*items, **headers))
    return caught.value


def test_answer_is_logged_with_its_ranking_scores_bucket_and_purpose():
    lab = Lab()
    answer = asyncio.run(lab.rank("a", "b", "c", x_bucket="42", x_purpose="replay"))
    (served,) = lab.logged
    assert [served.request.item_ids[i] for i in served.order_C] == list(answer.item_ids)
    np.testing.assert_array_equal(served.scores_CA, np.array([scores(i) for i in "abc"], np.float32))
    assert (served.status, served.bucket, served.purpose, served.degraded) == (200, 42, "replay", "")
    assert served.features.rows == 3 and served.latency_ms > 0 and lab.count(200) == 1


def test_equal_scores_stay_in_the_order_given():
    assert list(asyncio.run(Lab().rank("b", "a", "b")).item_ids).count("b") == 2
    served = Lab()
    asyncio.run(served.rank("x", "x", "x"))
    assert served.logged[0].order_C.tolist() == [0, 1, 2]


def test_what_the_caller_did_wrong_is_counted_and_not_logged():
    lab = Lab()
    assert refused(lab).status == 400
    assert lab.logged == [] and lab.count(400) == 1


@pytest.mark.parametrize(("item", "says"), [("nan", "non-finite"), ("boom", "internal error")])
def test_what_the_model_did_wrong_is_500_counted_and_logged_without_a_ranking(item, says):
    lab = Lab()
    error = refused(lab, "a", item)
    assert error.status == 500 and says in str(error)
    (served,) = lab.logged
    assert (served.status, served.order_C, served.scores_CA) == (500, None, None) and lab.count(500) == 1


def test_features_may_take_their_share_of_the_deadline_and_no_more_than_all_of_it():
    async def never(request):
        await asyncio.sleep(60)

    lab = Lab(never)
    error = refused(lab, "a", x_deadline_ms="50")
    assert error.status == 504 and lab.within == [pytest.approx(FEATURES_SHARE * 0.05)]
    assert lab.logged[0].status == 504 and lab.count(504) == 1


def test_without_features_popularity_answers_and_is_marked_everywhere():
    async def nothing(request):
        return Features(None, "popularity")

    lab = Lab(nothing)
    answer = asyncio.run(lab.rank("a", "b"))
    assert answer.degraded == lab.logged[0].degraded == "popularity" and lab.logged[0].features is None
    assert lab.count(200, "popularity") == 1


def test_caller_who_hangs_up_is_counted_and_its_work_leaves_the_queue():
    async def hang_up(lab):
        task = asyncio.create_task(lab.rank("a"))
        await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    async def never(request):
        await asyncio.sleep(60)

    lab = Lab(never)
    asyncio.run(hang_up(lab))
    assert lab.count(499) == 1 and lab.logged == [] and lab.predictor._admission.queued == 0


class SpoiltTogether(SmallRanker):
    """Like an INT8 graph: one request that is not a number makes the whole run so."""

    def score(self, tables):
        found = super().score(tables)
        return found if all(np.isfinite(s).all() for s in found) else [s * np.nan for s in found]


def test_request_that_is_no_number_spoils_no_other_of_its_batch():
    async def together(lab):
        return await asyncio.gather(lab.rank("a"), lab.rank("nan"), lab.rank("c"), return_exceptions=True)

    first, bad, last = asyncio.run(together(Lab(ranker=SpoiltTogether())))
    assert (list(first.item_ids), list(last.item_ids)) == (["a"], ["c"]) and bad.status == 500


def test_bad_request_of_a_batch_fails_alone():
    async def together(lab):
        return await asyncio.gather(lab.rank("a"), lab.rank("boom"), lab.rank("c"), return_exceptions=True)

    first, bad, last = asyncio.run(together(Lab()))
    assert (list(first.item_ids), list(last.item_ids)) == (["a"], ["c"]) and bad.status == 500


def test_output_that_does_not_exist_is_refused_over_rest_before_anything_is_ranked():
    from serving.rest_door import RestDoor

    lab, sent = Lab(), []
    inputs = [
        {"name": "user_id", "datatype": "BYTES", "shape": [1], "data": ["u"]},
        {"name": "item_id", "datatype": "BYTES", "shape": [1], "data": ["a"]},
    ]
    body = json.dumps({"inputs": inputs, "outputs": [{"name": "nope"}]}).encode()

    async def receive():
        return {"type": "http.request", "body": body}

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": f"/v2/models/{MODEL}/infer", "headers": []}
    asyncio.run(RestDoor(lab.predictor, None)(scope, receive, send))
    assert sent[0]["status"] == 400 and b"there is no output 'nope'; there are item_id" in sent[1]["body"]
    assert (lab.logged, lab.within, lab.count(400), lab.count(200)) == ([], [], 1, 0)
