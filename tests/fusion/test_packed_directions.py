"""Directions of packed pages: cosines of all pairs, and a page that holds what some blocks share."""

import pytest
import torch

from jointkv.core.blocks import PagedKV
from jointkv.core.packed import PackedPages
from jointkv.fusion.direction import shared_directions
from jointkv.fusion.packed_directions import packed_cosines, write_direction
from jointkv.fusion.pair_sums import pair_errors, pair_sums, with_own_norms
from jointkv.fusion.pairs import pair_statistics
from jointkv.policy import FusionPolicy

TOKENS, ELEMENTS = 4, 64
RULE = FusionPolicy(similarity="key_value", key_threshold=0.5, value_threshold=0.5).rule()


def packed(dtype: torch.dtype = torch.float32) -> PackedPages:
    """Eight pages of two layers; those of blocks 1 to 4 are alike, and of unlike norms."""
    draw = torch.Generator().manual_seed(0)
    layers = []
    for _ in range(2):
        held = torch.randn(8, ELEMENTS, generator=draw)
        held[1:5] = (held[1] + 0.3 * held[1:5]) * torch.tensor([0.8, 1.0, 1.2, 1.5])[:, None]
        layers.append(held.to(dtype))
    order = torch.randperm(ELEMENTS, generator=draw)
    return PackedPages(layers, order % TOKENS, order >= ELEMENTS // 2)


def paged(pages: PackedPages) -> PagedKV:
    keys, values = pages.vectors(torch.arange(pages.num_pages))
    return PagedKV(*([side.unflatten(1, (TOKENS, 1, -1)) for side in sides] for sides in (keys, values)))


def test_cosines_of_all_pairs() -> None:
    pages = packed()
    expected = pair_statistics(paged(pages), torch.arange(8)[None], RULE)
    assert expected.key_cosine is not None and expected.value_cosine is not None
    found = packed_cosines(pages, torch.arange(8))
    torch.testing.assert_close(found, torch.cat((expected.key_cosine, expected.value_cosine)), atol=1e-5, rtol=1e-5)


def test_a_page_that_holds_no_numbers_is_like_none() -> None:
    pages = packed()
    pages.layers[1][3, 5] = torch.inf
    found = packed_cosines(pages, torch.tensor([1, 2, 3]))
    assert found[:, :2, :2].isfinite().all() and found[:, 2].isnan().any() and found[:, 2, 2].isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_written_direction_is_that_of_the_offline_method(dtype: torch.dtype) -> None:
    pages, members = packed(dtype), torch.tensor([1, 2, 3, 4])
    before = [layer.clone() for layer in pages.layers]
    offline = shared_directions(paged(pages), members, torch.zeros(4, dtype=torch.long), 1, "rms")
    write_direction(pages, 7, members)
    for layer, old in zip(pages.layers, before, strict=True):
        assert torch.equal(layer[:7], old[:7]) and not torch.equal(layer[7], old[7])
    sums, factors = with_own_norms(pair_sums(pages, members, torch.full((4,), 7)))
    errors = pair_errors(sums, "rms")
    close = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 5e-3, "rtol": 2e-2}
    torch.testing.assert_close(errors.key, offline.errors.key, **close)
    torch.testing.assert_close(errors.value, offline.errors.value, **close)
    assert 0.5 < factors.min() < 1 < factors.max() < 2


def test_what_a_member_reads_is_not_written() -> None:
    pages = packed()
    with pytest.raises(ValueError, match="page 3 is read"):
        write_direction(pages, 3, torch.tensor([2, 3]))


def test_blocks_without_a_norm_share_nothing_but_zeros() -> None:
    pages = packed()
    for layer in pages.layers:
        layer[1:3] = 0
    write_direction(pages, 7, torch.tensor([1, 2]))
    assert all(not layer[7].any() for layer in pages.layers)
