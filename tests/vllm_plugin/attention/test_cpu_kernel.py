"""Our attention on vLLM's own CPU pages is vLLM's attention, decode and prefill; and its page order is confirmed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from torch import Tensor

from jointkv.attention.grouping import group_pages
from jointkv.attention.layouts import ENGINE_ORDERS, LayerPages
from jointkv.attention.paged import paged_attention
from jointkv.errors import LayoutError

PATHS = [("vec", 32), ("vec", 64), ("vec16", 16), ("vec16", 48)]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
"""vLLM's answer is rounded as well."""


class Pool:
    """A layer's KV cache as vLLM's CPU backend keeps it."""

    def __init__(self, isa: str, block_size: int, heads: int, size: int, dtype: torch.dtype, pages: int = 24) -> None:
        from vllm import _custom_ops as ops

        self.ops, self.isa, self.block_size, self.heads, self.size = ops, isa, block_size, heads, size
        self.cache = torch.zeros(pages, heads, block_size, 2 * size, dtype=dtype)
        self.sides = self.cache.view(pages, heads, 2 * block_size, size).chunk(2, dim=2)

    def write(self, key: Tensor, value: Tensor, slots: Tensor) -> None:
        self.ops.cpu_attn_reshape_and_cache(key, value, *self.sides, slots, self.isa)

    def fill(self) -> None:
        tokens = len(self.cache) * self.block_size
        key, value = torch.randn(2, tokens, self.heads, self.size).to(self.cache.dtype)
        self.write(key, value, torch.arange(tokens))

    def attend(self, query: Tensor, tables: Tensor, lengths: Tensor, query_lengths: Tensor) -> Tensor:
        """By vLLM's op."""
        starts = torch.cat((torch.zeros(1, dtype=torch.long), query_lengths.cumsum(0))).int()
        known: dict[str, Any] = {"query_start_loc": starts, "seq_lens": lengths.int(), "causal": True}
        plan = self.ops.cpu_attn_get_scheduler_metadata(
            num_reqs=len(lengths), num_heads=query.shape[1], num_kv_heads=self.heads, head_dim=self.size,
            dtype=query.dtype, sliding_window_size=-1, isa=self.isa, enable_kv_split=True, **known,
        )  # fmt: skip
        output = torch.empty_like(query)
        self.ops.cpu_attention_with_kv_cache(
            query=query, key_cache=self.sides[0], value_cache=self.sides[1], output=output, scale=self.size**-0.5,
            alibi_slopes=None, sliding_window=-1, block_table=tables.int(), softcap=0.0, scheduler_metadata=plan,
            s_aux=None, **known,
        )  # fmt: skip
        return output


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("isa", "block_size"), PATHS)
@pytest.mark.parametrize("threads", [1, 2])
def test_the_same_answer_on_the_same_pages(isa: str, block_size: int, dtype: torch.dtype, threads: int) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    pool = Pool(isa, block_size, heads=2, size=64, dtype=dtype)
    pool.fill()
    pages = LayerPages.of_engine(pool.cache, isa)
    tables = torch.stack([torch.randperm(len(pool.cache))[:6] for _ in range(5)])
    tables[:3, :4] = tables[0, :4]
    lengths = torch.tensor([5 * block_size + 3, 5 * block_size, 6 * block_size, 1, 40])
    for query_lengths in (torch.ones(5, dtype=torch.long), torch.tensor([1, 20, 2 * block_size + 1, 1, 40])):
        for group in (1, 3, 4):
            query = torch.randn(int(query_lengths.sum()), 2 * group, 64).to(dtype)
            work = group_pages(
                tables.int(), lengths.int(), block_size, query_lengths=query_lengths, heads_per_kv_head=group
            )
            found, _ = paged_attention(query, pages, work)
            truth = pool.attend(query, tables, lengths, query_lengths).float()
            apart = torch.linalg.vector_norm(found.float() - truth, dim=-1) / torch.linalg.vector_norm(truth, dim=-1)
            assert float(apart.max()) < TOLERANCE[dtype]
    torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("isa", "block_size"), PATHS)
def test_the_order_is_what_vllm_writes(isa: str, block_size: int, dtype: torch.dtype) -> None:
    pool = Pool(isa, block_size, heads=2, size=96, dtype=dtype)
    LayerPages.of_engine(pool.cache, isa).confirm(pool.write, 3)
    assert not pool.cache.any()
    by_rows = pool.cache.view(len(pool.cache), 2, 2, block_size, 96).transpose(2, 3)
    rows = LayerPages.of_pool(by_rows[:, :, :, 0].transpose(1, 2), by_rows[:, :, :, 1].transpose(1, 2))
    with pytest.raises(LayoutError, match="never seen"):
        rows.confirm(pool.write, 3)


def test_every_path_of_this_machine_is_known() -> None:
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    for dtype in TOLERANCE:
        for block_size in (16, 32):
            for size in (64, 80, 128):
                assert _get_attn_isa(dtype, block_size, size) in ENGINE_ORDERS
