"""What stands around the attention of a GPU in an engine, without a GPU: the kernels run in Triton's interpreter."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import triton
from torch import Tensor
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends import triton_attn
from vllm.v1.kv_cache_interface import KVCacheLayout

from jointkv.attention import reference
from jointkv.core.plan import BlockRef
from jointkv.vllm_plugin.attention.gpu import JointGPUAttention, JointGPUBuilder, JointGPUMetadata
from jointkv.vllm_plugin.attention.install import share_reading
from jointkv.vllm_plugin.attention.reading import SharedReading
from jointkv.vllm_plugin.engine.runners.base import Remap
from jointkv.vllm_plugin.engine.runners.v1 import V1Tables
from jointkv.vllm_plugin.messages import Inquiry
from jointkv.vllm_plugin.settings import PluginSettings

HEADS, KV_HEADS, SIZE, TOKENS, PAGES, LAYERS = 4, 2, 32, 16, 12, 2
TABLES = [[1, 2, 3, 0], [1, 2, 4, 5], [1, 2, 6, 0], [7, 8, 0, 0]]
LENGTHS, ASKED = [40, 64, 33, 30], [1, 1, 17, 30]
"""Two that decode behind shared pages, a chunk of a prompt behind them, and a prompt of its own."""


@contextmanager
def told() -> Iterator[None]:
    """Triton imports some of itself only when a kernel runs."""
    with pytest.MonkeyPatch.context() as patched:
        if not torch.cuda.is_available():
            patched.setenv("TRITON_INTERPRET", "1")
        yield


with told():
    from triton.language import standard

    if not torch.cuda.is_available() and isinstance(standard.max, triton.JITFunction):  # vLLM was there before
        for module in (standard, triton.language):
            importlib.reload(module)
    import jointkv.attention.paged_triton  # noqa: F401


def layer_of(order: KVCacheLayout = KVCacheLayout.LBHNC, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """What vLLM's attention layer has for its backend: pages `[pages, h, t, 2d]` that lie in `order`."""
    shape = (PAGES, KV_HEADS, TOKENS, 2 * SIZE)
    physical = order.layer_view_order
    cache = torch.zeros([shape[axis] for axis in physical], dtype=dtype)
    cache = cache.permute([physical.index(axis) for axis in range(4)])
    impl = JointGPUAttention(
        **{
            **dict(num_heads=HEADS, head_size=SIZE, scale=0.2, num_kv_heads=KV_HEADS, alibi_slopes=None),
            **dict(sliding_window=None, kv_cache_dtype="auto"),
            **options,
        }
    )
    return SimpleNamespace(impl=impl, kv_cache=cache, dtype=dtype, use_mm_prefix=False, _k_scale=None, _v_scale=None)


class Group:
    """Layers of a KV-cache group with what stands around them in an engine, and a step of it."""

    def __init__(self, layers: list[Any], own_norms: bool = False, ubatches: bool = False) -> None:
        names = [f"layer {place}" for place in range(len(layers))]
        spec = SimpleNamespace(block_size=TOKENS)
        config = SimpleNamespace(kv_cache_groups=[SimpleNamespace(layer_names=names, kv_cache_spec=spec)])
        self.tables = torch.tensor(TABLES, dtype=torch.int32)
        self.lengths, self.asked = torch.tensor(LENGTHS, dtype=torch.int32), torch.tensor(ASKED, dtype=torch.int32)
        buffer = SimpleNamespace(np=self.tables.numpy())
        self.batch = SimpleNamespace(
            req_ids=[f"request {row}" for row in range(len(TABLES))],
            block_table=[SimpleNamespace(block_table=buffer)],
        )
        self.layers = layers
        self.compilation_config = SimpleNamespace(static_forward_context=dict(zip(names, layers, strict=True)))
        runner = SimpleNamespace(
            input_batch=self.batch,
            kv_cache_config=config,
            max_model_len=64,
            vllm_config=SimpleNamespace(max_concurrent_batches=1),
            parallel_config=SimpleNamespace(use_ubatching=ubatches),
            compilation_config=self.compilation_config,
        )
        settings = PluginSettings(attention="shared", own_norms=own_norms)
        readings, self.norms = share_reading(V1Tables(runner), config, [0], settings)
        self.reading: SharedReading = readings[0]
        torch.manual_seed(0)
        for layer in layers:
            assert not layer.kv_cache.any()
            layer.kv_cache.copy_(torch.randn(layer.kv_cache.shape))

    def common(self) -> CommonAttentionMetadata:
        starts = torch.nn.functional.pad(self.asked.cumsum(0), (1, 0)).int()
        return CommonAttentionMetadata(
            query_start_loc=starts,
            query_start_loc_cpu=starts,
            seq_lens=torch.zeros_like(self.lengths),  # on the device: not to be asked
            seq_lens_cpu_upper_bound=self.lengths,
            num_reqs=len(self.tables),
            num_actual_tokens=int(self.asked.sum()),
            max_query_len=int(self.asked.max()),
            max_seq_len=int(self.lengths.max()),
            block_table_tensor=torch.zeros_like(self.tables),
            slot_mapping=torch.zeros(0, dtype=torch.long),
        )

    def metadata(self) -> JointGPUMetadata:
        """As the builder makes it."""
        common = self.common()
        builder = object.__new__(JointGPUBuilder)
        builder.layer_names = ["layer 0"]
        builder.vllm_config = SimpleNamespace(compilation_config=self.compilation_config)
        device = {
            "seq_lens": self.lengths,
            "block_table": self.tables,
            "causal": True,
            "max_seq_len": common.max_seq_len,
        }
        stock = triton_attn.TritonAttentionMetadata(
            **device, num_actual_tokens=common.num_actual_tokens, max_query_len=common.max_query_len,
            query_start_loc=common.query_start_loc, slot_mapping=common.slot_mapping, seq_threshold_3D=0,
            num_par_softmax_segments=0, softmax_segm_output=None, softmax_segm_max=None, softmax_segm_expsum=None,
        )  # fmt: skip
        with patch.object(triton_attn.TritonAttentionMetadataBuilder, "build", return_value=stock):
            return builder.build(0, common)

    def forward(self, place: int, query: Tensor, metadata: JointGPUMetadata) -> Tensor:
        """vLLM's call; the rows beyond the step's are padding."""
        layer, padded = self.layers[place], torch.nn.functional.pad(query, (0, 0, 0, 0, 0, 3))
        output = torch.full_like(padded, 7.0)
        found = layer.impl.forward(layer, padded, None, None, layer.kv_cache, metadata, output=output)
        assert found is output and (output[len(query) :] == 7).all()
        return output[: len(query)]

    def expected(self, place: int, query: Tensor, factors: Tensor | None = None) -> Tensor:
        """By the definition in float64, with `factors [2, rows, slots]`."""
        scales = torch.ones(2, *self.tables.shape) if factors is None else factors
        tables = [
            [
                BlockRef(int(row[slot]), *scales[:, number, slot].tolist(), count=min(TOKENS, length - slot * TOKENS))
                for slot in range(-(-length // TOKENS))
            ]
            for number, (row, length) in enumerate(zip(self.tables, self.lengths.tolist(), strict=True))
        ]
        sides = self.layers[place].kv_cache.double().transpose(1, 2).split(SIZE, dim=3)
        return reference.paged_attention(query.double(), self.asked.tolist(), *sides, tables, scale=0.2)[0]

    def give_factors(self) -> Tensor:
        """The second block of two requests has factors from now on: all of them, `[2, layers, rows, slots]`."""
        factors = torch.rand(2, LAYERS, 2) + 0.5
        self.norms.propose(Inquiry(1, [], *np.array([[0, 0], [8, 9], [2, 2]])), factors)
        self.norms.commit([Remap(f"request {row}", 0, 1, page=2, own=8 + row, step=1) for row in range(2)])
        table = torch.ones(2, LAYERS, *self.tables.shape)
        table[:, :, :2, 1] = factors.permute(2, 1, 0)
        return table


def query_of(group: Group) -> Tensor:
    return torch.randn(int(group.asked.sum()), HEADS, SIZE)


def close(found: Tensor, truth: Tensor, tolerance: float = 1e-5) -> None:
    assert float((found.double() - truth).norm() / truth.norm()) < tolerance
