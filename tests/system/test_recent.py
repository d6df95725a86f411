"""Of keys without end the most recently used are kept."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from jointkv.system.recent import Recent


@given(st.lists(st.integers(0, 6)), st.integers(1, 4))
def test_the_most_recently_used_are_kept(asked: list[int], most: int) -> None:
    gone: list[int] = []
    recent = Recent[int, list[int]](lambda key: [key], most, gone.append)
    expected: list[int] = []
    made = 0
    for key in asked:
        made += key not in expected
        recent[key].append(key)
        expected = [each for each in expected if each != key] + [key]
        expected = expected[-most:]
        assert list(recent) == expected
    assert len(gone) == made - len(recent)
    assert all(len(kept) > 1 and set(kept) == {key} for key, kept in recent.items())


def test_one_is_forgotten_before_the_next_is_made() -> None:
    order: list[str] = []
    recent = Recent[str, None](lambda key: order.append(f"made {key}"), 1, lambda key: order.append(f"forgot {key}"))
    for key in "ab":
        assert recent[key] is None
    assert order == ["made a", "forgot a", "made b"] and "a" not in recent


def test_looking_at_all_of_them_is_no_use_of_any() -> None:
    recent = Recent[str, int](len, 2)
    assert [recent[key] for key in ("a", "bb")] == [1, 2]
    assert list(recent.values()) == [1, 2] and recent.get("a") == 1 and dict(recent.items()) == {"a": 1, "bb": 2}
    recent["ccc"]
    assert list(recent) == ["bb", "ccc"]
