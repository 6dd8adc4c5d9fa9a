"""The reservoir and the exam: what is kept is a bounded function of everything seen, as it was when it was new."""

import dataclasses

import numpy as np
import pytest
import torch

from model.continual import Step, Window, rehearsal
from model.exam import exam_of, held_out
from model.loader import requests_per_batch
from model.reservoir import RESERVOIR, Reservoir, choose
from model.train import train
from tests.unit.model_synth import SPEC, make, recipe

CPU = torch.device("cpu")


def ids(table):
    return set(table.request_id.tolist())


def of(bundle):
    return Reservoir.from_tensors(bundle.memory, RESERVOIR, SPEC)


@pytest.fixture(scope="module")
def champion(tmp_path_factory):
    return train(make(200), recipe(), "scratch", None, 0, tmp_path_factory.mktemp("c"))


def test_kept_requests_do_not_depend_on_the_slots_they_came_in():
    table = make(600)
    at_once = ids(table.select(choose(table.request_id, table.user_id, 100, 0)))
    parts = [np.arange(600)[i::7] for i in (3, 0, 6, 2, 5, 1, 4)]
    kept = None
    for part in parts:
        kept = Reservoir(table.select(part)).joined(kept, 100, 0, history=8)
    assert ids(kept.table) == at_once and len(at_once) == 100


def test_every_user_keeps_as_many_requests_as_the_others_where_there_are_so_many():
    user_id = np.array([b"heavy"] * 900 + [b"light"] * 3 + [b"some"] * 60)
    kept = user_id[choose(np.array([b"r%d" % i for i in range(963)]), user_id, 43, 0)]
    assert {u: int((kept == u).sum()) for u in np.unique(user_id)} == {b"heavy": 20, b"light": 3, b"some": 20}


def test_other_seed_keeps_other_requests_and_a_request_offered_twice_counts_once():
    table = make(200)
    one, other = (choose(table.request_id, table.user_id, 50, seed) for seed in (0, 1))
    assert set(one) != set(other)
    twice = np.tile(table.request_id, 2), np.tile(table.user_id, 2)
    assert {twice[0][i] for i in choose(*twice, 50, 0)} == {table.request_id[i] for i in one}


def test_kept_requests_hold_the_rows_and_the_newest_actions_that_they_had():
    early, late = make(150), make(80, seed=5, start_hour=500)
    kept = Reservoir(late).joined(Reservoir(early), 60, 0, history=3).table
    assert (np.diff(kept.time) >= 0).all() and len(kept.history_time) < len(early.history_time) / 2
    for r in range(kept.requests):
        table = early if kept.request_id[r] in ids(early) else late
        source = int(np.flatnonzero(table.request_id == kept.request_id[r])[0])
        mine, its = (slice(*t.offsets[[i, i + 1]]) for t, i in ((kept, r), (table, source)))
        for name in ("item_id", "item_cat", "labels"):
            assert (getattr(kept, name)[mine] == getattr(table, name)[its]).all()
        np.testing.assert_array_equal(kept.item_num[mine], table.item_num[its])
        first, last = table.history_start[source], table.history_end[source]
        newest = table.history_time[max(first, last - 3) : last]
        assert kept.history_time[kept.history_start[r] : kept.history_end[r]].tolist() == newest.tolist()


def test_reservoir_survives_the_way_through_a_file(champion):
    kept = of(champion)
    back = Reservoir.from_tensors({k: v.clone() for k, v in kept.to_tensors("x").items()}, "x", SPEC)
    for f in dataclasses.fields(kept.table):
        assert np.array_equal(
            getattr(kept.table, f.name), getattr(back.table, f.name), equal_nan=f.name.endswith("num")
        )
    assert np.array_equal(kept.seen.signals_NS, back.seen.signals_NS)
    assert Reservoir.from_tensors({}, "x", SPEC) is None


def test_users_can_be_taken_out(champion):
    kept = of(champion)
    user = kept.table.user_id[0]
    less = kept.without(np.array([user]))
    assert user not in less.table.user_id and 0 < less.table.requests < kept.table.requests
    assert len(less.seen.item_NC) == less.table.rows


def test_held_out_requests_are_a_tenth_and_travel_as_the_exam(champion):
    table = make(200)
    held = ids(table.select(np.flatnonzero(held_out(table))))
    assert 8 <= len(held) <= 35 and ids(exam_of(champion)) == held
    assert ids(of(champion).table) == ids(table) - held


def test_labels_of_held_out_requests_never_reach_a_model(tmp_path, champion):
    table = make(200)
    rows = table.rows_of(np.flatnonzero(held_out(table)))
    labels = table.labels.copy()
    labels[rows] = 1 - labels[rows]
    other = train(dataclasses.replace(table, labels=labels), recipe(), "scratch", None, 0, tmp_path)
    assert all(torch.equal(other.weights[k], champion.weights[k]) for k in champion.weights)


def test_memory_stays_bounded_over_updates_and_remembers_every_slot(tmp_path, champion):
    small, bundle = recipe(reservoir_requests=40, exam_requests=8), champion
    for slot in range(3):
        window = make(120, seed=20 + slot, start_hour=500 * (slot + 1))
        bundle = train(window, small, "ewc+distill+replay", bundle, 0, tmp_path)
    kept = of(bundle).table
    assert kept.requests == 40 and exam_of(bundle).requests == 8 and bundle.updates == 3
    assert len({i.split(b"-")[0] for i in kept.request_id.tolist()}) == 4  # of the first window and of each update


def test_what_was_seen_of_a_request_stays_what_it_was_when_it_was_new(tmp_path, champion):
    before, update = of(champion), train(make(60, seed=6, start_hour=500), recipe(), "replay", champion, 0, tmp_path)
    after = of(update)
    same = np.flatnonzero(np.isin(after.table.request_id, before.table.request_id))
    assert len(same) == before.table.requests
    assert np.array_equal(after.seen.signals_NS[after.table.rows_of(same)], before.seen.signals_NS)
    # The vectors of now, learned from those very labels, say something else.
    now = type(before.seen).by(update.ranker(), before.table)
    assert np.abs(now.signals_NS - before.seen.signals_NS).max() > 0.01


def test_every_request_of_the_reservoir_comes_once_before_any_comes_again(champion):
    window = make(60, seed=6, start_hour=500)
    loss = rehearsal(Window(champion, window, recipe().train, CPU, 0))
    drawn = np.concatenate([loss.requests(n) for n in range(len(loss.order) // loss.size)])
    assert len(set(drawn.tolist())) == len(drawn) and (loss.requests(3) == loss.requests(3)).all()
    other = rehearsal(Window(champion, window, recipe().train, CPU, 1))
    assert (other.requests(0) != loss.requests(0)).any()


def test_large_window_replays_each_request_of_a_small_reservoir_once_a_pass(champion):
    window = make(2000, seed=6, start_hour=500)
    loss = rehearsal(Window(champion, window, recipe(rows_per_batch=72).train, CPU, 0))
    steps = -(-window.requests // requests_per_batch(window, recipe().train))
    drawn = np.concatenate([loss.requests(n) for n in range(steps)])
    assert len(drawn) == len(set(drawn.tolist())) <= len(loss.order) < window.requests
    assert loss.weight == pytest.approx(loss.size / requests_per_batch(window, recipe().train))


def test_replayed_loss_reads_what_was_seen_and_is_a_function_of_the_step(champion):
    window = Window(champion, make(60, seed=6, start_hour=500), recipe().train, CPU, 0)
    loss, ranker = rehearsal(window), dataclasses.replace(champion).ranker()
    steps = [Step(n, ranker, None, torch.zeros(1, 3), 1.0) for n in (0, 0, 1)]
    first, again, other = (float(loss(s)) for s in steps)
    assert first == again != other
    loss.seen = dataclasses.replace(loss.seen, signals_NS=loss.seen.signals_NS + 1)
    assert float(loss(steps[0])) != first


def test_share_of_replayed_requests_is_that_of_the_recipe(champion):
    window = make(60, seed=6, start_hour=500)
    made = [rehearsal(Window(champion, window, recipe(replay_share=s).train, CPU, 0)) for s in (0.5, 1.0, 2.0)]
    assert made[1].size == pytest.approx(2 * made[0].size, abs=1) and made[2].size == 2 * made[1].size
    assert made[1].weight == 1.0 and made[2].weight == 2.0


def test_forgotten_user_is_not_replayed_any_more_and_the_champion_stays_the_parent(tmp_path, champion):
    user = of(champion).table.user_id[0]
    window = make(60, users=3, seed=6, start_hour=500)
    update = train(
        window, recipe(), "replay", champion, 0, tmp_path, forgotten=lambda users: np.isin(users, [user, b"u1"])
    )
    left = of(update).table
    assert user not in left.user_id[left.time < window.time[0]] and update.parent == champion.digest
