"""The attention function that reads pages, registered with transformers under the name `jointkv`."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from jointkv.attention.tokens import read_tokens
from jointkv.errors import UnsupportedModel

ATTENTION_NAME = "jointkv"
STORED = "_attn_implementation_internal"
"""Where a configuration of transformers keeps the name of its attention."""
WORKSPACE_BYTES = 32 << 20
"""K and V copied out of the pages at a time; sequences beyond that are attended in turns."""

_UNSUPPORTED = ("softcap", "position_bias", "s_aux", "head_mask")


@dataclass(frozen=True)
class PagedLayer:
    """One layer's pages and where the tokens of the batch lie in them; rides on the keys given to attention.

    Attributes:
        keys, values: `[pages, t, h, d]`.
        slots: `[rows, length]`, see `token_slots`.
        k_scale, v_scale: factors per token `[rows, length]`, or None for 1.
    """

    keys: Tensor
    values: Tensor
    slots: Tensor
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None

    def read(self, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Dense K and V of some rows: `[rows, h, length, d]`."""
        k_scale = None if self.k_scale is None else self.k_scale[rows]
        v_scale = None if self.v_scale is None else self.v_scale[rows]
        return read_tokens(self.keys, self.slots[rows], k_scale), read_tokens(self.values, self.slots[rows], v_scale)

    def rows_at_a_time(self) -> int:
        """Rows whose dense K and V fit the workspace; one at the least."""
        token = (self.keys[0, 0].numel() + self.values[0, 0].numel()) * self.keys.element_size()
        return max(1, WORKSPACE_BYTES // max(1, token * self.slots.shape[1]))


def attach_pages(key: Tensor, pages: PagedLayer) -> Tensor:
    """Let `pages` ride on `key` to the attention function; returns `key`."""
    key.jointkv_pages = pages  # type: ignore[attr-defined]
    return key


def watch(key: Tensor, value: Tensor, arrived: Callable[[], None]) -> None:
    """Have `arrived` called when this very `key` and `value` reach the attention function.

    Some models change K or V between cache and attention (latent attention, expert heads). What rides on the tensors
    is lost then, and their layers go on with dense K and V.
    """
    key.jointkv_arrived = value.jointkv_arrived = arrived  # type: ignore[attr-defined]


class AttentionSwitch:
    """Lets a model that uses `sdpa` attend with the function that reads pages for the time of a forward pass.

    Args:
        config: of the decoder; `on` and `off` change its attention and restore it.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        register_attention()
        self._config = config
        self._switched = False
        self._passes: set[int] = set()
        self._lock = threading.Lock()

    @property
    def reads_pages(self) -> bool:
        """Whether attention reads pages in the forward pass that goes on in this thread."""
        return threading.get_ident() in self._passes and self._config._attn_implementation == ATTENTION_NAME

    def on(self) -> None:
        """Before a forward pass."""
        with self._lock:
            if self._config._attn_implementation == "sdpa":
                self._set(ATTENTION_NAME)
                self._switched = True
            self._passes.add(threading.get_ident())

    def off(self) -> None:
        """After it, and after those of other threads; what somebody else has set meanwhile stays."""
        with self._lock:
            self._passes.discard(threading.get_ident())
            if self._passes:
                return
            if self._switched and self._config._attn_implementation == ATTENTION_NAME:
                self._set("sdpa")
            self._switched = False

    def __reduce__(self) -> tuple[type[AttentionSwitch], tuple[PreTrainedConfig]]:
        """A copy of a model has a switch of its own."""
        return AttentionSwitch, (self._config,)

    def _set(self, attention: str) -> None:
        fields = vars(self._config)
        if STORED in fields and not self._config.sub_configs:
            fields[STORED] = attention  # the setter validates, which would take a good part of a small model's step
        else:
            self._config._attn_implementation = attention


def register_attention() -> None:
    """Make `attn_implementation="jointkv"` known to transformers. Repeating it changes nothing."""
    AttentionInterface.register(ATTENTION_NAME, paged_attention_forward)
    AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)


def paged_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend to the pages that ride on `key`; without any, as in a compiled model, do what `sdpa` does.

    Args:
        query: `[rows, query heads, n, d]`.
        attention_mask: bool `[rows, 1, n, length]`, or None for one query, or a causal fresh prompt.

    Raises:
        UnsupportedModel: the model asks for logits soft-capping, a position bias or sinks, which this cannot do.
    """
    compiling = torch.compiler.is_compiling()
    pages: PagedLayer | None = None if compiling else getattr(key, "jointkv_pages", None)
    arrived: Callable[[], None] | None = None if compiling else getattr(key, "jointkv_arrived", None)
    if compiling or pages is not None or arrived is not None:
        _refuse_unsupported(kwargs)
    if arrived is not None:
        together = arrived is getattr(value, "jointkv_arrived", None)
        if together:
            arrived()
    if pages is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    outputs = []
    for start in range(0, len(query), pages.rows_at_a_time()):
        rows = slice(start, start + pages.rows_at_a_time())
        keys, values = (side.to(new.dtype) for side, new in zip(pages.read(rows), (key, value), strict=True))
        mask = attention_mask
        if mask is not None and len(mask) > 1:
            mask = mask[rows]
        # The stock function, so that the same K and V give the same bits whichever way this release computes them.
        output, _ = sdpa_attention_forward(
            module, query[rows], keys, values, mask, dropout=dropout, scaling=scaling, **kwargs
        )
        outputs.append(output)
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs), None


def _refuse_unsupported(arguments: dict[str, Any]) -> None:
    for name in _UNSUPPORTED:
        if arguments.get(name) is not None:
            raise UnsupportedModel(f"attention with {name}: load the model with attn_implementation='eager'")
