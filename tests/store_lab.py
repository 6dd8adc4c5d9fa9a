"""What the tests of the store's safety share: its bytes, small deliveries, and a process that dies at its n-th step."""

import hashlib
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

from engagement.importers import contract_dir
from engagement.index import load_index
from engagement.store import EngagementStore
from tests.synth import START, dataset, write_contract_dir

LATER = datetime(2030, 1, 1, tzinfo=UTC)


class Died(BaseException):
    """Stands for kill -9 at a step; no handler of the store catches it."""


@contextmanager
def dying_at(monkeypatch, step):
    """Die before the `step`-th change that is made to a directory (rename or removal), counted from 1."""
    count = 0

    def counted(real):
        def change(*args, **kwargs):
            nonlocal count
            count += 1
            if count == step:
                raise Died
            return real(*args, **kwargs)

        return change

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", counted(Path.replace))
        patch.setattr(Path, "unlink", counted(Path.unlink))
        yield


def content(root):
    """Bytes of everything that makes up a store, by path."""
    return {
        p.relative_to(root).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(root.rglob("*"))
        if p.is_file() and p.name != ".lock"
    }


def hours(n):
    """An instant of the synthetic world."""
    return START + timedelta(hours=n)


def in_small_appends(root, deliveries):
    """A store filled by one append after another."""
    store = EngagementStore(root)
    for rows in deliveries:
        store.append(dataset(rows))
    return store


def synth_store(tmp_path, name="store", **world):
    """A store that holds one generated delivery, and that delivery's directory."""
    made = write_contract_dir(tmp_path / f"{name}-delivery", **({"users": 10, "items": 60, "days": 4} | world))
    store = EngagementStore(tmp_path / name)
    store.append(contract_dir.read(made))
    return store, made


def parts_of_log(store):
    """The store's engagement parts, in path order."""
    return [p for p in load_index(store.root) if p.room == "engagements"]
