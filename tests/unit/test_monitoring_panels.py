"""The dashboard: its panels ask for numbers that runs have, follow the worst features, and leave a person's alone."""

import json
import uuid
from dataclasses import replace

import pytest

from monitoring import panels
from tests.drift_lab import column, pairs, verdict

PROJECT = uuid.UUID("6f0e3c52-8a3d-5b0e-9d55-0e2f6c1b7a11")


def asked(text):
    """The names that each panel asks for."""
    return {
        p["title"]: [v["metric_labels"]["column"] for v in p["values"]]
        for p in json.loads(text)["panels"]
        if p["values"]
    }


def test_every_panel_asks_for_numbers_that_a_full_check_has():
    found = verdict(pairs(0.8))
    known = panels.numbers(found)
    for title, names in asked(panels.dashboard(PROJECT, [found])).items():
        assert names, title
        assert set(names) <= set(known), title


def test_single_features_are_the_worst_of_all_given_checks_and_at_most_so_many():
    wide = replace(verdict(), columns=tuple(column(f"feature_{i}", i / 100) for i in range(30)))
    spike = replace(verdict(), columns=(column("feature_3", 9.0),))
    names = next(v for t, v in asked(panels.dashboard(PROJECT, [spike, wide])).items() if t.startswith("Single"))
    assert names[0] == "feature_3 (drift / threshold)"
    assert len(names[:-1]) == panels.SHOWN == len(set(names[:-1])) and names[-1] == "threshold"


def test_checks_that_know_nothing_give_a_dashboard_all_the_same():
    bare = replace(verdict(), columns=(), outcome=None, serving=None, skew_share=None)
    for verdicts in ([], [bare]):
        assert len(asked(panels.dashboard(PROJECT, verdicts))) >= 10
    assert panels.is_ours(PROJECT, panels.dashboard(PROJECT, []))


@pytest.mark.parametrize("change", ["title", "order", "removed", "added", "tab"])
def test_a_dashboard_that_a_person_changed_is_theirs(change):
    text = panels.dashboard(PROJECT, [verdict(pairs())])
    assert panels.is_ours(PROJECT, text)
    held = json.loads(text)
    if change == "title":
        held["panels"][1]["title"] = "mine"
    elif change == "order":
        held["tabs"][0]["panels"].reverse()
    elif change == "removed":
        held["panels"].pop()
    elif change == "added":
        held["panels"].append({**held["panels"][1], "id": str(uuid.uuid4())})
    else:
        held["tabs"].append({**held["tabs"][0], "id": str(uuid.uuid4())})
    assert not panels.is_ours(PROJECT, json.dumps(held))


def test_ids_are_unique_and_the_same_each_time():
    texts = [panels.dashboard(PROJECT, [verdict(pairs())]) for _ in range(2)]
    assert texts[0] == texts[1]
    ids = [p["id"] for p in json.loads(texts[0])["panels"]]
    assert len(set(ids)) == len(ids)
    assert ids == json.loads(texts[0])["tabs"][0]["panels"]


def test_kind_is_told_by_exactly_one_number():
    for kind in panels.KINDS:
        known = panels.numbers(replace(verdict(), kind=kind))
        assert {k: known[k] for k in panels.KINDS} == {k: float(k == kind) for k in panels.KINDS}
    assert sum(panels.numbers(verdict())[k] for k in panels.KINDS) == 0
