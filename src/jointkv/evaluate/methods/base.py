"""What every way of holding KV in less memory is made of, so that all can be compared on the same requests."""

from __future__ import annotations

import copy
import importlib.metadata
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from torch import Tensor

from jointkv.errors import BadInput, UnsupportedModel
from jointkv.evaluate.traffic.base import Request
from jointkv.policy import Scope

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel

    from jointkv.evaluate.holding.held import Prefilled

Counted = Literal["allocator", "tensors", "predicted"]
LayerStates = list[tuple[Tensor, Tensor]]
"""K and V `[1, h, n, d]` of one request, per layer."""


@dataclass
class Batch:
    """Requests on a model, with their unfused prefill in the forms that methods start from; each made on first use.

    A prefill covers all but the last prompt token: that one and the continuation are fed to what a method holds.
    Nobody may change what `prefilled` and `dense` return. Methods refuse a model with layers that do not attend to all
    tokens, see `check_full_attention`.
    """

    model: PreTrainedModel
    requests: Sequence[Request]
    block_size: int = 16

    @cached_property
    def prefilled(self) -> Prefilled:
        """The batch on jointkv's pages; needs a transformers that `jointkv.hf` supports."""
        from jointkv.evaluate.holding.held import prefill
        from jointkv.evaluate.holding.prefilled import from_dense

        try:
            check_full_attention(self.model)
        except UnsupportedModel:
            return prefill(self.model, self.requests, block_size=self.block_size)
        return from_dense(self.model, self.requests, self.dense, self.block_size)

    @cached_property
    def dense(self) -> list[DynamicCache]:
        """One `DynamicCache` per request."""
        return [prefill_dense(self.model, request) for request in self.requests]

    def release(self) -> None:
        """Drop the prefills, for memory; they are made again when they are asked for."""
        for name in ("prefilled", "dense"):
            self.__dict__.pop(name, None)

    @property
    def lengths(self) -> list[int]:
        """Prefilled tokens per request."""
        return [len(request.prompt) - 1 for request in self.requests]

    @property
    def unfused_nbytes(self) -> int:
        """Bytes of K and V of all prefilled tokens, at the model's dtype and without any rounding to blocks."""
        config = self.model.config.get_text_config(decoder=True)
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        per_token = 2 * config.num_hidden_layers * heads * size * self.model.dtype.itemsize
        return per_token * sum(self.lengths)


class HeldBatch(ABC):
    """What a method holds of a batch after prefill.

    Attributes:
        model: the model that the batch was prefilled with.
        nbytes: bytes of K and V and of whatever is needed to read them (block tables apart), of the prompts only.
        nbytes_packed: the part of `nbytes` that does not grow with the model's dtype, such as packed codes.
        counted: where `nbytes` comes from: pages at an allocator, sizes of the tensors held, or a calculation, for a
            method that only simulates what it saves.
    """

    model: PreTrainedModel
    nbytes: int
    nbytes_packed: int = 0
    counted: Counted

    @abstractmethod
    def feed(self, tokens: Tensor) -> Tensor:
        """Append `tokens [requests, n]` to every request; returns their next-token logits `[requests, n, vocab]`."""

    @abstractmethod
    def fork(self) -> Self:
        """A copy that is fed on its own; both read the same prompts."""


class DenseBatch(HeldBatch):
    """One cache of transformers per request, read as it stands."""

    counted: Counted = "tensors"

    def __init__(self, batch: Batch, caches: Sequence[Any], nbytes: int) -> None:
        self.model, self.nbytes = batch.model, nbytes
        self._caches, self._positions = list(caches), batch.lengths

    def feed(self, tokens: Tensor) -> Tensor:
        logits = feed_each(self.model, self._caches, self._positions, tokens)
        self._positions = [position + tokens.shape[1] for position in self._positions]
        return logits

    def fork(self) -> Self:
        twin = copy.copy(self)
        twin._caches = [fork_cache(cache) for cache in self._caches]
        return twin


class RebuiltBatch(HeldBatch):
    """Prompts in a form of the method's own, from which one request at a time is rebuilt to be read.

    Tokens fed after the prompt are kept as they are.

    Args:
        lengths: tokens per request that `rebuild` gives, which is also the position of the first token fed.
    """

    def __init__(self, model: PreTrainedModel, lengths: Sequence[int]) -> None:
        self.model, self._lengths = model, list(lengths)
        self._fed: list[LayerStates] = [[] for _ in lengths]

    @abstractmethod
    def rebuild(self, request: int) -> LayerStates:
        """K and V of the prompt of one request, read from what is held; the caller may not change them."""

    def feed(self, tokens: Tensor) -> Tensor:
        return torch.cat([self._feed_one(index, row) for index, row in enumerate(tokens)])

    def fork(self) -> Self:
        twin = copy.copy(self)
        twin._fed = list(self._fed)
        return twin

    def _feed_one(self, request: int, tokens: Tensor) -> Tensor:
        prompt, length = self.rebuild(request), self._lengths[request]
        fed = self._fed[request] or [(k[:, :, :0], v[:, :, :0]) for k, v in prompt]
        states = [(torch.cat((k, m), 2), torch.cat((v, w), 2)) for (k, v), (m, w) in zip(prompt, fed, strict=True)]
        cache = dense_cache(self.model, states)
        logits = feed_each(self.model, [cache], [length + fed[0][0].shape[2]], tokens[None])
        self._fed[request] = [(k[:, :, length:].clone(), v[:, :, length:].clone()) for k, v in layer_states(cache)]
        return logits


class Method(ABC):
    """A way of holding the KV of a batch. Adding one: a file here and a line in `__init__.py`.

    Attributes:
        levels: settings to try, in the method's own unit, the most faithful first.
        level_means: what a level is, for tables.
        allowed: what a level may be, for messages.
        shares_across_requests: whether requests can share memory.
        frees_engine_memory: whether a paged engine such as vLLM gets blocks back, as it stands.
        packages: distributions that must be installed besides `torch` and `transformers`.
    """

    name: str
    description: str
    levels: tuple[float, ...]
    level_means: str
    allowed: str
    shares_across_requests: bool = False
    frees_engine_memory: bool = False
    packages: tuple[str, ...] = ()

    def hold(self, batch: Batch, level: float) -> HeldBatch:
        """What is held of `batch` at `level`.

        Raises:
            BadInput: see `check_level`.
            UnsupportedModel: see `check_full_attention`.
        """
        self.check_level(level)
        check_full_attention(batch.model)
        return self.compress(batch, level)

    @abstractmethod
    def compress(self, batch: Batch, level: float) -> HeldBatch:
        """Prefill `batch` and compress it, or compress what `batch` has prefilled; `hold` has checked both."""

    @abstractmethod
    def allows(self, level: float) -> bool:
        """Whether `level` is one that `allowed` describes."""

    def check_level(self, level: float) -> None:
        """Raises `BadInput` for a level that makes no sense for this method."""
        if not self.allows(level):
            raise BadInput(f"{self.name}: level {level:g} ({self.level_means}); allowed: {self.allowed}")

    def level_for_share(self, share: float) -> float | None:
        """The level that keeps `share` (0 to 1) of the unfused bytes; None if that cannot be chosen."""
        return None

    def in_scope(self, scope: Scope) -> Method:
        """This method for traffic whose likeness lies in `scope`; most methods do not care."""
        return self

    def missing_packages(self) -> tuple[str, ...]:
        """Those of `packages` that are not installed here."""
        return tuple(name for name in self.packages if not _is_installed(name))


def check_full_attention(model: PreTrainedModel) -> None:
    """Raises `UnsupportedModel` unless every layer caches all tokens: bytes would be counted wrongly otherwise."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    layers = DynamicCache(config=model.config.get_text_config(decoder=True)).layers
    other = next((layer for layer in layers if type(layer) is not DynamicLayer), None)
    if other is not None:
        raise UnsupportedModel(
            f"{type(model).__name__} has layers with a {type(other).__name__}; methods are compared on models whose "
            "layers all attend to all tokens"
        )


@torch.inference_mode()
def prefill_dense(model: PreTrainedModel, request: Request, cache: Any = None) -> Any:
    """The KV of all but the last prompt token of `request`, in `cache` if given, else in a new `DynamicCache`."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config) if cache is None else cache
    ids = torch.tensor([request.prompt[:-1]], device=model.device)
    model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
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


def context_of(model: PreTrainedModel) -> int | None:
    """Tokens that the model can attend to, if its config says."""
    return getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)


def fork_cache(cache: Any) -> Any:
    """A copy of a growing cache of transformers; its layers replace their tensors and never write into them."""
    twin = copy.copy(cache)
    twin.layers = [copy.copy(layer) for layer in cache.layers]
    return twin


def scored_tokens(requests: Sequence[Request]) -> Tensor:
    """What is fed after a prefill to score a true continuation: the last prompt token, then all but its last token.

    Long `[requests, n]`; the logits at position `i` are those of `continuation[i]`.
    """
    return torch.tensor([(request.prompt[-1], *request.continuation[:-1]) for request in requests])


def layer_states(cache: Any) -> LayerStates:
    """K and V of each layer of a `DynamicCache`, not copied."""
    return [(layer.keys, layer.values) for layer in cache.layers]


def dense_cache(model: PreTrainedModel, states: LayerStates) -> DynamicCache:
    """A `DynamicCache` that holds `states`."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    for index, (keys, values) in enumerate(states):
        cache.update(keys, values, index)
    return cache


def nbytes_of(states: LayerStates) -> int:
    """Bytes of K and V of all layers."""
    return sum(keys.nbytes + values.nbytes for keys, values in states)


def _is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
