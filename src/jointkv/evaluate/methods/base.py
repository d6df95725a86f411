"""What every way of holding KV in less memory is made of, so that all can be compared on the same requests."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from jointkv.evaluate.traffic.base import Request

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel

    from jointkv.evaluate.held import Prefilled

Counted = Literal["allocator", "tensors", "predicted"]


@dataclass
class Batch:
    """Requests on a model, with their unfused prefill in the forms that methods start from; each made on first use.

    A prefill covers all but the last prompt token: that one and the continuation are fed to what a method holds.
    Nobody may change what `prefilled` and `dense` return.
    """

    model: PreTrainedModel
    requests: Sequence[Request]
    block_size: int = 16

    @cached_property
    def prefilled(self) -> Prefilled:
        """The batch on jointkv's pages; needs a transformers that `jointkv.hf` supports."""
        from jointkv.evaluate.held import prefill

        return prefill(self.model, self.requests, block_size=self.block_size)

    @cached_property
    def dense(self) -> list[DynamicCache]:
        """One `DynamicCache` per request."""
        return [prefill_dense(self.model, request) for request in self.requests]

    @property
    def unfused_nbytes(self) -> int:
        """Bytes of K and V of all prefilled tokens, at the model's dtype and without any rounding to blocks."""
        config = self.model.config.get_text_config(decoder=True)
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        per_token = 2 * config.num_hidden_layers * heads * size * self.model.dtype.itemsize
        return per_token * sum(len(request.prompt) - 1 for request in self.requests)


class HeldBatch(ABC):
    """What a method holds of a batch after prefill.

    Attributes:
        nbytes: bytes of K and V and of whatever is needed to read them, of the prompts only.
        counted: where `nbytes` comes from: pages at an allocator, sizes of the tensors held, or a calculation, for a
            method that only simulates what it saves.
    """

    nbytes: int
    counted: Counted

    @abstractmethod
    def feed(self, tokens: Tensor) -> Tensor:
        """Append `tokens [requests, n]` to every request; returns their next-token logits `[requests, n, vocab]`."""


class Method(ABC):
    """A way of holding the KV of a batch. Adding one: a file here and a line in `__init__.py`.

    Attributes:
        levels: settings to try, in the method's own unit, the most faithful first.
        level_means: what a level is, for tables.
        shares_across_requests: whether requests can share memory.
        frees_engine_memory: whether a paged engine such as vLLM gets blocks back, as it stands.
        packages: what must be installed besides `torch` and `transformers`.
    """

    name: str
    description: str
    levels: tuple[float, ...]
    level_means: str
    shares_across_requests: bool = False
    frees_engine_memory: bool = False
    packages: tuple[str, ...] = ()

    @abstractmethod
    def hold(self, batch: Batch, level: float) -> HeldBatch:
        """Prefill `batch` and compress it, or compress what `batch` has prefilled."""

    def level_for_share(self, share: float) -> float | None:
        """The level that keeps `share` (0 to 1) of the unfused bytes; None if that cannot be chosen."""
        return None


@torch.inference_mode()
def prefill_dense(model: PreTrainedModel, request: Request, **forward: Any) -> DynamicCache:
    """The KV of all but the last prompt token of `request`."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    ids = torch.tensor([request.prompt[:-1]], device=model.device)
    model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1, **forward)
    return cache


@torch.inference_mode()
def feed_each(model: PreTrainedModel, caches: Sequence[Any], positions: Sequence[int], tokens: Tensor) -> Tensor:
    """Feed row `i` of `tokens [requests, n]` to `caches[i]` from position `positions[i]` on; logits as `feed` gives.

    The position is given, not taken from the cache: a cache that dropped tokens is shorter than what it stands for.
    """
    logits = []
    for cache, first, row in zip(caches, positions, tokens, strict=True):
        place = torch.arange(first, first + len(row), device=model.device)
        out = model(
            input_ids=row[None].to(model.device), past_key_values=cache, use_cache=True, position_ids=place[None]
        )
        logits.append(out.logits)
    return torch.cat(logits)
