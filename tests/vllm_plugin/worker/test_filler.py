"""Pages of text that moved, whatever the order of the numbers in a page."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")

from torch import Tensor

from jointkv.attention.rotary import NOT_TURNED, Rotary, moved_blocks
from jointkv.core.blocks import PagedKV
from jointkv.core.moved import Fills
from jointkv.core.packed import PackedPages
from jointkv.fusion.pair_sums import pair_sums
from jointkv.vllm_plugin.messages import Inquiry, Pair
from jointkv.vllm_plugin.worker.comparer import PageComparer
from jointkv.vllm_plugin.worker.filler import AT_A_TIME, NumberOrder, PageFiller

PAGES, TOKENS, HEADS, SIZE = 24, 4, 2, 8
ROTARY = [Rotary(0.5 ** torch.arange(4, dtype=torch.float64), style) for style in (False, True)] + [NOT_TURNED]


class Place:
    """Pages whose numbers are shuffled, and the same in order."""

    def __init__(self, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)
        shape = PAGES, TOKENS, HEADS, SIZE
        self.plain = PagedKV(*([torch.randn(shape, generator=generator).to(dtype) for _ in ROTARY] for _ in range(2)))
        elements = torch.randperm(2 * TOKENS * HEADS * SIZE, generator=generator)
        keys, values = elements.view(2, TOKENS, HEADS, SIZE)
        layers = []
        for key, value in zip(self.plain.keys, self.plain.values, strict=True):
            layer = torch.zeros(PAGES, len(elements), dtype=dtype)
            layer[:, keys.flatten()], layer[:, values.flatten()] = key.flatten(1), value.flatten(1)
            layers.append(layer)
        token_of, is_value = torch.zeros(len(elements), dtype=torch.long), torch.zeros(len(elements), dtype=torch.bool)
        for side in (keys, values):
            token_of[side] = torch.arange(TOKENS)[:, None, None].expand_as(side)
        is_value[values] = True
        self.order = NumberOrder(keys, values)
        self.filler = PageFiller(PackedPages(layers, token_of, is_value), self.order, ROTARY)

    def read(self, page: int) -> list[tuple[Tensor, Tensor]]:
        """K and V of each layer, in order."""
        return [(layer[page][self.order.keys], layer[page][self.order.values]) for layer in self.filler.pages.layers]


def fills(*rows: tuple[int, int, int, int]) -> Fills:
    """First page, second page, offset and shift of each."""
    return Fills(np.arange(len(rows)), *np.array(rows, np.int64).T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_page_is_what_its_sources_are_at_the_new_position(dtype: torch.dtype) -> None:
    place, asked = Place(dtype), fills((3, 4, 1, 5), (4, 4, 0, -9), (7, 3, 3, 40))
    expected = moved_blocks(place.plain, asked, ROTARY)
    place.filler.fill(np.array([10, 12, 11]), asked)
    for block, page in enumerate((10, 12, 11)):
        for layer, (key, value) in enumerate(place.read(page)):
            assert torch.equal(key, expected.keys[layer][block]) and torch.equal(value, expected.values[layer][block])
    for page in (3, 4, 7, 13):
        assert torch.equal(place.read(page)[0][0], place.plain.keys[0][page]), (
            "a page was written that was not asked for"
        )


def test_sources_are_read_before_a_page_is_written() -> None:
    """A page may be written whose own text moves on to another one."""
    place, asked = Place(torch.float32), fills((3, 4, 2, 2), (5, 5, 0, 1))
    expected = moved_blocks(place.plain, asked, ROTARY)
    place.filler.fill(np.array([5, 6]), asked)
    assert torch.equal(place.read(6)[1][0], expected.keys[1][1])


def test_what_would_be_written_is_compared_without_writing_it() -> None:
    place, count = Place(torch.float32), AT_A_TIME + 3
    rows = [(page, page + 1, page % TOKENS, page - 4 or 1) for page in range(count)]
    before = [layer.clone() for layer in place.filler.pages.layers]
    comparer = PageComparer("rms", {0: place.filler.pages}, filler=place.filler)
    pairs = [Pair(0, 20, *row) for row in rows] + [Pair(0, 20, 2)]
    columns = np.array(pairs, np.int64).T
    asked = Inquiry(1, [], *columns[:3], second=columns[3], offset=columns[4], shift=columns[5])
    verdict = comparer.finish(comparer.begin(asked))
    verdict.check(len(pairs))
    for layer, same in zip(place.filler.pages.layers, before, strict=True):
        assert torch.equal(layer, same)
    place.filler.fill(np.arange(PAGES - count, PAGES), fills(*rows))
    own = torch.cat([before[layer][20:21] for layer in range(len(before))])
    for pair in range(count):
        page = PAGES - count + pair
        written = torch.stack([layer[page] for layer in place.filler.pages.layers])
        keys = place.order.keys.flatten()
        error = ((own - written)[:, keys].square().sum(1) / own[:, keys].square().sum(1)).mean().sqrt()
        assert verdict.key_error[pair] == pytest.approx(float(error), rel=1e-4)
    apart = pair_sums(
        PackedPages(before, place.filler.pages.token_of, place.filler.pages.is_value), *torch.tensor([[20], [2]])
    )
    assert verdict.key_error[-1] > 0 and apart.shape[0] == 1
