"""Features that were logged while hundreds of requests were served, held against the offline store's."""

import asyncio
from dataclasses import replace
from datetime import timedelta

import numpy as np
import pytest

from engagement.served import ServedFeatures, files, read_features, save_features
from evergreen.settings import Settings
from feature_repo.parity import DIFFERENT, STALE
from serving.degrade import FeatureSource
from serving.protocol import RankRequest
from serving.served_log import parity
from serving.serving_log import Served, ServingLog, keeps_features
from tests.features_world import START
from tests.online_lab import ITEMS, at, built, fresh

DAYS, CANDIDATES, HOUR = (6, 7), 12, timedelta(hours=1)
WINDOW = (START, START + timedelta(days=30))


@pytest.fixture(scope="module")
def home():
    """A home that was materialised twice, and served a hundred and twenty sampled requests each time."""
    repo, store = fresh(), built()[0]
    settings, rng, number = Settings(home=repo.root.parent), np.random.default_rng(0), iter(range(10**9))
    log = None
    for day in DAYS:
        repo.materialize(at(store, day))
        source = FeatureSource(settings)
        log = log or ServingLog(settings.serving / "log", "1", repo.online().spec)
        for _ in range(120):
            name = next(f"r{n}" for n in number if keeps_features(f"r{n}"))
            items = tuple(rng.choice([*ITEMS, "never-seen"], CANDIDATES, replace=False).tolist())
            context = {"surface": str(rng.choice(["home", "search"]))} if rng.random() < 0.8 else {}
            user = f"u{rng.integers(32)}"  # two of whom nothing is known
            _serve(source, log, RankRequest(name, user, items, context), START + timedelta(days=day) + HOUR)
        source.close()
    log.close()
    return settings, repo, store


def _serve(source, log, request, when):
    found = asyncio.run(source.read(request, when, 10.0))
    assert found.degraded == ""
    scores_CA = np.random.default_rng(1).random((len(request.item_ids), 3)).astype(np.float32)
    order_C = np.argsort(-scores_CA[:, 0])
    log.write(Served(request, when, 200, 5.0, order_C, scores_CA, 1, "live", "", found.table, found.as_of))


def check(home):
    settings, repo, store = home
    return parity(repo, at(store, DAYS[-1]), settings.serving / "log", *WINDOW)


def test_logged_features_of_hundreds_of_requests_are_those_of_the_offline_store(home):
    found = check(home)
    assert (found.requests, found.candidates) == (240, 240 * CANDIDATES)
    assert found.values > 240 * CANDIDATES * 10
    assert found.skews == (), [f"{s.feature}: {s}" for s in found.skews]


def test_one_changed_number_id_or_action_among_them_all_is_found(home):
    settings, repo, store = home
    path = files(settings.serving / "log", suffix=".npz")[0]
    whole = path.read_bytes()
    features = next(read_features(settings.serving / "log", *WINDOW))
    table = features.table
    other = table.item_num.copy()
    row, column = np.argwhere(np.isfinite(other))[1000]
    other[row, column] += 1.0
    cat = table.item_cat.copy()
    cat[3, 0] += 1
    end = table.history_end.copy()
    longest = int(np.argmax(end - table.history_start))
    end[longest] -= 1
    try:
        for changed, causes in (
            ({"item_num": other}, {DIFFERENT: 1}),
            ({"item_cat": cat}, {DIFFERENT: 1}),
            ({"history_end": end}, {DIFFERENT: 1}),
        ):
            save_features(path, ServedFeatures(replace(table, **changed), features.as_of))
            found = check(home)
            assert [s.causes for s in found.skews] == [causes], changed.keys()
            assert found.unexplained == found.skews
    finally:
        path.write_bytes(whole)


def test_a_request_long_after_the_last_materialisation_is_told_as_stale(home, tmp_path):
    settings, repo, store = home
    source, log = FeatureSource(settings), ServingLog(tmp_path, "1", repo.online().spec)
    name = next(f"late{n}" for n in range(10**9) if keeps_features(f"late{n}"))
    _serve(source, log, RankRequest(name, "u1", tuple(ITEMS[:30]), {}), START + timedelta(days=8))
    source.close()
    log.close()
    found = parity(repo, at(store, 8), tmp_path, *WINDOW)
    assert found.skews and {cause for s in found.skews for cause in s.causes} == {STALE}
    assert parity(repo, at(store, 8), tmp_path / "nothing", *WINDOW) is None
