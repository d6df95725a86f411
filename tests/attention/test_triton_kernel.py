"""The Triton kernels are the definition in float64, on a GPU or in the interpreter; what they cannot do is refused.

The interpreter takes what the compiler refuses, so without a GPU the kernels are compiled for one as well.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.attention.paged_cases import (
    REFUSED,
    SCALES,
    TOLERANCE,
    Batch,
    batches,
    compare,
    expected,
    fill,
    long_batch,
    relative_error,
    repeating_batch,
    small_case,
    turn,
)

pytest.importorskip("triton", reason="Triton is not installed", exc_type=ImportError)

from jointkv.attention import gpu, paged, paged_triton
from jointkv.attention.layouts import LayerPages
from jointkv.errors import LayoutError, NativeUnavailable

paged_attention = functools.partial(paged.paged_attention, kernel=gpu.attend)

pytestmark = pytest.mark.usefixtures("interpreter")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

HALVES = [torch.float16, torch.bfloat16]


def there(pages: LayerPages) -> LayerPages:
    return LayerPages(pages.keys.to(DEVICE), pages.values.to(DEVICE), pages.order)


def attend(batch: Batch, pages: LayerPages, query: Tensor, scale: float | None = None, **options: Any):
    """Attention of the kernels, and the definition's answer: outputs and log-sum-exps."""
    work = batch.group(heads_per_kv_head=query.shape[1] // pages.num_heads, **options)
    work.check_integrity()
    scales = {"k_scale": batch.k_scale, "v_scale": batch.v_scale}
    found = paged_attention(query.to(DEVICE), there(pages), work, scale=scale, turn=turn, **scales)
    return tuple(part.cpu() for part in found), expected(query, pages, batch, scale)


@settings(max_examples=12)
@given(
    case=batches(most_rows=3, most_slots=3),
    dtype=st.sampled_from(list(TOLERANCE)),
    group=st.sampled_from([1, 3, 4]),
    sizes=st.tuples(*2 * [st.sampled_from([16, 32, 48])]),
    threads=st.integers(1, 2),
    share=st.booleans(),
    scale=st.none() | st.floats(0.05, 0.5),
    seed=st.integers(0, 2**20),
)
def test_the_kernels_are_the_definition(case, dtype, group, sizes, threads, share, scale, seed):
    batch, num_pages = case
    pages = fill(batch, num_pages, 2, sizes, dtype, "rows", seed)
    shape = (int(batch.query_lengths.sum()), 2 * group, sizes[0])
    query = torch.randn(shape, generator=torch.Generator().manual_seed(seed + 1)).to(dtype)
    found, truth = attend(batch, pages, query, scale, threads=threads, share=share)
    assert found[0].dtype == dtype and found[0].shape == (*shape[:2], sizes[1])
    compare(found, truth, dtype)


@pytest.mark.parametrize(("block_size", "dtype"), [(16, torch.bfloat16), (32, torch.float16)], ids=str)
@pytest.mark.parametrize("size", [64, 96, 128, 256])
def test_head_sizes_and_pages_of_models(size, block_size, dtype):
    """Scales, a shared page, one sequence that decodes and one whose last query has begun a block."""
    batch, _ = small_case()
    batch.block_size = block_size
    batch.lengths = torch.tensor([40, 33])
    batch.query_lengths = torch.tensor([1, 5])
    batch.k_scale, batch.v_scale = torch.rand(2, 2, 3) + 0.5
    pages = fill(batch, 5, 1, (size, size), dtype, "rows", 0)
    compare(*attend(batch, pages, torch.randn(6, 3, size).to(dtype)), dtype)


@pytest.mark.parametrize("queries", [1, 40])
def test_many_tiles_of_tokens_and_of_queries(queries):
    """Logits grow along the way; an item of 40 queries of 3 heads is cut."""
    batch, num_pages = long_batch(rows=2, slots=12, shared=6, queries=queries)
    pages = fill(batch, num_pages, 1, (16, 16), torch.float32, "rows", 0)
    pages.keys.mul_(torch.linspace(0.1, 3, num_pages)[:, None, None, None])
    compare(*attend(batch, pages, torch.randn(2 * queries, 3, 16), threads=2), torch.float32)


def test_sharing_does_not_change_the_answer_beyond_rounding():
    batch, num_pages = long_batch(rows=3, slots=8, shared=5)
    pages = fill(batch, num_pages, 1, (32, 32), torch.float32, "rows", 0)
    query = torch.randn(3, 2, 32)
    shared, _ = attend(batch, pages, query)
    alone, _ = attend(batch, pages, query, share=False)
    torch.testing.assert_close(shared, alone, rtol=1e-5, atol=1e-6)


def test_decoding_into_the_last_block():
    batch, num_pages = long_batch(rows=2, slots=4, shared=2)
    batch.lengths = torch.tensor([50, 61])
    work = batch.group(heads_per_kv_head=2)
    for _ in range(3):
        pages = fill(batch, num_pages, 1, (16, 16), torch.float32, "rows", 0)
        query = torch.randn(2, 2, 16)
        found = paged_attention(query.to(DEVICE), there(pages), work)
        compare(tuple(part.cpu() for part in found), expected(query, pages, batch), torch.float32)
        batch.lengths = batch.lengths + 1
        work.grow(batch.lengths)


def test_tokens_outside_a_range_are_not_read():
    batch, _ = small_case()
    batch.first, batch.count = torch.tensor([[[2, 0, 5], [2, 1, 0]], [[10, 16, 9], [10, 12, 16]]])
    batch.lengths = torch.tensor([30, 35])
    pages = fill(batch, 5, 2, (16, 32), torch.float32, "rows", 0)
    compare(*attend(batch, pages, torch.randn(2, 4, 16)), torch.float32)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("shifted", [False, True])
def test_a_page_that_one_sequence_reads_several_times_counts_as_often(scaled, shifted):
    batch = repeating_batch(scaled, shifted)
    pages = fill(batch, 10, 1, (32, 32), torch.float32, "rows", 0)
    compare(*attend(batch, pages, torch.randn(2, 3, 32)), torch.float32)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_queries_that_are_turned_lose_no_digits(dtype):
    """Logits of tens tell every digit of a query."""
    batch, pages = small_case(dtype=dtype)
    batch.shift = torch.tensor([[3, 3, 3], [-40, -40, -40]])
    query = torch.randn(2, 4, 16).to(dtype)
    (_, found), (_, truth) = attend(batch, pages, query, scale=10.0)
    torch.testing.assert_close(found.double(), truth.double(), rtol=0, atol=2e-2)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("factor", [1e-7, 1.0, 1e5])
def test_norms_may_leave_the_range_of_the_pages(factor, dtype):
    batch, pages = small_case(dtype=dtype)
    batch.v_scale = factor * (torch.rand(2, 3) + 0.5)
    pages.values.mul_(min(1e4, 1 / factor))
    compare(*attend(batch, pages, torch.randn(2, 4, 16).to(dtype)), dtype)


def test_extreme_logits():
    """Logits of thousands, and a token that outweighs all others, overflow nothing."""
    batch, pages = small_case()
    for factor in (100.0, 1e-3):
        found, truth = attend(batch, pages, factor * torch.randn(2, 4, 16))
        assert relative_error(found[0], truth[0]) < 1e-4
        torch.testing.assert_close(found[1].double(), truth[1].double(), rtol=1e-5, atol=1e-4)


def test_pages_and_queries_with_gaps_between_them():
    """K and V as one tensor, of which every other head is a layer's; queries cut out of a projection."""
    batch, pages = small_case()
    kept = torch.full((5, 2, 16, 4, 32), torch.nan)
    kept[:, 0, :, ::2, :16], kept[:, 1, :, ::2] = pages.keys, pages.values
    kept = kept.to(DEVICE)
    apart = LayerPages.of_pool(kept[:, 0, :, ::2, :16], kept[:, 1, :, ::2])
    query = torch.randn(2, 8, 16)[:, 2:6]
    assert not query.is_contiguous()
    found = paged_attention(query.to(DEVICE), apart, batch.group(heads_per_kv_head=2))
    compare(tuple(part.cpu() for part in found), expected(query, pages, batch), torch.float32)


def test_scales_that_change_are_seen_and_checked_again():
    batch, pages = small_case()
    query, work = torch.randn(2, 4, 16), batch.group(heads_per_kv_head=2)
    batch.k_scale = torch.ones(2, 3)
    table = torch.ones(2, 3, device=DEVICE)
    for factor in (1.0, 2.0, 0.5):
        table.mul_(factor)
        batch.k_scale.mul_(factor)
        found = paged_attention(query.to(DEVICE), there(pages), work, k_scale=table)
        compare(tuple(part.cpu() for part in found), expected(query, pages, batch), torch.float32)
    table[1, 1] = 0
    with pytest.raises(LayoutError, match="positive"):
        paged_attention(query.to(DEVICE), there(pages), work, k_scale=table)


@pytest.mark.parametrize("changes", REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused(changes):
    batch, pages = small_case()
    arguments = {"query": torch.zeros(2, 4, 16), "k_scale": SCALES, "v_scale": SCALES, **changes}
    query = arguments.pop("query").to(DEVICE)
    with pytest.raises(LayoutError):
        paged_attention(query, there(pages), batch.group(heads_per_kv_head=2), **arguments)


def test_pages_they_were_not_written_for_are_refused(monkeypatch):
    batch, pages = small_case()
    query, work = torch.zeros(2, 4, 16), batch.group(heads_per_kv_head=2)
    with pytest.raises(LayoutError, match="by columns"):
        paged_attention(query, small_case("columns")[1], work)
    by_column = torch.zeros(5, 2, 16, 16, device=DEVICE).permute(0, 3, 1, 2)
    with pytest.raises(LayoutError, match="strides"):
        paged_attention(query.to(DEVICE), LayerPages(by_column, there(pages).values, "rows"), work)
    for sizes in ((272, 16), (16, 512)):
        with pytest.raises(LayoutError, match="head size"):
            large = there(fill(batch, 5, 2, sizes, torch.float32, "rows", 0))
            paged_attention(torch.zeros(2, 4, sizes[0], device=DEVICE), large, work)
    with pytest.raises(LayoutError, match=r"queries of torch\.float16"):
        paged_attention(query.half().to(DEVICE), there(pages), work)
    with pytest.raises(LayoutError, match="queries on meta"):
        paged_attention(query.to("meta"), there(pages), work)
    batch.shift = torch.tensor([[0, 3, 0], [0, 0, 0]])
    with pytest.raises(LayoutError, match="rotary"):
        paged_attention(query.to(DEVICE), there(pages), batch.group(heads_per_kv_head=2))
    monkeypatch.setattr(paged_triton, "INTERPRETED", paged_triton.tl.constexpr(False))
    with pytest.raises(LayoutError, match="on cpu are not supported"):
        paged_attention(query, pages, work)


def test_without_triton_it_says_what_to_install(monkeypatch):
    batch, pages = small_case()
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(NativeUnavailable, match=r"jointkv\[gpu\]"):
        paged_attention(torch.zeros(2, 4, 16), pages, batch.group(heads_per_kv_head=2))


@pytest.mark.skipif(DEVICE == "cuda", reason="the other tests compile the kernels")
@pytest.mark.slow
def test_the_compiler_takes_what_the_interpreter_took(tmp_path):
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    script = Path(__file__).with_name("compile_kernels.py")
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
