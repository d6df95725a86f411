"""Similarities equal their definitions, over the pairs they promise to compare."""

import math

import pytest
import torch
from torch import Tensor

from jointkv.errors import LayoutError
from jointkv.evaluate.holding.prefilled import Prefilled
from jointkv.evaluate.predict.similarity import Similarity, similarities
from jointkv.evaluate.traffic.base import Request

BLOCK, HEADS, SIZE = 4, 2, 8


def random_batch(*blocks: int, layers: int = 2, seed: int = 0) -> Prefilled:
    """Requests of so many full blocks each, on pages in their order."""
    generator = torch.Generator().manual_seed(seed)
    state = {
        f"{side}.{layer}": torch.randn(sum(blocks), BLOCK, HEADS, SIZE, generator=generator) + shift
        for side, shift in (("key", 1.0), ("value", 0.0))
        for layer in range(layers)
    }
    numbers = iter(range(sum(blocks)))
    rows = [torch.tensor([next(numbers) for _ in range(count)]) for count in blocks]
    state["table.0"] = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)
    state["padding"] = torch.tensor([(max(blocks) - count) * BLOCK for count in blocks])
    requests = [Request(tuple(range(count * BLOCK + 1)), (), "") for count in blocks]
    return Prefilled(requests, state, max(blocks) * BLOCK, torch.ones(0), 0.0)


def one(found: list[Similarity], layer: int, side: str, relation: str) -> Similarity:
    (row,) = [row for row in found if (row.layer, row.side, row.relation) == (layer, side, relation)]
    return row


def naive(pages: Tensor, pairs: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """Cosines, and errors in the better direction, pair by pair."""
    blocks = pages.flatten(1)
    cosines = [torch.cosine_similarity(blocks[i], blocks[j], dim=0) for i, j in pairs]
    errors = [(blocks[i] - blocks[j]).norm() / torch.maximum(blocks[i].norm(), blocks[j].norm()) for i, j in pairs]
    return torch.stack(cosines), torch.stack(errors)


@pytest.mark.parametrize("side", ["key", "value"])
@pytest.mark.parametrize("relation", ["across", "within"])
def test_equals_the_definition(side: str, relation: str) -> None:
    batch = random_batch(4, 5)
    # A block nearly equal to another one, so that the shares are neither 0 nor 1.
    for name in ("key.0", "key.1", "value.0", "value.1"):
        batch.state[name][4] = 1.05 * batch.state[name][0]
        batch.state[name][1] = 1.15 * batch.state[name][0]
    tables = [torch.arange(0, 4), torch.arange(4, 9)]
    pairs = {
        "across": [(i, i + 4) for i in range(4)],
        "within": [(i, j) for table in tables for i in table.tolist() for j in table.tolist() if i < j],
    }[relation]
    row = one(similarities(batch, 8 * BLOCK), 1, side, relation)
    cosine, error = naive(batch.state[f"{side}.1"], pairs)
    assert row.pairs == len(pairs)
    assert row.mean == pytest.approx(cosine.mean().item(), abs=1e-5)
    assert row.max == pytest.approx(1, abs=1e-5) and row.max <= 1
    for name, quantile in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99)):
        assert getattr(row, name) == pytest.approx(cosine.quantile(quantile).item(), abs=1e-5)
    assert row.share_within == pytest.approx([(error <= bound).float().mean().item() for bound in (0.1, 0.2)])
    assert row.share_within[1] > 0


def test_chunks_are_compared_at_equal_places() -> None:
    found = similarities(random_batch(5, 2, 6), 2 * BLOCK, ["within"])
    assert {row.relation for row in found} == {"within"} and {row.pairs for row in found} == {3 + 1 + 3 + 3}


def test_a_single_chunk_means_all_blocks_of_a_request() -> None:
    found = similarities(random_batch(3, 2), 3 * BLOCK)
    assert {(row.relation, row.pairs) for row in found} == {("across", 2), ("within", 3 + 1)}


def test_blocks_that_are_not_finite_are_left_out() -> None:
    batch = random_batch(3, 3)
    batch.state["key.0"][1] = math.nan
    found = similarities(batch, 8 * BLOCK, ["across"])
    assert one(found, 0, "key", "across").pairs == 2 and one(found, 1, "key", "across").pairs == 3
    assert math.isfinite(one(found, 0, "key", "across").mean)


def test_nothing_to_compare_is_not_zero() -> None:
    row = one(similarities(random_batch(3), 8 * BLOCK), 0, "value", "across")
    assert row.pairs == 0 and math.isnan(row.mean) and all(map(math.isnan, row.share_within))
    assert set(row.as_row()) == {
        *("layer", "side", "relation", "pairs", "mean", "p50", "p90", "p99", "max"),
        *("share_within_0.1", "share_within_0.2"),
    }


def test_order_layers_and_progress() -> None:
    done: list[int] = []
    found = similarities(random_batch(2, 2), 8 * BLOCK, layers=[1, 5], progress=done.append)
    order = [(row.layer, row.relation, row.side) for row in found]
    assert order == [(n, r, s) for n in (1, 5) for r in ("across", "within") for s in ("key", "value")]
    assert done == [1, 2]
    with pytest.raises(LayoutError, match="3 layer numbers for 2"):
        similarities(random_batch(4), 8 * BLOCK, layers=[0, 1, 2])
