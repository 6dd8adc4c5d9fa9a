"""The promoter's rules over every state that there can be, and what counts as evidence."""

from itertools import product

import pytest

from serving.agreement import Agreed
from serving.plane import Serving
from serving.promoter_rules import (
    Conclude,
    Conform,
    Drop,
    GoBack,
    Observed,
    PutBack,
    Refuse,
    Rest,
    RollOut,
    Settle,
    TakeUp,
    Wish,
    decide,
    obstacle,
)

AGREED = Agreed("1", "7", "promoted", "7", "digest")
WISH = Wish("w", "2", "Ann", "")


def states():
    """Every combination of what can be seen: versions 1 (champion), 7 (previous), 2 and 3."""
    servings = (None, Serving("1"), Serving("1", "2", 10), Serving("7"), Serving())
    for champion, previous, candidate in product(("", "1", "7", "2", "3"), ("", "7", "3"), ("", "1", "2", "3")):
        aliases = {"champion": champion, "previous": previous, "candidate": candidate}
        for rest in product((True, False), servings, ("", "2", "3"), (None, WISH), (True, False), ("", "no")):
            shown, serving, unfinished, wish, answered, obstacle = rest
            if (wish is None and (answered or obstacle)) or (answered and obstacle):
                continue
            yield Observed(
                {k: v for k, v in aliases.items() if v}, AGREED, shown, serving, unfinished, wish, answered, obstacle
            )


def test_every_state_has_an_action_that_its_rules_allow():
    seen = set()
    for o in states():
        action = decide(o)
        seen.add(type(action))
        champion, candidate = o.aliases.get("champion", ""), o.aliases.get("candidate", "")
        calm = o.shown and champion == "1"  # nothing that a person did is read before
        if isinstance(action, RollOut):
            ours = o.wish is not None and o.wish.version == o.unfinished
            back = o.shown and champion == "7" and o.unfinished == action.version  # comes back before the champion goes
            assert (calm and (ours or not o.obstacle) and not o.answered) or back
            assert action.version in (o.unfinished, o.wish.version if o.wish else "")
            assert back or o.serving is None or o.serving.champion == "1"
            assert back or (action.wish is None) == (o.wish is None)
        elif isinstance(action, GoBack):
            assert o.shown and champion == "7" == action.version and not o.unfinished
        elif isinstance(action, PutBack):
            assert o.shown and champion in ("", "2", "3") and action.wished == champion
        elif isinstance(action, TakeUp):
            assert calm and o.wish is None and action.version == candidate != ""
        elif isinstance(action, Drop):
            assert calm and not o.answered and candidate != "2" and o.unfinished != "2"
        elif isinstance(action, Refuse):
            assert calm and action.why == o.obstacle != "" and candidate == "2"
        elif isinstance(action, Conclude):
            assert calm and o.answered
        elif isinstance(action, Settle):
            assert calm and o.serving is not None and o.serving != Serving("1")
        elif isinstance(action, Conform):
            assert not o.shown or o.aliases.get("previous", "") != "7"
        else:
            assert calm and not candidate and o.wish is None and not o.unfinished
            assert o.aliases["previous"] == "7" and o.serving in (None, Serving("1"))
    assert seen == {Rest, Conform, GoBack, PutBack, TakeUp, Drop, Refuse, RollOut, Conclude, Settle}


def test_unfinished_rollout_keeps_its_split_until_it_is_resumed():
    o = Observed({"champion": "1", "previous": "7"}, AGREED, serving=Serving("1", "2", 10), unfinished="2")
    assert decide(o) == RollOut("2", None)


def test_first_model_is_wished_for_and_rolled_out():
    o = Observed({"candidate": "2"}, Agreed(), serving=Serving(), wish=WISH)
    assert decide(o) == RollOut("2", WISH)


SIGNED = {"gate": "promote", "gate.a": "pass: 1", "gate.b": "pass: 2", "run_key": "k", "bundle_digest": "d"}


@pytest.mark.parametrize(
    ("signed", "tags", "says"),
    [
        ({}, {}, ""),
        ({"gate": "hold", "gate_reason": "worse"}, {"gate": "hold"}, "the gate said hold (worse)"),
        ({"gate": "hold", "gate.b": "fail: -3 %"}, {}, "the gate said hold (b: fail: -3 %)"),
        ({"gate": None}, {}, "the gate said nothing"),
        ({"gate.a": None, "gate.b": None}, {}, "none of the gate's rules is on record"),
        ({"gate.b": "fail: -3 %"}, {}, "the gate's rule b: fail: -3 %"),
        ({"gate.b": "passed, nearly"}, {}, "the gate's rule b: passed, nearly"),
        ({}, {"gate": "hold"}, "tag gate was changed after the gate"),
        ({}, {"gate.b": "pass: 3"}, "tag gate.b was changed after the gate"),
        ({}, {"gate.b": None}, "tag gate.b was changed after the gate"),
        ({}, {"bundle_digest": "other"}, "tag bundle_digest was changed after the gate"),
        ({}, {"run_key": "other"}, "tag run_key was changed after the gate"),
        ({}, {"gate_reason": "I like it", "note": "any"}, ""),
    ],
)
def test_evidence_is_what_was_signed(signed, tags, says):
    def but(changes):
        return {k: v for k, v in (SIGNED | changes).items() if v is not None}

    was = but(signed)
    now = {k: v for k, v in (was | tags).items() if v is not None}
    assert obstacle(now, was) == says
