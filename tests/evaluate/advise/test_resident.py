"""The simulated prefix cache finds what a list of all earlier prompts says, and forgets what no longer fits."""

import random
import warnings

import numpy as np
import pytest

from jointkv.evaluate.advise.resident import Resident

BLOCK = 4


def text(length: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(50), k=length)


def exact_by_hand(rows: list[list[int]], row: list[int]) -> int:
    """Tokens in leading whole blocks that an earlier prompt begins with too; the last token is always computed."""
    best = 0
    for earlier in rows:
        same = next((at for at, pair in enumerate(zip(row, earlier, strict=False)) if pair[0] != pair[1]), None)
        same = min(len(row), len(earlier)) if same is None else same
        best = max(best, min(same, len(earlier) // BLOCK * BLOCK, len(row) - 1) // BLOCK * BLOCK)
    return best


def test_exact_prefixes_are_those_of_all_earlier_prompts() -> None:
    rng, resident, rows = random.Random(0), Resident(BLOCK), list[list[int]]()
    for number in range(60):
        start = rng.choice(rows)[: rng.randrange(40)] if rows and rng.random() < 0.7 else []
        row = [*start, *text(rng.randrange(1, 30), number)]
        assert resident.request("", np.array(row)).exact_tokens == exact_by_hand(rows, row)
        resident.check_integrity()
        rows.append(row)


def test_the_three_kinds_of_finding() -> None:
    shared, resident = text(8 * BLOCK, 1), Resident(BLOCK)
    first = resident.request("", np.array([*text(BLOCK, 2), *shared]))
    assert (first.exact_tokens, first.same_tokens, first.moved_tokens) == (0, 0, 0)
    same = resident.request("", np.array([*text(BLOCK, 3), *shared, 1]))
    assert (same.exact_tokens, same.same_tokens, same.stretches) == (0, 7 * BLOCK, 1)
    moved = resident.request("", np.array([*text(BLOCK + 2, 4), *shared, 1]))
    assert (moved.exact_tokens, moved.same_tokens, moved.moved_tokens) == (0, 0, 6 * BLOCK)
    again = resident.request("", np.array([*text(BLOCK, 2), *shared, 1]))
    assert (again.exact_tokens, again.same_tokens, again.moved_tokens) == (9 * BLOCK, 0, 0)


def test_tenants_find_nothing_of_each_other() -> None:
    row, resident = np.array(text(8 * BLOCK, 1)), Resident(BLOCK)
    resident.request("a", row)
    with warnings.catch_warnings(action="error"):  # once each log of several tenants brought one to the terminal
        seen = resident.request("b", row)
        seen_too = resident.request("c", row)
    for each in (seen, seen_too):
        assert (each.exact_tokens, each.same_tokens, each.moved_tokens, each.runs) == (0, 0, 0, [])


def test_a_full_pool_forgets_the_oldest_and_of_it_the_end() -> None:
    resident = Resident(BLOCK, pool_tokens=10 * BLOCK)
    old, new = np.array(text(6 * BLOCK, 1)), np.array(text(7 * BLOCK, 2))
    for row in (old, new):
        resident.request("", row)
        resident.check_integrity()
    assert resident.request("", old).exact_tokens == 3 * BLOCK
    assert resident.sources.keys() == {0, 1, 2}
    for number in range(20):
        resident.request("", np.array(text(9 * BLOCK, 10 + number)))
        resident.check_integrity()
    assert len(resident.sources) == 2
    seen = resident.request("", new)
    assert (seen.exact_tokens, seen.same_tokens, seen.moved_tokens) == (0, 0, 0)


@pytest.mark.parametrize("length", [0, 1, BLOCK])
def test_short_prompts(length: int) -> None:
    resident = Resident(BLOCK)
    for _ in range(2):
        assert resident.request("", np.array(text(length, 1), np.int64)).exact_tokens == 0
    resident.check_integrity()
