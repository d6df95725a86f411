"""Entry blocks are compared as long as that saves more than it costs, and now and then where it does not."""

from __future__ import annotations

from jointkv.policy.worth import ENOUGH, MOST_KEYS, RARELY, REMEMBERED, WORTH, Worth


def told(worth: Worth, count: int, saved: int, key: str = "") -> None:
    for _ in range(count):
        worth.compared(key, saved)


def test_nobody_knows_before_there_are_enough() -> None:
    worth = Worth()
    told(worth, ENOUGH - 1, 0)
    assert all(worth.pays("") for _ in range(100))
    told(worth, 1, 0)
    assert not worth.pays("")


def test_what_saves_enough_on_average_is_always_asked() -> None:
    worth = Worth()
    told(worth, ENOUGH, 0)
    told(worth, ENOUGH, 2 * WORTH)
    assert all(worth.pays("") for _ in range(100))
    told(worth, 1, 0)
    assert not worth.pays("")


def test_where_it_does_not_pay_one_request_in_so_many_asks_and_finds_that_the_traffic_has_changed() -> None:
    worth = Worth()
    told(worth, 10_000, 0)
    asked = [worth.pays("") for _ in range(3 * RARELY)]
    assert sum(asked) == 3 and not any(asked[: RARELY - 1])
    told(worth, REMEMBERED // 2, 2 * WORTH)  # what was long ago counts less
    assert worth.pays("")


def test_isolation_keys_have_accounts_of_their_own_and_no_end_of_them_is_kept() -> None:
    worth = Worth()
    told(worth, ENOUGH, 0, "one")
    assert worth.pays("another") and not worth.pays("one")
    for number in range(MOST_KEYS):
        worth.pays(str(number))
    assert len(worth) == MOST_KEYS and worth.pays("one")
