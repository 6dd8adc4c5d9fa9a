"""Streaming ends where the log ends: any split, any order within the lateness, any repetition."""

import numpy as np
import polars as pl
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from feature_repo.features import HISTORY, HISTORY_LENGTH
from feature_repo.history import ActionLog
from feature_repo.stream_merge import ACTIONS, LATENESS_US, merge, rows, too_late, unrolled

T0 = 1_700_000_000_000_000
USERS = ("other", "u", "u1", "u2", "ü")
NAMES = ("save", "click", "hide")
MINUTE = 60_000_000


def frame(actions) -> pl.DataFrame:
    """(user, known, time, item, mask) tuples, instants in microseconds after T0."""
    columns = list(zip(*actions, strict=True)) or [[]] * 5
    found = pl.DataFrame(dict(zip(ACTIONS, columns, strict=True)), ACTIONS | {"user": pl.String})
    numbers = pl.col("user").replace_strict({u: i for i, u in enumerate(USERS)}, return_dtype=pl.UInt32)
    return found.with_columns(numbers, pl.col("known", "time") + T0)


def stored(histories: pl.DataFrame) -> dict:
    """The store: rows by user."""
    table = rows(pl.Series(USERS), histories)
    return {u: table.slice(i, 1) for i, u in enumerate(table.column("user_id").to_pylist())}


def stream(batches) -> dict:
    """What the consumer does, with a dictionary in the store's place."""
    store: dict = {}
    for batch in batches:
        new = frame(batch)
        empty = rows(pl.Series(USERS), frame([])).select([n for n, _ in HISTORY])
        nothing = pa.table({n: pa.nulls(1, empty.schema.field(n).type) for n in empty.column_names})
        held = pa.concat_tables([store[u].select(nothing.column_names) if u in store else nothing for u in USERS])
        old = unrolled(held)
        assert not too_late(old, new).any()
        store |= stored(merge(old, new))
    return store


def offline(actions) -> dict:
    """The same by `ActionLog`, over rows as the log keeps them: each as it was last known."""
    log = frame(actions).group_by("user", "time", "item").agg(pl.col("known").max(), pl.col("actions").bitwise_or())
    users = pl.lit(pl.Series(USERS)).gather("user")
    found = ActionLog.of(log.select(users.alias("user_id"), "known", "time", "actions", item_id="item"))
    last = found.last_within(0, 2**62)
    lists, visible = found.arrays(last), found.known[last] + 1
    users = found.owners(last).to_pylist()
    return {
        u: (int(v), [lists[n][i].as_py() for n, _ in HISTORY])
        for i, (u, v) in enumerate(zip(users, visible, strict=True))
    }


def read(store: dict) -> dict:
    return {
        u: (t.column("event_timestamp").cast(pa.int64())[0].as_py(), [t.column(n)[0].as_py() for n, _ in HISTORY])
        for u, t in store.items()
    }


# Few instants and items, so that ties, repetitions and full histories are common; all within the lateness.
ACTION = st.tuples(
    st.sampled_from(["u1", "u2", "ü"]),
    st.integers(0, 59),  # known, minutes
    st.integers(0, 3),  # shown that much earlier
    st.sampled_from(["i1", "i2", "i3", ""]),
    st.integers(1, 7),
).map(lambda a: (a[0], a[1] * MINUTE, (a[1] - a[2]) * MINUTE, a[3], a[4]))


def cumulative(actions):
    """Later records of one action hold the earlier ones' masks, as the wire format demands."""
    seen, told = {}, []
    for user, known, time, item, mask in sorted(actions, key=lambda a: a[1]):
        seen[user, time, item] = seen.get((user, time, item), 0) | mask
        told.append((user, known, time, item, seen[user, time, item]))
    return told


@settings(max_examples=120, deadline=None)
@given(st.lists(ACTION, min_size=1, max_size=60), st.randoms(use_true_random=False), st.integers(1, 7))
def test_any_split_order_and_repetition_gives_the_history_of_the_log(actions, random, parts):
    told = cumulative(actions)
    sent = told + random.choices(told, k=len(told) // 2)
    random.shuffle(sent)
    cuts = sorted(random.choices(range(len(sent) + 1), k=parts - 1))
    batches = [b for b in (sent[i:j] for i, j in zip([0, *cuts], [*cuts, len(sent)], strict=True)) if b]
    assert read(stream(batches)) == offline(told)


@settings(max_examples=25, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(HISTORY_LENGTH - 3, HISTORY_LENGTH + 30), st.integers(1, 9))
def test_full_histories_keep_the_last_hundred_whatever_comes_first(random, count, parts):
    times = [random.randrange(3_400_000_000) for _ in range(count)]
    told = cumulative([("u", t + random.randrange(3) * MINUTE, t, f"i{t % 7}", 1 + t % 7) for t in times])
    sent = told + random.choices(told, k=40)
    random.shuffle(sent)
    batches = [sent[i::parts] for i in range(parts)]
    assert read(stream(batches)) == offline(told)


def late(old, new) -> list:
    return too_late(frame(old), frame(new)).to_list()


def test_lateness_is_counted_from_the_newest_action_before_and_its_bound_is_in_time():
    newest = ("u", 2 * LATENESS_US, 0, "a", 1)
    at, beyond = ("u", LATENESS_US, 0, "b", 1), ("u", LATENESS_US - 1, 0, "c", 1)
    assert late([newest], [at, beyond]) == [False, True]
    assert late([], [newest, at, beyond]) == [False, False, True]
    assert late([], [beyond, newest]) == [False, False]
    assert late([newest], [("other", 0, 0, "c", 1)]) == [False]


def test_a_batch_that_is_read_again_is_judged_as_it_was_the_first_time():
    first, newer = ("u", 0, 0, "a", 1), ("u", 5 * LATENESS_US, 1, "b", 1)
    after = merge(frame([]), frame([first, newer]))
    assert too_late(after, frame([first, newer])).to_list() == [False, False]
    assert too_late(after, frame([("u", 0, 0, "a", 3)])).to_list() == [True]  # an action more is a change


def test_a_repetition_within_a_batch_is_judged_by_its_first_copy():
    first, newer, behind = ("u", 0, 0, "a", 1), ("u", 5 * LATENESS_US, 1, "b", 1), ("u", 1, 0, "c", 1)
    assert late([], [first, newer, first, behind, behind]) == [False, False, False, True, True]
    assert late([], [newer, first, first]) == [False, True, True]


def test_an_action_that_left_a_full_history_is_not_late_and_stays_away():
    full = [("u", 9 * LATENESS_US + i, i, "a", 1) for i in range(HISTORY_LENGTH)]
    gone = ("u", 0, 0, "old", 1)
    old = merge(frame([]), frame(full))
    assert too_late(old, frame([gone])).to_list() == [False]
    assert merge(old, frame([gone])).equals(old)
    assert too_late(merge(frame([]), frame(full[1:])), frame([gone])).to_list() == [True]


def test_a_row_is_visible_a_microsecond_after_its_newest_action_became_known():
    table = rows(pl.Series(USERS), merge(frame([]), frame([("u", 7, 3, "b", 1), ("u", 5, 4, "a", 2)])))
    assert table.column("event_timestamp").cast(pa.int64()).to_pylist() == [T0 + 8]
    assert table.column("created_timestamp").equals(table.column("event_timestamp"))
    np.testing.assert_array_equal(table.column("time")[0].as_py(), [T0 + 4, T0 + 3])
