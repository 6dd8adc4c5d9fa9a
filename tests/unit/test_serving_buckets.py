"""Sticky users: the bucket is fixed, shares are met, and nobody leaves the canary as it widens."""

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


def test_salt_gives_every_step_its_share_of_the_requests():
    windows = [(10, USERS[:60]), (50, USERS[60:120]), (100, USERS[120:180])]
    salt = choose_salt("7", windows, enough=5)
    hits = [sum(in_canary(u, salt, p) for u in users) for p, users in windows]
    assert 5 <= hits[0] <= 7 and 28 <= hits[1] <= 32 and hits[2] == 60
    assert salt == choose_salt("7", windows, enough=5)


def test_salt_gives_a_lonely_user_to_the_challenger_rather_than_to_nobody():
    windows = [(10, ["only"] * 8), (50, ["only"] * 8)]
    salt = choose_salt("7", windows, enough=5)
    assert in_canary("only", salt, 10)
