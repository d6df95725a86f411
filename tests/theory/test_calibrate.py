"""From errors of pairs to settings: what is shared, in which order settings are tried, which one is taken."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from jointkv.theory.calibrate import (
    BOUNDS,
    acceptance_and_distortion,
    cover,
    effective_error,
    last_that_holds,
    settings_by_cost,
    upper_mean,
)


def clusters(sizes, within, between=2.0):
    """One line of blocks in clusters."""
    name = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    error = torch.where(name[:, None] == name, within, between).fill_diagonal_(0.0)
    return error[None], torch.ones(1, len(name), dtype=torch.bool)


def test_a_block_is_served_by_the_first_of_its_cluster():
    error, valid = clusters([2, 3], 0.1)
    assert cover(error, valid, 0.2).tolist() == [[0, 0, 2, 2, 2]]
    assert cover(error, valid, 0.05).tolist() == [[0, 1, 2, 3, 4]]


def test_a_missing_block_serves_nobody():
    error, valid = clusters([3], 0.1)
    valid[0, 0] = False
    assert cover(error, valid, 0.2).tolist() == [[-1, 1, 1]]


def test_the_nearest_representative_serves():
    error = torch.tensor([[[0.0, 9, 9], [9, 0, 9], [0.3, 0.1, 0]]])
    assert cover(error, torch.ones(1, 3, dtype=torch.bool), 0.5).tolist() == [[0, 1, 1]]


@given(st.integers(1, 6), st.integers(1, 9), st.floats(0, 1), st.integers(0, 10**6))
def test_every_served_block_is_within_the_bound_of_a_representative(lines, count, bound, seed):
    generator = torch.Generator().manual_seed(seed)
    error = torch.rand(lines, count, count, generator=generator)
    error.diagonal(dim1=1, dim2=2).zero_()
    valid = torch.rand(lines, count, generator=generator) < 0.8
    served_by = cover(error, valid, bound)
    for line in range(lines):
        for block in range(count):
            server = int(served_by[line, block])
            assert (server >= 0) == bool(valid[line, block])
            if server >= 0 and server != block:
                assert error[line, block, server] <= bound and served_by[line, server] == server


def test_acceptance_and_distortion_of_a_cluster():
    error, valid = clusters([4, 1], 0.1)
    acceptance, distortion = acceptance_and_distortion(error, valid, 0.2)
    assert acceptance == pytest.approx(3 / 5) and distortion == pytest.approx(3 * 0.01 / 5)


def test_no_blocks_are_no_acceptance():
    assert acceptance_and_distortion(torch.zeros(0, 3, 3), torch.zeros(0, 3, dtype=torch.bool), 0.5) == (0.0, 0.0)


def test_exact_duplicates_only_come_first_whatever_a_group_costs():
    error, valid = clusters([5, 5], 0.19)
    for sensitivity in ([1.0, 0.0], [0.0, 0.0]):
        assert settings_by_cost(torch.stack((error, error)), valid, sensitivity)[0] == (0.0, 0.0)


def test_one_group_tries_the_bounds_that_change_what_is_shared():
    generator = torch.Generator().manual_seed(0)
    error = torch.rand(50, 40, 40, generator=generator).clamp(max=0.8)
    error.diagonal(dim1=1, dim2=2).zero_()
    valid = torch.ones(50, 40, dtype=torch.bool)
    # At 0.85 and 1 everything is within the bound already at 0.85.
    assert settings_by_cost(error[None], valid, [1.0]) == [(bound,) for bound in BOUNDS[:-1]]
    error, valid = clusters([3], 0.1)
    assert settings_by_cost(error[None], valid, [1.0]) == [(0.0,), (0.1,)]


def test_the_group_that_costs_less_is_opened_first():
    error, valid = clusters([5, 5], 0.19)
    settings = settings_by_cost(torch.stack((error, error)), valid, [1.0, 100.0])
    opened = [next(i for i, s in enumerate(settings) if s[group] >= 0.2) for group in (0, 1)]
    assert opened[0] < opened[1] and settings[0] == (0.0, 0.0)
    assert all(len(setting) == 2 for setting in settings) and len(set(settings)) == len(settings)


@pytest.mark.parametrize("last", range(-1, 6))
def test_bisection_finds_the_last_that_holds(last):
    settings = [(float(index),) for index in range(6)]
    asked = []

    def holds(setting):
        asked.append(setting)
        return setting[0] <= last

    assert last_that_holds(settings, holds) == (settings[last] if last >= 0 else None)
    assert len(asked) <= 3


def test_a_token_counts_by_its_own_bound():
    error = effective_error(torch.tensor([0.1, 0.1]), torch.tensor([0.2, 0.1]), torch.tensor([0.15, 0.6]))
    assert error.tolist() == pytest.approx([0.2, 0.4])


def test_the_upper_limit_holds_for_further_means():
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(4000, 32, generator=generator)
    held = [float(row[20:].mean()) <= upper_mean(row[:20].tolist(), 12) for row in draws]
    assert 0.93 <= sum(held) / len(held) <= 0.97
    assert upper_mean([1.0], 5) == math.inf and upper_mean([2.0, 2.0], 5) == 2.0
