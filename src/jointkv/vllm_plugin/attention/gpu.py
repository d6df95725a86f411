"""vLLM's Triton attention, with pages that several requests read taken once for all of them. Never run on a GPU so far.

Registered as `CUSTOM` while a worker of this plugin loads its model. It builds on `TritonAttention` and not on
`FlashAttention` because that writes and reads pages by Triton kernels alone, for float32 and for every GPU, so that all
of it but speed can be tested in Triton's interpreter.

Tables and lengths of a step are read from vLLM's copies on the host. It waits for the GPU where a work list that has
changed is copied there, once for all layers, and where factors that have changed are looked at, once for each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.backends.triton_attn import (
    TritonAttentionBackend,
    TritonAttentionImpl,
    TritonAttentionMetadata,
    TritonAttentionMetadataBuilder,
)
from vllm.v1.kv_cache_interface import KVCacheLayout, KVCacheSpecKind

from jointkv.attention import gpu
from jointkv.attention.grouping import group_pages
from jointkv.attention.layouts import LayerPages
from jointkv.attention.paged import paged_attention
from jointkv.attention.switch import Switch
from jointkv.errors import LayoutError
from jointkv.vllm_plugin.attention.backend import JointAttention, JointBuilder, JointMetadata
from jointkv.vllm_plugin.attention.install import override
from jointkv.vllm_plugin.engine.pages import PROBED_PAGE
from jointkv.vllm_plugin.engine.uses import used

is_quantized: Callable[[str], bool] = resolve_obj_by_qualname(used().QUANTIZED)


def unsupported(config: Any) -> str | None:
    """What an engine's `VllmConfig` asks for that this backend cannot do; more is found once the model is loaded."""
    size, pages = config.model_config.get_head_size(), config.cache_config.cache_dtype
    if is_quantized(pages):
        return f"pages of {pages}"
    if size % 16 or size > gpu.MOST_SIZE or not TritonAttentionBackend.supports_head_size(size):
        return f"heads of {size}"
    return None


@contextmanager
def registered(config: Any) -> Iterator[None]:
    """Let the full-attention layers of a model that is loaded meanwhile use this backend.

    What `config`, an engine's `VllmConfig`, names for them already (`backend_per_kind`) is left as it is. The choice
    stays there, since vLLM tells compiled models apart by it.
    """
    attention = config.attention_config
    ours = {KVCacheSpecKind.FULL_ATTENTION.value: AttentionBackendEnum.CUSTOM}
    attention.backend_per_kind = {**ours, **attention.backend_per_kind}
    with override("CUSTOM", JointGPUBackend):
        yield


@dataclass
class JointGPUMetadata(JointMetadata, TritonAttentionMetadata):
    """vLLM's, and what reads what."""


class JointGPUBuilder(JointBuilder, TritonAttentionMetadataBuilder):
    """vLLM's, and what reads what."""

    metadata = JointGPUMetadata
    _cudagraph_support = AttentionCGSupport.NEVER  # the work list is made on the host for every step
    supports_update_block_table = False  # another group's tables are other work


class JointGPUAttention(JointAttention, TritonAttentionImpl):
    """vLLM's, and the Triton kernels of `jointkv.attention.gpu`."""

    kernel = staticmethod(partial(paged_attention, kernel=gpu.attend))

    def layout(self, layer: Any) -> LayerPages:
        """K and V of a token beside one another, `[pages, h, t, 2d]` with any strides."""
        cache = layer.kv_cache
        if cache.dim() != 4 or cache.shape[3] != 2 * self.head_size:
            raise LayoutError(f"a KV cache {list(cache.shape)} for heads of {self.head_size} was never seen")
        return LayerPages.of_pool(*cache.transpose(1, 2).split(self.head_size, dim=3))

    def special(self, layer: Any) -> dict[str, bool]:
        """What Triton attention can do besides; and the kernels multiply numbers of one dtype."""
        return {
            "fp8 and other quantized pages": is_quantized(self.kv_cache_dtype),
            "pages of another dtype than the model's": layer.kv_cache.dtype != layer.dtype,
            "chunked local attention": self.chunk_lookback != -1,
            "images that are read in both directions": layer.use_mm_prefix,
        }

    def prepare(self, pages: LayerPages) -> None:
        """Do one decode on the unused page, which is zero: what the GPU finds wrong shows now.

        Raises:
            NativeUnavailable: Triton is not installed.
            LayoutError: a wrong answer.
        """
        table, length = torch.tensor([[PROBED_PAGE]]), torch.tensor([pages.block_size])
        group = self.num_heads // self.num_kv_heads
        work = group_pages(table, length, pages.block_size, heads_per_kv_head=group, threads=self.threads(pages))
        query = torch.ones(1, self.num_heads, self.head_size, dtype=pages.dtype, device=pages.device)
        if not torch.equal(self.attend(query, pages, work), torch.zeros_like(query)):
            raise LayoutError("shared-page attention gives a wrong answer on this device")

    def threads(self, pages: LayerPages) -> int | None:
        """Enough to keep the GPU busy; torch's number in Triton's interpreter."""
        return gpu.threads(pages.device, pages.num_heads) if pages.device.type == "cuda" else None

    def measured(self, layer: Any, pages: LayerPages, longest: int) -> Switch:
        """Never written; see `JointGPUWorker`."""
        raise LayoutError("on a GPU nothing measures which attention is faster")

    def fused_output_quant_supported(self, quant_key: Any) -> bool:
        """No: the kernels write numbers of the query's dtype."""
        return False


class JointGPUBackend(TritonAttentionBackend):
    """vLLM's Triton backend with the parts above."""

    @staticmethod
    def get_impl_cls() -> type[TritonAttentionImpl]:
        """See `AttentionBackend`."""
        return JointGPUAttention

    @staticmethod
    def get_builder_cls() -> type[TritonAttentionMetadataBuilder]:
        """See `AttentionBackend`."""
        return JointGPUBuilder

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Those in which a layer's page is one piece, as `packed_pages` wants it, and so are a head's tokens in it."""
        return KVCacheLayout.LBHNC, KVCacheLayout.BLHNC
