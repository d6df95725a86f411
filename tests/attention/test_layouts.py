"""Pages are taken in the orders that were seen, which writing confirms; others are refused by name."""

from __future__ import annotations

import pytest
import torch

from jointkv.attention.layouts import ENGINE_ORDERS, LayerPages
from jointkv.errors import LayoutError
from tests.attention.paged_cases import small_case, stored


def pool(tokens=16, heads=2, size=64, value_size=None, dtype=torch.float32):
    return torch.zeros(4, tokens, heads, size, dtype=dtype), torch.zeros(
        4, tokens, heads, value_size or size, dtype=dtype
    )


BAD_PAGES = {
    "float64": pool(dtype=torch.float64),
    "integers": pool(dtype=torch.int8),
    "K and V of different dtypes": (pool()[0], pool(dtype=torch.float16)[1]),
    "a head size that is no multiple of 16": pool(size=40),
    "a head size of V that is no multiple of 16": pool(value_size=40),
    "a head size beyond 512": pool(size=528),
    "pages beyond 256 tokens": pool(tokens=257),
    "other heads": (pool(heads=2)[0], pool(heads=1)[1]),
    "three dimensions": (pool()[0][0], pool()[1][0]),
    "K with gaps in every direction": (torch.zeros(4, 16, 2, 128)[..., ::2], pool()[1]),
    "V by columns": (pool()[0], torch.zeros(4, 2, 64, 16).permute(0, 3, 1, 2)),
}


@pytest.mark.parametrize("pages", BAD_PAGES.values(), ids=BAD_PAGES)
def test_pages_it_was_not_written_for_are_refused(pages):
    with pytest.raises(LayoutError):
        LayerPages.of_pool(*pages)


@pytest.mark.parametrize("isa", ["neon", "rvv", "vxe", "vsx", "", "VEC"])
def test_an_engine_layout_never_seen_is_refused_by_name(isa):
    with pytest.raises(LayoutError, match=f"{isa!r} was never seen"):
        LayerPages.of_engine(torch.zeros(4, 2, 32, 128), isa)


@pytest.mark.parametrize(
    ("cache", "isa"),
    [
        (torch.zeros(4, 2, 32, 128), "amx"),
        (torch.zeros(4, 2, 16, 128, dtype=torch.bfloat16), "amx"),
        (torch.zeros(4, 2, 32, 96, dtype=torch.bfloat16), "amx"),
        (torch.zeros(4, 2, 32, 128, dtype=torch.uint8), "vec"),
        (torch.zeros(4, 2, 128, 32).transpose(2, 3), "vec"),
        (torch.zeros(2, 32, 128), "vec"),
    ],
)
def test_a_cache_that_is_not_in_its_order_is_refused(cache, isa):
    with pytest.raises(LayoutError):
        LayerPages.of_engine(cache, isa)


@pytest.mark.parametrize("isa", ENGINE_ORDERS)
def test_an_order_is_confirmed_by_writing(isa):
    """What the engine writes must be found where its order says; a page written in another order is refused."""
    dtype = torch.bfloat16 if isa == "amx" else torch.float32
    cache = torch.zeros(4, 2, 32, 128, dtype=dtype)
    pages = LayerPages.of_engine(cache, isa)

    def write_as(order):
        def write(key, value, slots):
            assert slots.tolist() == list(range(32, 64))
            sides = [stored(part[None], order)[side] for side, part in enumerate((key, value))]
            if order == "columns":
                sides = [sides[0].permute(0, 2, 3, 1), sides[1].transpose(1, 2)]
            elif order == "rows":
                sides = [side.transpose(1, 2) for side in sides]
            cache.view(4, 2, 2, -1)[1] = torch.stack([side[0].flatten(1) for side in sides], 1)

        return write

    own = ENGINE_ORDERS[isa]
    pages.confirm(write_as(own), 1)
    assert not cache.any(), "the page must be as it was"
    for other in {"rows", "columns", "pairs"} - {own}:
        with pytest.raises(LayoutError, match="never seen"):
            pages.confirm(write_as(other), 1)


def test_pages_elsewhere_lie_by_rows():
    _, pages = small_case()
    elsewhere = LayerPages.of_pool(pages.keys.to("meta"), pages.values.to("meta"))
    with pytest.raises(LayoutError, match="by columns on meta"):
        LayerPages(elsewhere.keys, elsewhere.values, "columns")
    with pytest.raises(LayoutError):
        LayerPages(elsewhere.keys, pages.values, "rows")


@pytest.mark.parametrize("order", ["rows", "columns", "pairs"])
def test_every_order_reads_the_same(order):
    keys, values = torch.randn(2, 3, 32, 2, 64).bfloat16()
    pages = LayerPages(stored(keys, order)[0], stored(values[..., :32], order)[1], order)
    assert (pages.num_pages, pages.block_size, pages.num_heads) == (3, 32, 2)
    assert (pages.key_size, pages.value_size) == (64, 32)
    assert all(torch.equal(*sides) for sides in zip(pages.read(), (keys, values[..., :32]), strict=True))
    chosen = torch.tensor([2, 0])
    assert torch.equal(pages.read(chosen)[0], keys[chosen])
