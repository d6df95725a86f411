"""What a worker signs estimates how far pages are apart; ranks add up."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")

from jointkv.core.packed import PackedPages
from jointkv.vllm_plugin.messages import Inquiry, Verdict
from jointkv.vllm_plugin.worker.comparer import PageComparer
from jointkv.vllm_plugin.worker.signer import PageSigner
from tests.core.packings import pack, row_major

PAGES, TOKENS, HEADS, SIZE = 12, 16, 4, 16


def sides(layers: int, seed: int) -> list[list[torch.Tensor]]:
    """K and V around one centre: some pages are near, others far."""
    generator = torch.Generator().manual_seed(seed)
    near = torch.linspace(0.1, 2, PAGES)[:, None, None, None]
    shape = (TOKENS, HEADS, SIZE)
    return [
        [
            torch.randn(1, *shape, generator=generator) + near * torch.randn(PAGES, *shape, generator=generator)
            for _ in range(layers)
        ]
        for _ in range(2)
    ]


def packed(keys: list[torch.Tensor], values: list[torch.Tensor]) -> PackedPages:
    size = keys[0].shape[2] * SIZE
    return pack(keys, values, torch.float32, row_major(TOKENS, size, size))[1]


def asking(pages: list[tuple[int, int]]) -> Inquiry:
    asked = Inquiry(1)
    asked.sign_group, asked.sign = np.array(pages, np.int64).T
    return asked


def distances(signatures: np.ndarray) -> np.ndarray:
    wide = signatures.astype(np.float32)
    return np.square(wide[:, None] - wide[None]).sum(-1)[np.triu_indices(len(wide), 1)]


def truth(parts: list[list[torch.Tensor]]) -> np.ndarray:
    """Mean over layers, and over K and V, of the squared distance of unit blocks."""
    units = torch.stack([torch.nn.functional.normalize(layer.flatten(1), dim=1) for part in parts for layer in part])
    return (units[:, :, None] - units[:, None]).square().sum(-1).mean(0).numpy()[np.triu_indices(PAGES, 1)]


def test_the_sum_over_ranks_is_a_signature_of_the_whole_block() -> None:
    whole = sides(4, 0)
    everything = asking([(0, page) for page in range(PAGES)])
    for keys_alone in (False, True):
        similarity = "key" if keys_alone else "key_value"
        parts = []
        for rank in range(2):
            heads = slice(2 * rank, 2 * rank + 2)
            own = [[layer[:, :, heads].contiguous() for layer in side] for side in whole]
            signer = PageSigner({0: packed(*own)}, 128, similarity, rank, 2)
            parts.append(signer.begin(everything)())
        expected = truth(
            [
                [layer[:, :, half] for layer in side for half in (slice(2), slice(2, 4))]
                for side in whole[: 2 - keys_alone]
            ]
        )
        ratio = distances(sum(part.astype(np.float32) for part in parts)) / expected
        assert abs(ratio.mean() - 1) < 0.2 and 0.5 < ratio.min() <= ratio.max() < 1.6


def test_every_group_signs_its_own_pages_in_the_order_asked() -> None:
    groups = {0: packed(*sides(2, 1)), 3: packed(*sides(2, 2))}
    comparer = PageComparer("rms", groups, None, PageSigner(groups, 32))
    asked = [(3, 1), (0, 5), (3, 0), (0, 1)]
    verdict = comparer.finish(comparer.begin(asking(asked)))
    verdict.check(0, 4, 32)
    for row, (group, page) in enumerate(asked):
        alone = comparer.finish(comparer.begin(asking([(group, page)])))
        assert np.allclose(alone.signatures[0], verdict.signatures[row], atol=1e-3)
    assert not np.allclose(verdict.signatures[0], verdict.signatures[3], atol=0.05)


def test_pages_without_numbers_have_none() -> None:
    pages = packed(*sides(2, 3))
    pages.layers[1][4, 7] = torch.inf
    comparer = PageComparer("rms", {0: pages}, None, PageSigner({0: pages}, 32))
    both = asking([(0, 4), (0, 5)])
    both.group, both.own, both.other = np.array([[0], [5], [5]])
    both.second = both.offset = both.shift = np.zeros(1, np.int64)
    verdict: Verdict = comparer.finish(comparer.begin(both))
    verdict.check(1, 2, 32)
    assert np.isfinite(verdict.signatures).all(1).tolist() == [False, True] and verdict.key_error.tolist() == [0]
