"""How tokens lie in a page is read off, whatever the backend does; what cannot be read off is refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from torch import Tensor

from jointkv.errors import LayoutError
from jointkv.vllm_plugin.engine.pages import packed_pages
from tests.vllm_plugin.engines import Engine, engine, near_prefix

PAGES, HEADS, TOKENS, SIZE = 4, 2, 8, 16
FORMATS = {"auto": torch.float32, "fp8": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}


class Layer:
    """Stands in for an attention layer whose backend shuffles the numbers of a page."""

    num_kv_heads, head_size, head_size_v, dtype = HEADS, SIZE, SIZE, torch.float32

    def __init__(self, kv_cache_dtype: str = "auto", seed: int = 0, padding: int = 0) -> None:
        self.kv_cache_dtype, self.format = kv_cache_dtype, FORMATS[kv_cache_dtype]
        self.used = 2 * HEADS * TOKENS * SIZE
        self.order = torch.randperm(self.used, generator=torch.Generator().manual_seed(seed))
        stored = torch.uint8 if self.format.itemsize == 1 else self.format
        self.kv_cache = torch.zeros(PAGES, self.used + padding, dtype=stored)
        self.impl = SimpleNamespace(do_kv_cache_update=self.write)

    def write(self, layer: Any, key: Tensor, value: Tensor, cache: Tensor, slots: Tensor) -> None:
        """K twice as large as V, as with scales of their own."""
        page = torch.cat((2 * key.flatten(), value.flatten()))[self.order].to(self.format)
        cache[int(slots[0]) // TOKENS, : self.used] = page if self.format.itemsize > 1 else page.view(torch.uint8)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_shuffled_page_is_understood(kind: str) -> None:
    layers = [Layer(kind), Layer(kind)]
    pages = packed_pages(layers, PAGES, TOKENS)
    keys = layers[0].order < layers[0].used // 2
    tokens = layers[0].order % (layers[0].used // 2) // (HEADS * SIZE)
    assert torch.equal(pages.is_value, ~keys) and torch.equal(pages.token_of, tokens)
    assert pages.layers[0].dtype == FORMATS[kind]
    assert not any(layer.kv_cache.any() for layer in layers), "the page that was probed must be as it was"


def test_heads_that_are_told_first_and_lie_last() -> None:
    """As in vLLM's default for CUDA: the tensor's axes are not in the order of memory."""
    layer = Layer()
    layer.kv_cache = torch.zeros(PAGES, TOKENS, HEADS, 2 * SIZE).transpose(1, 2)

    def write(layer: Any, key: Tensor, value: Tensor, cache: Tensor, slots: Tensor) -> None:
        cache[int(slots[0]) // TOKENS] = torch.cat((key, value), -1).transpose(0, 1)

    layer.impl = SimpleNamespace(do_kv_cache_update=write)
    pages = packed_pages([layer], PAGES, TOKENS)
    written = torch.randn(2, TOKENS, HEADS, SIZE)
    write(layer, *written, layer.kv_cache, torch.tensor([2 * TOKENS]))
    for found, expected in zip(pages.vectors(torch.tensor([2])), written, strict=True):
        assert torch.equal(found.flatten(), expected.flatten())


@pytest.mark.parametrize(
    ("layers", "reason"),
    [
        ([Layer(padding=4)], "belong to no token"),
        ([Layer(seed=0), Layer(seed=1)], "different orders"),
    ],
)
def test_what_was_never_seen_is_refused(layers: list[Layer], reason: str) -> None:
    with pytest.raises(LayoutError, match=reason):
        packed_pages(layers, PAGES, TOKENS)


def test_a_cache_of_another_shape_is_refused() -> None:
    layer = Layer()
    with pytest.raises(LayoutError, match="not one tensor of 5 pages"):
        packed_pages([layer], PAGES + 1, TOKENS)
    layer.kv_cache = layer.kv_cache.t().contiguous().t()
    with pytest.raises(LayoutError, match="not contiguous"):
        packed_pages([layer], PAGES, TOKENS)


@pytest.mark.slow
@pytest.mark.skipif(not torch.cpu._is_avx512_supported(), reason="vLLM's fp8 KV cache on a CPU needs AVX-512")
def test_fp8_pages_are_fused_too(calm: Path) -> None:
    """Half the bytes a page, times the pages that fusion frees."""

    def serve(served: Engine) -> int:
        names = [served.submit(prompt, 4) for prompt in near_prefix(8, shared=640)]
        served.run_until_decoding()
        pages = served.pages_in_use
        served.finish()
        assert all(len(served.outputs[name]) == 4 for name in names)
        served.assert_drained()
        return pages

    with engine(calm, kv_cache_dtype="fp8") as stock:
        expected = serve(stock)
    with engine(calm, kv_cache_dtype="fp8", fusion={}) as fused:
        assert serve(fused) < 0.5 * expected
        assert fused.statistics["faults"] == 0
