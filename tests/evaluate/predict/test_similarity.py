"""Similarities equal their definitions, over the pairs they promise to compare."""

import math

import pytest
import torch
from torch import Tensor

from jointkv.core.blocks import PagedKV
from jointkv.errors import LayoutError
from jointkv.evaluate.predict.similarity import Similarity, across_requests, as_pages, similarities, within_request

BLOCK, HEADS, SIZE = 4, 2, 8


def random_pages(pages: int, layers: int = 2, seed: int = 0) -> PagedKV:
    generator = torch.Generator().manual_seed(seed)
    keys, values = (
        [torch.randn(pages, BLOCK, HEADS, SIZE, generator=generator) + shift for _ in range(layers)]
        for shift in (1.0, 0.0)
    )
    return PagedKV(keys, values)


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
    kv = random_pages(9)
    # A block nearly equal to another one, so that the shares are neither 0 nor 1.
    for layer in (*kv.keys, *kv.values):
        layer[4] = 1.05 * layer[0]
        layer[1] = 1.15 * layer[0]
    tables = [torch.arange(0, 4), torch.arange(4, 9)]
    pairs = {
        "across": [(i, i + 4) for i in range(4)],
        "within": [(i, j) for table in tables for i in table.tolist() for j in table.tolist() if i < j],
    }[relation]
    row = one(similarities(kv, tables, chunk_blocks=8), 1, side, relation)
    cosine, error = naive((kv.keys if side == "key" else kv.values)[1], pairs)
    assert row.pairs == len(pairs)
    assert row.mean == pytest.approx(cosine.mean().item(), abs=1e-5)
    assert row.max == pytest.approx(1, abs=1e-5) and row.max <= 1
    for name, quantile in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99)):
        assert getattr(row, name) == pytest.approx(cosine.quantile(quantile).item(), abs=1e-5)
    assert row.share_within == pytest.approx([(error <= bound).float().mean().item() for bound in (0.1, 0.2)])
    assert row.share_within[1] > 0


def test_chunks_are_compared_at_equal_places() -> None:
    tables = [torch.arange(0, 5), torch.arange(10, 12), torch.arange(20, 26)]
    expected = [[0, 2, 4], [1, 3, -1], [10, -1, -1], [11, -1, -1], [20, 22, 24], [21, 23, 25]]
    assert within_request(tables, 2).tolist() == expected
    found = similarities(random_pages(26), tables, 2, ["within"])
    assert {row.relation for row in found} == {"within"} and {row.pairs for row in found} == {3 + 1 + 3 + 3}


def test_a_single_chunk_means_all_blocks_of_a_request() -> None:
    tables = [torch.arange(0, 3), torch.arange(10, 12)]
    assert within_request(tables, 3).tolist() == [[0, 1, 2], [10, 11, -1]]
    assert across_requests(tables).tolist() == [[0, 10], [1, 11], [2, -1]]


def test_blocks_that_are_not_finite_are_left_out() -> None:
    kv = random_pages(6)
    kv.keys[0][1] = math.nan
    found = similarities(kv, [torch.arange(3), torch.arange(3, 6)], 8, ["across"])
    assert one(found, 0, "key", "across").pairs == 2 and one(found, 1, "key", "across").pairs == 3
    assert math.isfinite(one(found, 0, "key", "across").mean)


def test_nothing_to_compare_is_not_zero() -> None:
    row = one(similarities(random_pages(3), [torch.arange(3)], 8), 0, "value", "across")
    assert row.pairs == 0 and math.isnan(row.mean) and all(map(math.isnan, row.share_within))
    assert set(row.as_row()) == {
        *("layer", "side", "relation", "pairs", "mean", "p50", "p90", "p99", "max"),
        *("share_within_0.1", "share_within_0.2"),
    }


def test_order_layers_and_progress() -> None:
    done: list[int] = []
    tables = [torch.arange(2), torch.arange(2, 4)]
    found = similarities(random_pages(4), tables, 8, layers=[1, 5], progress=done.append)
    order = [(row.layer, row.relation, row.side) for row in found]
    assert order == [(n, r, s) for n in (1, 5) for r in ("across", "within") for s in ("key", "value")]
    assert done == [1, 2]


def test_dense_states_become_pages() -> None:
    generator = torch.Generator().manual_seed(1)
    keys = [torch.randn(3, HEADS, 2 * BLOCK + 1, SIZE, generator=generator) for _ in range(2)]
    kv, tables = as_pages(keys, [-layer for layer in keys], BLOCK)
    assert [table.tolist() for table in tables] == [[0, 1], [2, 3], [4, 5]]
    page = kv.values[1][tables[2][1]]
    assert torch.equal(page, -keys[1][2, :, BLOCK : 2 * BLOCK].transpose(0, 1))


def test_wrong_shapes_are_refused() -> None:
    kv = random_pages(4)
    with pytest.raises(LayoutError, match="no request"):
        similarities(kv, [], 8)
    with pytest.raises(LayoutError, match="3 layer numbers for 2"):
        similarities(kv, [torch.arange(4)], 8, layers=[0, 1, 2])
    short = [torch.zeros(1, HEADS, BLOCK - 1, SIZE)]
    with pytest.raises(LayoutError, match="S of at least 4 expected"):
        as_pages(short, short, BLOCK)
