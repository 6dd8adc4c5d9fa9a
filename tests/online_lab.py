"""Homes to publish from, on SQLite and on Redis; their views are built once a process."""

import functools
import shutil
from contextlib import contextmanager
from datetime import timedelta

import numpy as np

from feature_repo.generations import Generation, served
from feature_repo.repo import FeatureRepo
from tests.features_world import DAY, START, import_synth, scratch
from tests.redis_lab import redis_server

HOUR = timedelta(hours=1)
ITEMS = [f"i{i}" for i in range(60)]
COLUMNS = ("request_cat", "request_num", "item_cat", "item_num", "history_time", "history_item", "history_actions")


@functools.cache
def built():
    """Nine busy days, and a repository with their views that was never materialised."""
    store = import_synth(scratch(), users=30, items=60, days=9, late_share=0.1)
    template = FeatureRepo(scratch() / "features")
    template.build(store.snapshot(START + 8 * DAY))
    return store, template.root


def fresh(url=""):
    root = scratch() / "features"
    shutil.copytree(built()[1], root)
    return FeatureRepo(root, url)


@contextmanager
def online(kind):
    """A fresh home that publishes to `sqlite` or to a `redis` of its own."""
    if kind == "sqlite":
        yield fresh()
    else:
        with redis_server() as url:
            yield fresh(url)


def at(store, days, hours=1):
    return store.snapshot(START + days * DAY + hours * HOUR)


def assert_same(one, two):
    for name in COLUMNS:
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name), err_msg=name)


def everyone(repo, when):
    return [repo.online().read(f"u{u}", ITEMS, {"surface": "home"}, when) for u in range(30)]


def rewrite_past(repo):
    """As if the served generation had been made of a file that the log no longer has."""
    before = Generation.load(served(repo.root))
    before.files["engagements/gone.parquet"] = "0" * 64
    before.save()
