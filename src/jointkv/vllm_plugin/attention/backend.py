"""What a backend of vLLM's gets from this plugin, on every device: attention that takes a shared page once.

The backends for each device are in `cpu_attention` and `gpu_attention`. Until `share_reading` has made sure of the page
layout, and after any error, they are vLLM's own. Nothing here imports a backend, since each needs its own platform.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from jointkv.attention import reference
from jointkv.attention.in_place import Ranges, in_ranges
from jointkv.attention.layouts import LayerPages
from jointkv.attention.rotary import Turning
from jointkv.attention.switch import Switch
from jointkv.attention.work import Turn, WorkList
from jointkv.vllm_plugin.attention.reading import SharedReading


@dataclass
class JointMetadata:
    """Mixed into vLLM's: see `Reads`."""

    work: WorkList | None = None
    factors: Tensor | None = None
    ranges: Ranges | None = None
    turning: Turning | None = None


class JointBuilder:
    """Mixed into vLLM's builder of metadata: adds what reads what.

    Attributes:
        metadata: vLLM's with `JointMetadata`.
    """

    metadata: ClassVar[type[JointMetadata]]
    layer_names: list[str]
    vllm_config: Any

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        """See vLLM's `AttentionMetadataBuilder`.

        Raises:
            IntegrityError: see `SharedReading.step`.
        """
        stock = super().build(common_prefix_len, common_attn_metadata, fast_build)  # type: ignore[misc]
        layers = self.vllm_config.compilation_config.static_forward_context
        reading: SharedReading | None = getattr(layers[self.layer_names[0]].impl, "reading", None)
        if reading is None:
            return stock
        if stock.causal is not True or common_attn_metadata.causal is not True:
            reading.pass_over("the step is not causal")
            return stock
        known = {field.name: getattr(stock, field.name) for field in fields(stock)}
        return self.metadata(**known, **reading.step(common_attn_metadata)._asdict())


class JointAttention(ABC):
    """Mixed into vLLM's attention: does the steps that come with a work list.

    Attributes:
        pages: of this layer, once their layout is known.
        reading: of its KV-cache group.
        place: of this layer in the group.
        kernel: `paged_attention` for this device, what `jointkv.attention.reference` defines.
        num_heads, num_kv_heads, scale: vLLM's.
    """

    kernel: ClassVar[Callable[..., tuple[Tensor, Tensor]]]
    pages: LayerPages
    reading: SharedReading
    place: int
    num_heads: int
    num_kv_heads: int
    scale: float
    _scales: tuple[Tensor, Tensor, Tensor] | None = None

    @abstractmethod
    def layout(self, layer: Any) -> LayerPages:
        """The pages of `layer` as they are believed to lie. Raises `LayoutError`."""

    @abstractmethod
    def special(self, layer: Any) -> dict[str, bool]:
        """What this backend could be asked for that no kernel of ours does, by name, and whether `layer` asks."""

    @abstractmethod
    def prepare(self, pages: LayerPages) -> None:
        """Compile the kernel, if that was not done. Raises `NativeUnavailable`."""

    @abstractmethod
    def threads(self, pages: LayerPages) -> int | None:
        """What `group_pages` cuts work for."""

    @abstractmethod
    def measured(self, layer: Any, pages: LayerPages, longest: int) -> Switch:
        """Time both attentions on sequences of up to `longest` tokens. Raises `LayoutError` where that cannot be."""

    def attend(
        self,
        query: Tensor,
        pages: LayerPages,
        work: WorkList,
        k_scale: Tensor | None = None,
        v_scale: Tensor | None = None,
        turn: Turn | None = None,
    ) -> Tensor:
        """The kernel's output `[n, heads, d]` for `query [n, heads, d]`. Raises what the kernel raises."""
        return self.kernel(query, pages, work, k_scale=k_scale, v_scale=v_scale, scale=self.scale, turn=turn)[0]

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        *args: Any,
        **options: Any,
    ) -> Tensor:
        """See vLLM's `AttentionImpl`."""
        if isinstance(attn_metadata, JointMetadata):
            count = attn_metadata.num_actual_tokens  # type: ignore[attr-defined]
            answer = self._shared(query[:count], attn_metadata)
            if answer is not None:
                output[:count] = answer.view_as(output[:count])
                return output
        return super().forward(layer, query, key, value, kv_cache, attn_metadata, output, *args, **options)  # type: ignore[misc]

    def _shared(self, query: Tensor, metadata: Any) -> Tensor | None:
        """Attention of `query [n, heads, d]`; None where the engine is to do it."""
        if metadata.work is not None and self.reading.fault is None:
            try:
                turn = None if metadata.turning is None else metadata.turning.of(self.place)
                k_scale, v_scale = self._of_layer(metadata.factors)
                return self.attend(query, self.pages, metadata.work, k_scale, v_scale, turn)
            except Exception as error:
                self.reading.switch_off(error)
        if metadata.factors is None and metadata.ranges is None:
            return None
        return self._by_definition(query, metadata)

    def _of_layer(self, factors: Tensor | None) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """This layer's, on K and on V: the same objects while `factors` is, so that a kernel checks them once."""
        if factors is None:
            return None, None
        if self._scales is None or self._scales[0] is not factors:
            self._scales = (factors, *factors[:, self.place])
        return self._scales[1:]

    def _by_definition(self, query: Tensor, metadata: Any) -> Tensor:
        """Slow, and with nothing that may have failed: as it stands a page would be read as a wrong one.

        Takes lengths, and tables where every slot reads its page, from vLLM's own metadata `[rows, ...]`, which it
        waits for.
        """
        size, tables = self.reading.block_size, []
        lengths, ranges = metadata.seq_lens.cpu(), metadata.ranges
        if ranges is None:
            used = -(-metadata.max_seq_len // size)
            blocks = metadata.block_table[:, :used].cpu()
            there = torch.arange(used) * size < lengths[:, None]
            ranges = in_ranges(blocks.masked_fill(~there, 0), size, {})
        pages, local = ranges.pages.unique(return_inverse=True)
        ranges = replace(ranges, pages=local)
        for row, length in enumerate(lengths.tolist()):
            refs = list(ranges.references(row, length))
            if metadata.factors is not None:
                k_scale, v_scale = metadata.factors[:, self.place, row].tolist()
                refs = [replace(ref, k_scale=k_scale[i], v_scale=v_scale[i]) for i, ref in enumerate(refs)]
            tables.append(refs)
        asked = metadata.query_start_loc.diff().tolist()
        rotary = None if self.reading.in_place is None else self.reading.in_place.rotary[self.place].turn
        return reference.paged_attention(query, asked, *self.pages.read(pages), tables, scale=self.scale, turn=rotary)[
            0
        ]
