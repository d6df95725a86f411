"""Prompts that are computed around text of earlier ones: what is read, what is computed, and what of that is exact."""

from __future__ import annotations

import pytest
import torch

from jointkv.evaluate.holding.batch import Batch
from jointkv.evaluate.holding.dense import LayerStates, layer_states
from jointkv.evaluate.holding.held import HeldBatch, RebuiltBatch
from jointkv.evaluate.methods import get_method
from tests.evaluate.methods.tiny_batches import BLOCK, batch_of, needs_hf, random_tokens, requests_of

pytestmark = needs_hf
TEXT = random_tokens(48, 1)
HEADS = (5, 5, 9)


@pytest.fixture(scope="module")
def batch() -> Batch:
    """The same text behind heads of five, five and nine tokens, and tails of seven."""
    return batch_of(
        requests_of(
            *(random_tokens(head, 20 + row) + TEXT + random_tokens(7, 30 + row) for row, head in enumerate(HEADS))
        )
    )


def far(states: LayerStates, exact: LayerStates, places: slice) -> float:
    """Largest difference of K or V."""
    pairs = zip(states, exact, strict=True)
    return max(
        float((a - b)[:, :, places].abs().max()) for ours, theirs in pairs for a, b in zip(ours, theirs, strict=True)
    )


def rebuilt(held: HeldBatch, row: int) -> LayerStates:
    assert isinstance(held, RebuiltBatch)
    return held.rebuild(row)


def skipped(held: HeldBatch) -> int:
    assert held.work is not None
    return held.work.skipped_tokens


def exact_of(batch: Batch, row: int) -> LayerStates:
    return layer_states(batch.dense[row])


def test_any_part_of_a_prompt_computed_behind_the_rest_is_exact(batch: Batch) -> None:
    from jointkv.evaluate.holding.patched import _patched

    exact = exact_of(batch, 2)
    mask = torch.rand(batch.lengths[2], generator=torch.Generator().manual_seed(0)) < 0.4
    spoiled = [(k.masked_fill(mask[:, None], 9.0), v.masked_fill(mask[:, None], 9.0)) for k, v in exact]
    found = _patched(batch.model, batch.requests[2].prompt, spoiled, mask)
    assert far(found, exact, slice(None)) < 1e-4


def test_what_was_found_is_read_turned_and_the_rest_is_computed(batch: Batch) -> None:
    held = get_method("full_reuse").hold(batch, 1.0)
    read = skipped(held)
    assert 2 * (len(TEXT) - 2 * BLOCK) <= read <= 2 * len(TEXT)
    assert far(rebuilt(held, 0), exact_of(batch, 0), slice(None)) == 0
    moved, donor = rebuilt(held, 2), exact_of(batch, 0)
    inside = slice(9 + BLOCK, 9 + 40)
    for (keys, values), (theirs_k, theirs_v) in zip(moved, donor, strict=True):
        torch.testing.assert_close(values[:, :, inside], theirs_v[:, :, 5 + BLOCK : 5 + 40])
        assert not torch.allclose(keys[:, :, inside], theirs_k[:, :, 5 + BLOCK : 5 + 40])
    assert far(moved, exact_of(batch, 2), slice(0, 9)) < 1e-4, "the header stands behind nothing that was read"
    assert far(moved, exact_of(batch, 2), inside) > 0.01


@pytest.mark.parametrize("name", ["epic", "cache_blend"])
def test_the_more_is_computed_the_nearer(name: str, batch: Batch) -> None:
    method = get_method(name)
    none, all_of_it = (method.hold(batch, level) for level in (0.0, 1.0 if name == "cache_blend" else 64.0))
    assert skipped(all_of_it) == 0 < skipped(none)
    assert all_of_it.work is not None and none.work is not None
    assert all_of_it.work.flops == all_of_it.work.flops_unfused > none.work.flops
    assert max(far(rebuilt(all_of_it, row), exact_of(batch, row), slice(None)) for row in range(3)) < 1e-4
    some = method.hold(batch, 0.5 if name == "cache_blend" else 8.0)
    assert 0 < skipped(some) < skipped(none)


def test_an_equal_prefix_is_never_computed_again() -> None:
    rows = requests_of(*(TEXT + random_tokens(9, 40 + row) for row in range(2)))
    held = get_method("epic").hold(batch_of(rows), 64.0)
    assert skipped(held) == len(TEXT)
    assert far(rebuilt(held, 1), exact_of(batch_of(rows), 1), slice(None)) < 1e-4
