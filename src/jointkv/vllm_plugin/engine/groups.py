"""Layer groups: full-attention layers in groups, each with a block table of its own over the one shared pool.

vLLM makes one block table for all layers whose KV-cache specs merge, so a spec that carries the number of its group and
refuses to merge with other groups is all it takes. Spec and manager are announced through vLLM's `KVCacheSpecRegistry`.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import Any, ClassVar, Self

from vllm.utils.math_utils import cdiv
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec, replace_as
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry
from vllm.v1.request import Request

from jointkv.errors import UnsupportedEngine


def split_layers(specs: dict[str, KVCacheSpec], groups: int) -> dict[str, KVCacheSpec]:
    """The specs of a model's layers, with full attention split into `groups` groups of consecutive layers.

    Raises:
        UnsupportedEngine: the layers cannot be split evenly, or not all full attention is of the plain kind.
    """
    if groups == 1:
        return specs
    layers = [name for name, spec in specs.items() if isinstance(spec, FullAttentionSpec)]
    for name in layers:
        spec = specs[name]
        if type(spec) is not FullAttentionSpec or spec.sliding_window or spec.attention_chunk_size:
            raise UnsupportedEngine(
                f"layer_groups={groups}, but {name} has attention of a kind that cannot be split into groups "
                f"({type(spec).__name__}); set layer_groups=1"
            )
    if not layers or len(layers) % groups:
        divisors = [str(count) for count in range(1, len(layers) + 1) if len(layers) % count == 0]
        raise UnsupportedEngine(
            f"layer_groups={groups} does not divide the model's {len(layers)} layers of full attention; "
            f"possible are {', '.join(divisors) or 'none'}"
        )
    size = len(layers) // groups
    grouped = {
        name: replace_as(specs[name], LayerGroupSpec, layer_group=place // size) for place, name in enumerate(layers)
    }
    return {**specs, **grouped}


def register() -> None:
    """Tell vLLM which manager keeps the tables of a layer group. For every process; may be called again."""
    # Registers vLLM's own specs, which it does only while its list is empty.
    KVCacheSpecRegistry.check_kv_cache_spec_registry({})
    KVCacheSpecRegistry.register(LayerGroupSpec, LayerGroupManager)


@dataclass(frozen=True, kw_only=True)
class LayerGroupSpec(FullAttentionSpec):
    """Full attention in one of several layer groups.

    Attributes:
        layer_group: number of the group; None in the spec that the layers of a group merge into. That makes the groups'
            specs equal, so vLLM looks up cached prefixes once for all groups.
    """

    layer_group: int | None = None

    @classmethod
    def merge(cls, specs: list[Self]) -> Self:
        """One spec for layers of one group.

        Raises:
            AssertionError: they are of several groups. It is how vLLM asks which layers can share a table.
        """
        if len({getattr(spec, "layer_group", None) for spec in specs}) > 1:
            raise AssertionError("layers of different groups have block tables of their own")
        return super().merge(specs)

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        """Whether layers that do not merge may share a table all the same: only within a group."""
        return all(
            isinstance(spec, LayerGroupSpec) and spec.layer_group == self.layer_group
            for spec in kv_cache_specs.values()
        )


class Lockstep(list["LayerGroupManager"]):
    """The managers of all layer groups over one pool, in order. Their tables always have equal lengths."""

    _of_pool: ClassVar[weakref.WeakValueDictionary[int, Lockstep]] = weakref.WeakValueDictionary()

    @classmethod
    def of(cls, pool: BlockPool) -> Lockstep:
        """The one of `pool`. It lives as long as a manager that holds it, and so does the pool."""
        return cls._of_pool.setdefault(id(pool), cls())


class LayerGroupManager(FullAttentionManager):
    """The block tables of one layer group.

    vLLM's coordinator asks the groups one after the other. Where all have the same answer, the first gives it for all.
    """

    def __init__(self, kv_cache_spec: KVCacheSpec, block_pool: BlockPool, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, block_pool=block_pool, **kwargs)
        self.lockstep = Lockstep.of(block_pool)
        self.lockstep.append(self)

    def get_num_blocks_to_allocate(
        self, request_id: str, num_tokens: int, new_computed_blocks: Sequence[KVCacheBlock], *args: Any, **kwargs: Any
    ) -> int:
        """Blocks that must be free for `request_id`. For a running request, the first group counts those of all."""
        if request_id not in self.num_cached_block:
            return super().get_num_blocks_to_allocate(request_id, num_tokens, new_computed_blocks, *args, **kwargs)
        if self.lockstep[0] is not self:
            return 0
        missing = cdiv(num_tokens, self.block_size) - len(self.req_to_blocks[request_id])
        return max(missing, 0) * len(self.lockstep)

    def cache_blocks(self, request: Request, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        """Enter newly filled blocks into the prefix cache; in most steps there are none."""
        if num_tokens // self.block_size > self.num_cached_block.get(request.request_id, 0):
            super().cache_blocks(request, num_tokens, *args, **kwargs)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """The blocks of all groups, slot by slot, from the first group asked; the others have none left.

        vLLM frees them in reverse, so the tails of all groups are evicted before the first blocks of any: a cached
        prefix is of use only while every group holds it.
        """
        tables = [FullAttentionManager.pop_blocks_for_free(group, request_id) for group in self.lockstep]
        return [block for block in chain.from_iterable(zip_longest(*tables)) if block is not None]
