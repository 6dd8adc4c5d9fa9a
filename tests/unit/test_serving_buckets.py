"""Sticky users: the bucket is fixed, shares are met, and nobody leaves the canary as it widens."""

import pytest

from serving.buckets import BUCKETS, bucket, choose_salt, in_canary, threshold

USERS = [f"user-{i}" for i in range(20_000)]


def test_bucket_of_a_user_is_pinned_for_ever():
    # Analyses of old logs compute it again: a change of these numbers breaks them.
    assert (bucket("u1", "3-0"), bucket("u2", "3-0"), bucket("", "")) == (3098, 1655, 1883)


def test_share_of_users_is_that_of_the_step():
    for percent in (1, 10, 50):
        share = sum(in_canary(u, "a", percent) for u in USERS) / len(USERS)
        assert abs(share - percent / 100) < 0.01
    assert not any(in_canary(u, "a", 0) for u in USERS)
    assert all(in_canary(u, "a", 100) for u in USERS)


def test_user_who_is_in_stays_in_as_the_canary_widens():
    for narrow, wide in ((1, 10), (10, 50), (50, 100)):
        assert all(in_canary(u, "a", wide) for u in USERS if in_canary(u, "a", narrow))


def test_another_salt_gives_other_users_the_first_turn():
    one, other = ({u for u in USERS if in_canary(u, salt, 10)} for salt in ("v2", "v3"))
    assert len(one & other) / len(one) < 0.2  # 0.1 by chance


def test_buckets_and_threshold_share_one_scale():
    assert threshold(100) == BUCKETS and threshold(1) == BUCKETS // 100
    assert all(0 <= bucket(u, "x") < BUCKETS for u in USERS[:1000])


def hits(users, salt):
    return [sum(in_canary(u, salt, p) for u in users) for p in (1, 10, 50)]


def test_salt_gives_every_stage_its_share_of_the_requests():
    users = [u for u in USERS[:100] for _ in range(2)]
    enough = {1: 1, 10: 5, 50: 5}
    salt = choose_salt("7", users, enough)
    one, ten, half = hits(users, salt)
    assert 1 <= one <= 4 and 16 <= ten <= 24 and 94 <= half <= 106
    assert salt == choose_salt("7", users, enough)


@pytest.mark.parametrize("count", [3, 12, 40])
def test_salt_is_found_that_gives_somebody_to_a_canary_of_one_per_cent_of_few_users(count):
    users = [USERS[i % count] for i in range(120)]
    one, ten, half = hits(users, choose_salt("7", users, {1: 1, 10: 5, 50: 5}))
    assert one >= 1 and ten >= 5 and half >= 5


def test_salt_looks_at_counts_and_not_at_who_the_users_are():
    users = USERS[:50]
    assert choose_salt("7", users, {10: 5}) == choose_salt("7", users[::-1], {10: 5})


def test_first_model_needs_no_salt():
    assert choose_salt("1", USERS[:10], {}) == "1-0"
