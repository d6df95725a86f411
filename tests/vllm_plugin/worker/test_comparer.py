"""What a worker measures is what the definition gives, for every group, and it decides nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")

from jointkv.core.blocks import PagedKV
from jointkv.core.packed import PackedPages
from jointkv.vllm_plugin.attention.norms import OwnNorms
from jointkv.vllm_plugin.messages import COSINES, ERRORS, Inquiry, Verdict
from jointkv.vllm_plugin.worker.comparer import PageComparer
from tests.core.packings import pack, row_major
from tests.core.shadow import naive_error, naive_token_error

PAGES, TOKENS, HEADS, SIZE = 5, 16, 2, 8


def cache(layers: int, seed: int) -> tuple[PagedKV, PackedPages]:
    generator = torch.Generator().manual_seed(seed)
    sides = ([torch.randn(PAGES, TOKENS, HEADS, SIZE, generator=generator) for _ in range(layers)] for _ in range(2))
    return pack(*sides, torch.float32, row_major(TOKENS, HEADS * SIZE, HEADS * SIZE))


def answer(comparer: PageComparer, asked: Inquiry) -> Verdict:
    return comparer.finish(comparer.begin(asked))


def inquiry(pairs: list[tuple[int, int, int]]) -> Inquiry:
    return Inquiry(3, [], *np.array(pairs, np.int64).T)


@pytest.mark.parametrize("across_layers", ["rms", "max"])
def test_errors_and_cosines_are_those_of_the_definition(across_layers: str) -> None:
    plain = {0: cache(3, 0), 2: cache(2, 1)}
    comparer = PageComparer(across_layers, {number: packed for number, (_, packed) in plain.items()})  # type: ignore[arg-type]
    asked = [(2, 1, 4), (0, 1, 2), (0, 3, 3), (2, 2, 1)]
    verdict = answer(comparer, inquiry(asked))
    assert verdict.step == 3 and verdict.fault is None
    verdict.check(len(asked))
    for pair, (group, own, other) in enumerate(asked):
        sides = [
            tuple(np.stack([layer[page].double().flatten().numpy() for layer in layers]) for page in (own, other))
            for layers in (plain[group][0].keys, plain[group][0].values)
        ]
        for name, (block, served) in zip(("key", "value"), sides, strict=True):
            error = naive_error(block, served, across_layers)
            assert getattr(verdict, f"{name}_error")[pair] == pytest.approx(error, rel=1e-4, abs=1e-6)
            norms = np.linalg.norm(block, axis=1) * np.linalg.norm(served, axis=1)
            cosine = np.mean((block * served).sum(1) / norms)
            assert getattr(verdict, f"{name}_cosine")[pair] == pytest.approx(cosine, abs=1e-5)
        token = max(naive_token_error(*side, TOKENS, across_layers) for side in sides)
        assert verdict.token_error[pair] == pytest.approx(token, rel=1e-4, abs=1e-6)


def test_what_is_no_number_is_measured_as_none() -> None:
    _, packed = cache(2, 0)
    for layer in packed.layers:
        layer[4] = torch.nan
    found = answer(PageComparer("rms", {0: packed}), inquiry([(0, 1, 4), (0, 4, 1), (0, 1, 1)]))
    for name in (*ERRORS, *COSINES):
        assert not np.isfinite(getattr(found, name)[:2]).any() or name in COSINES, name
    assert [getattr(found, name)[2] for name in ERRORS] == [0, 0, 0]


def test_own_norms_are_proposed_by_the_pages_they_were_measured_for() -> None:
    _, packed = cache(2, 0)
    for layer in packed.layers:
        layer[4] = 1.5 * layer[1]
    norms = OwnNorms(layers=2)
    comparer = PageComparer("rms", {0: packed}, norms)
    verdict = answer(comparer, inquiry([(0, 4, 1), (0, 2, 3)]))
    assert verdict.key_error[0] == pytest.approx(0, abs=1e-3) and verdict.key_cosine[0] == pytest.approx(1)
    assert torch.allclose(norms._proposed[3][0, 4, 1], torch.tensor(1.5))
    norms.enabled = False
    assert answer(comparer, inquiry([(0, 4, 1)])).key_error[0] == pytest.approx(1 / 3, rel=1e-4)
