"""The bound follows the traffic: tighter when errors are above the profile's, back when they are not, never beyond."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jointkv.errors import InvalidPolicy
from jointkv.theory.adapt import Adaptation, BoundController
from tests.core.profiles import make_profile

WINDOW = 100


def controller(**changes):
    return BoundController(distortion=0.01, acceptance=0.8, **{"window": WINDOW, **changes})


def windows(subject, count, squared_error, served=80):
    return [subject.observe(WINDOW, served, squared_error * WINDOW) for _ in range(count)]


def test_nothing_moves_on_the_traffic_that_was_calibrated():
    subject = controller()
    assert windows(subject, 20, 0.01) == [None] * 20 and windows(subject, 20, 0.012) == [None] * 20
    assert subject.factor == 1.0


def test_one_bad_window_is_no_reason_to_move():
    subject = controller(patience=2)
    for _ in range(5):
        assert windows(subject, 1, 0.05) == [None] and windows(subject, 1, 0.01) == [None]
    assert subject.factor == 1.0


def test_it_tightens_while_errors_are_too_large_and_comes_back():
    subject = controller(patience=2, step=0.5)
    moves = windows(subject, 4, 0.05)
    assert [move and move.direction for move in moves] == [None, "tighten", None, "tighten"]
    assert subject.factor == 0.25 and moves[3].distortion == pytest.approx(0.05)
    windows(subject, 10, 0.001)
    assert subject.factor == 1.0 and subject.moves == {"tighten": 2, "loosen": 2}


def test_it_loosens_up_to_the_ceiling_only():
    subject = controller(ceiling=1.3, step=0.8)
    windows(subject, 20, 0.001)
    assert subject.factor == 1.3 and subject.moves["loosen"] == 2


def test_traffic_that_is_not_alike_does_not_loosen_it_beyond_the_profile():
    subject = controller(ceiling=2.0)
    assert windows(subject, 20, 0.0, served=10) == [None] * 20 and subject.factor == 1.0


def test_a_tightened_bound_comes_back_though_it_accepts_less():
    subject = controller(patience=1, step=0.5, ceiling=2.0)
    windows(subject, 3, 0.05)
    assert subject.factor == 0.125
    windows(subject, 3, 0.0, served=0)
    assert subject.factor == 1.0
    assert windows(subject, 9, 0.0, served=0) == [None] * 9


@pytest.mark.parametrize("distortion", [0.0, 1e-14])
def test_a_sample_of_exact_duplicates_still_has_a_way_back(distortion):
    subject = BoundController(distortion, 0.5, window=WINDOW, patience=1)
    assert windows(subject, 5, 1e-5) == [None] * 5
    windows(subject, 3, 0.05)
    assert subject.factor < 1
    windows(subject, 9, 0.0)
    assert subject.factor == 1.0


def test_a_limit_for_tokens():
    adaptation = Adaptation(make_profile((0.2,), distortion=0.001), token_limit=0.1)
    assert adaptation.bounds(0) == (0.2, pytest.approx(0.1))
    adaptation.controllers[0].factor = 0.5
    assert adaptation.bounds(0) == (0.1, pytest.approx(0.05))


@pytest.mark.parametrize("limit", [float("nan"), -0.1, (0.1, 0.2)])
def test_limits_that_make_no_sense(limit):
    with pytest.raises(InvalidPolicy, match="max_relative_error"):
        Adaptation(make_profile((0.2,)), limit)


def test_a_user_bound_below_the_profile_holds_from_the_start():
    adaptation = Adaptation(make_profile((0.2, 0.4)), limit=0.1)
    assert adaptation.bounds(0) == pytest.approx((0.1, 0.15)) and adaptation.bounds(1) == pytest.approx((0.1, 0.15))


def test_without_a_limit_the_profile_is_the_limit():
    adaptation = Adaptation(make_profile((0.2,), distortion=0.01))
    for _ in range(50):
        adaptation.observe(0, WINDOW, [0.001] * 80)
    assert adaptation.bounds(0) == (0.2, pytest.approx(0.3)) and adaptation.moves == {"tighten": 0, "loosen": 0}


def test_moves_are_counted_and_described():
    adaptation = Adaptation(make_profile((0.2, 0.2), distortion=0.001, acceptance=0.5))
    found = [adaptation.observe(1, 256, [0.2] * 128) for _ in range(2)]
    assert found[0] is None and found[1] is not None
    line = adaptation.describe(1, found[1])
    assert "tightened" in line and "layer group 1" in line and "0.170" in line and "50% of blocks" in line
    assert adaptation.moves == {"tighten": 1, "loosen": 0} and adaptation.bounds(0)[0] == 0.2
    adaptation.check_integrity()


@given(
    st.lists(st.tuples(st.integers(1, 400), st.floats(0, 1), st.floats(0, 1)), max_size=60),
    st.floats(0.1, 3.0),
    st.floats(0, 0.1),
)
def test_whatever_comes_the_bound_stays_inside_the_users(windows, ceiling, distortion):
    subject = BoundController(distortion, 0.5, ceiling, window=WINDOW)
    for blocks, share, error in windows:
        served = int(share * blocks)
        subject.observe(blocks, served, served * error)
        subject.check_integrity()
        assert 0 < subject.factor <= ceiling
