"""The compiled attention is the definition in float64, whatever is shared; what it was not written for is refused."""

from __future__ import annotations

import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jointkv.attention.paged import paged_attention
from jointkv.system import native
from tests.attention.paged_cases import (
    TOLERANCE,
    batches,
    compare,
    expected,
    fill,
    long_batch,
    relative_error,
    repeating_batch,
    turn,
)

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")


def attend(batch, pages, query, threads=1, share=True, scale=None):
    """Attention of the kernel, and the definition's answer: outputs and log-sum-exps."""
    work = batch.group(heads_per_kv_head=query.shape[1] // pages.num_heads, threads=threads, share=share)
    torch.set_num_threads(threads)
    found = paged_attention(query, pages, work, k_scale=batch.k_scale, v_scale=batch.v_scale, scale=scale, turn=turn)
    torch.set_num_threads(1)
    return found, expected(query, pages, batch, scale)


@needs_compiler
@settings(max_examples=250)
@given(
    case=batches(),
    order=st.sampled_from(["rows", "columns"]),
    dtype=st.sampled_from(list(TOLERANCE)),
    heads=st.integers(1, 3),
    group=st.sampled_from([1, 2, 3, 4, 5, 7, 8, 13]),
    sizes=st.tuples(*2 * [st.sampled_from([16, 32, 48, 64, 80, 128])]),
    threads=st.integers(1, 3),
    share=st.booleans(),
    scale=st.none() | st.floats(0.05, 1.0),
    seed=st.integers(0, 2**20),
)
def test_the_kernel_is_the_definition(case, order, dtype, heads, group, sizes, threads, share, scale, seed):
    batch, num_pages = case
    pages = fill(batch, num_pages, heads, sizes, dtype, order, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    shape = (int(batch.query_lengths.sum()), heads * group, sizes[0])
    query = torch.randn(shape, generator=generator).to(dtype)
    found, truth = attend(batch, pages, query, threads, share, scale)
    assert found[0].dtype == dtype and found[0].shape == (*shape[:2], sizes[1])
    compare(found, truth, dtype)


@needs_compiler
@settings(max_examples=60)
@given(case=batches(most_rows=4), heads=st.integers(1, 2), group=st.integers(1, 4), sizes=st.sampled_from([32, 96]))
def test_pages_by_pairs(case, heads, group, sizes):
    batch, num_pages = case
    batch.block_size = 32
    batch.first = batch.count = None
    pages = fill(batch, num_pages, heads, (sizes, sizes), torch.bfloat16, "pairs", 0)
    query = torch.randn(int(batch.query_lengths.sum()), heads * group, sizes).bfloat16()
    compare(*attend(batch, pages, query), torch.bfloat16)


@needs_compiler
@pytest.mark.parametrize("order", ["rows", "columns"])
@pytest.mark.parametrize("queries", [1, 40])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_long_contexts_of_many_sequences(order, queries, dtype):
    """Many tiles, many blocks of rows, and logits that grow along the way."""
    batch, num_pages = long_batch(queries=queries)
    pages = fill(batch, num_pages, 2, (64, 64), dtype, order, 0)
    growing = torch.linspace(0.1, 3, num_pages).to(dtype)[:, None, None, None]
    pages.keys.mul_(growing)
    query = torch.randn(int(batch.query_lengths.sum()), 6, 64).to(dtype)
    compare(*attend(batch, pages, query, threads=2), dtype)


@needs_compiler
@pytest.mark.parametrize("threads", [1, 2])
def test_sharing_does_not_change_the_answer_beyond_rounding(threads):
    batch, num_pages = long_batch()
    pages = fill(batch, num_pages, 2, (64, 64), torch.float32, "columns", 0)
    query = torch.randn(24, 6, 64)
    shared, _ = attend(batch, pages, query, threads)
    alone, _ = attend(batch, pages, query, threads, share=False)
    torch.testing.assert_close(shared, alone, rtol=1e-5, atol=1e-6)


@needs_compiler
def test_decoding_into_the_last_block():
    batch, num_pages = long_batch(rows=3)
    batch.lengths = torch.tensor([625, 626, 635])
    work = batch.group(heads_per_kv_head=3)
    for _ in range(5):
        batch.lengths = batch.lengths + 1
        work.grow(batch.lengths)
        pages = fill(batch, num_pages, 2, (64, 64), torch.float32, "rows", 0)
        query = torch.randn(3, 6, 64)
        compare(paged_attention(query, pages, work), expected(query, pages, batch), torch.float32)


@needs_compiler
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("shifted", [False, True])
def test_a_page_that_one_sequence_reads_several_times_counts_as_often(scaled, shifted):
    batch = repeating_batch(scaled, shifted)
    pages = fill(batch, 10, 2, (32, 32), torch.float32, "columns", 0)
    compare(*attend(batch, pages, torch.randn(2, 6, 32)), torch.float32)


@needs_compiler
def test_extreme_logits():
    """Logits of thousands, and a token that outweighs all others, overflow nothing."""
    batch, num_pages = long_batch(rows=2)
    pages = fill(batch, num_pages, 1, (64, 64), torch.float32, "columns", 0)
    for factor in (100.0, 1e-3):
        query = factor * torch.randn(2, 3, 64)
        found, truth = attend(batch, pages, query)
        assert relative_error(found[0], truth[0]) < 1e-4
        torch.testing.assert_close(found[1].double(), truth[1].double(), rtol=1e-5, atol=1e-4)


@needs_compiler
def test_what_is_no_number_stays_with_its_sequence():
    batch, num_pages = long_batch(rows=4)
    pages = fill(batch, num_pages, 2, (64, 64), torch.float32, "columns", 0)
    pages.values[batch.tables[2, 33], 3, 1] = torch.nan
    pages.keys[batch.tables[1, 33], 3, 0] = torch.nan
    found, _ = paged_attention(torch.randn(4, 6, 64), pages, batch.group(heads_per_kv_head=3))
    broken = found.isnan().any(-1)
    assert broken[1, :3].all() and broken[2, 3:].all() and broken.sum() == 6


@needs_compiler
@pytest.mark.parametrize("flags", ["-march=x86-64"])
def test_a_plain_processor_will_do(flags, fresh, monkeypatch, tmp_path):
    """The same source without AVX, FMA and F16C."""
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("flags of another processor")
    script = tmp_path / "plain-cc"
    script.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo {flags} && exit\nexec cc "$@" {flags}\n')
    script.chmod(0o755)
    monkeypatch.setenv("CC", str(script))
    batch, num_pages = long_batch(rows=3, slots=10, shared=5)
    for dtype in TOLERANCE:
        for order in ("rows", "columns"):
            pages = fill(batch, num_pages, 2, (64, 64), dtype, order, 0)
            compare(*attend(batch, pages, torch.randn(3, 6, 64).to(dtype)), dtype)


@needs_compiler
def test_a_header_that_changes_makes_another_library(tmp_path, monkeypatch):
    """The library's name once came from the C file alone, and a changed header would not have been compiled."""
    monkeypatch.setenv("JOINTKV_CACHE_DIR", str(tmp_path / "cache"))
    source, header = tmp_path / "answer.c", tmp_path / "answer.h"
    source.write_text('#include "answer.h"\nint answer(void) { return ANSWER; }\n')
    for answer in (1, 2):
        header.write_text(f"#define ANSWER {answer}\n")
        assert native.load(source).answer() == answer
