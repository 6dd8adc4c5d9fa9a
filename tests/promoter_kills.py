"""Kills of the promoter, all of them, and a registry that is away.

All state is on disk, so a copy of the disk is what a killed process leaves. `every_end` goes through all copies: from
the one before each effect a new promoter goes on and, where asked, from those before each of *its* effects another one,
until no disk appears that was not there before. What holds at each end then holds however often promoters are killed.
"""

import gc
import json
import os
import re
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.promoter_lab import LEDGER, Disk, Home, Person


@contextmanager
def quick_registry(home: Home) -> Iterator[None]:
    """Nothing waits for the disk (a killed process loses nothing that the kernel has), and MLflow is asked once for
    each content of its tables: every write is real, and so is the first read of what it made.
    """
    import mlflow

    told = sqlite3.connect(home.database, isolation_level=None, check_same_thread=False)
    reads = ("get_registered_model", "get_model_version", "search_model_versions", "get_experiment_by_name")
    real = {name: getattr(mlflow.MlflowClient, name) for name in reads}
    answers: dict[Any, Any] = {}
    fsync = os.fsync

    def remembered(name):
        def ask(client, *args):
            key = (name, args, *(tuple(told.execute(question)) for question in SAID[:2]))
            if key not in answers:
                answers[key] = real[name](client, *args)
            return answers[key]

        return ask

    os.fsync = lambda handle: None
    gc.freeze()  # a million objects of imported packages are not looked through again and again
    for name in reads:
        setattr(mlflow.MlflowClient, name, remembered(name))
    try:
        yield
    finally:
        os.fsync = fsync
        gc.unfreeze()
        for name, function in real.items():
            setattr(mlflow.MlflowClient, name, function)
        told.close()


@contextmanager
def before_each_effect(call: Callable[[str], None]) -> Iterator[None]:
    """Call something before everything that leaves a trace: files, ledger, and commits of MLflow's database."""
    from sqlalchemy import event
    from sqlalchemy.engine import Engine

    from serving.ledger import Ledger

    traces = [(Ledger, "_write"), (Path, "replace"), (Path, "unlink")]
    real = {(owner, name): getattr(owner, name) for owner, name in traces}

    def watched(owner, name):
        def effect(*args, **kwargs):
            passing = owner is Path and ("models" in args[0].parts or (name == "unlink" and args[0].name[0] == "."))
            if not passing:
                call(f"{owner.__name__}.{name} {args[0].name.split('.')[1] if owner is Path else ''}")
            return real[owner, name](*args, **kwargs)

        return effect

    def wrote(connection, cursor, statement, *_):
        if not statement.startswith(("SELECT", "PRAGMA")):
            connection.info["wrote"] = statement

    def commit(connection):
        statement = connection.info.pop("wrote", "")
        if statement:
            call(" ".join(statement.split()[:3]))

    event.listen(Engine, "before_cursor_execute", wrote)
    event.listen(Engine, "commit", commit)
    try:
        for owner, name in traces:
            setattr(owner, name, watched(owner, name))
        yield
    finally:
        event.remove(Engine, "before_cursor_execute", wrote)
        event.remove(Engine, "commit", commit)
        for (owner, name), function in real.items():
            setattr(owner, name, function)


def crashes(home: Home, work: Callable[[], Any], person: Person | None = None) -> list[Disk]:
    """Do some work once, and return what `kill -9` before each of its effects would leave behind."""
    found: list[Disk] = []
    with before_each_effect(lambda name: found.append(home.disk(frozenset(person.met if person else ()), name))):
        work()
    return found


def every_end(
    home: Home, person: Person, ended: Callable[[Disk], None], often: bool = True, work: Callable[[], Any] | None = None
) -> tuple[int, int]:
    """Let promoters act, killed before any effect, until every disk that a kill can leave was gone on from.

    Args:
        home: As it is when the first promoter comes.
        person: What somebody does in mid-canary.
        ended: Called after a promoter came to its end undisturbed, with the disk that it found.
        often: Whether those who come later are killed too, any number of times; else only the first is.
        work: What is done first, where it is not a promoter's.

    Returns:
        Disks that a kill left, and kills.
    """
    known: set[str] = set()
    todo, kills = [home.disk(before="the beginning")], 0
    while todo:
        found = todo.pop()
        home.go_to(found)
        person.met = set(found.met)
        act = home.promoter(person).reconcile if kills or work is None else work
        if often or not kills:
            left = crashes(home, act, person)
        else:
            left = []
            act()
        if work and not kills:
            home.promoter(person).reconcile()
        ended(found)
        kills += len(left)
        for disk in left:
            standing = _standing(disk)
            if standing not in known:
                known.add(standing)
                todo.append(disk)
    return len(known), kills


SAID = (
    "SELECT alias, version FROM registered_model_aliases ORDER BY alias",
    "SELECT version, key, value FROM model_version_tags ORDER BY version, key",
    "SELECT value, status FROM runs JOIN tags USING (run_uuid) WHERE key = 'ledger_entry' ORDER BY start_time",
)


def _standing(disk: Disk) -> str:
    """What a disk says, without what no promoter reads or only compares: times, process and random ids, how often a
    rollout was taken up, and the ledger's transitions.
    """
    told: list[Any] = [sorted(disk.met)]
    for name, content in sorted(disk.files.items()):
        lines = [json.loads(line) for line in content.splitlines()] if name == LEDGER else [json.loads(content)]
        unread = {"at", "pid", "before"} if name == LEDGER else {"fence", "pid"}
        kept = [line for line in lines if line.get("kind") != "transition"]
        told.append([name, [{k: v for k, v in line.items() if k not in unread} for line in kept]])
    with sqlite3.connect(":memory:") as database:
        database.deserialize(disk.database)
        told += [database.execute(question).fetchall() for question in SAID]
    ids: dict[str, str] = {}
    return re.sub(
        r"\b(?:[0-9a-f]{12}|[0-9a-f]{64})\b", lambda m: ids.setdefault(m[0], f"#{len(ids)}"), json.dumps(told)
    )


@contextmanager
def mlflow_away(fails: Callable[[int], bool], answer_lost: bool = False) -> Iterator[list[str]]:
    """Fail calls of MLflow as a server that is away makes them fail; yields the names of all calls so far.

    Args:
        fails: Whether the n-th call does, from 0.
        answer_lost: The call is carried out all the same.
    """
    import mlflow
    from mlflow.exceptions import MlflowException

    names = ("get_registered_model", "get_model_version", "search_model_versions", "get_experiment_by_name")
    names += ("set_registered_model_alias", "delete_registered_model_alias", "set_model_version_tag")
    names += ("search_runs", "create_run", "log_dict", "set_terminated")
    real, calls = {name: getattr(mlflow.MlflowClient, name) for name in names}, []

    def failing(name):
        def call(*args, **options):
            calls.append(name)
            away = fails(len(calls) - 1)
            if answer_lost or not away:
                answer = real[name](*args, **options)
            if away:
                raise MlflowException(f"API request to http://127.0.0.1:5000/{name} failed with exception (refused)")
            return answer

        return call

    try:
        for name in names:
            setattr(mlflow.MlflowClient, name, failing(name))
        yield calls
    finally:
        for name, function in real.items():
            setattr(mlflow.MlflowClient, name, function)
