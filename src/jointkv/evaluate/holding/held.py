"""What is held of a batch after its prefill: how many bytes, and what the model says next."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from jointkv.evaluate.holding.batch import Batch
from jointkv.evaluate.holding.dense import LayerStates, dense_cache, feed_each, fork_cache, layer_states
from jointkv.evaluate.holding.work import Work
from jointkv.evaluate.traffic.base import Request

Counted = Literal["allocator", "tensors", "predicted"]


class HeldBatch(ABC):
    """What a method holds of a batch after prefill.

    Attributes:
        model: the model that the batch was prefilled with.
        nbytes: bytes of K and V and of whatever is needed to read them (block tables apart), of the prompts only.
        nbytes_packed: the part of `nbytes` that does not grow with the model's dtype, such as packed codes.
        counted: where `nbytes` comes from: pages at an allocator, sizes of the tensors held, or a calculation, for a
            method that only simulates what it saves.
        work: what its prefill computed, of a method that does not compute everything.
    """

    model: PreTrainedModel
    nbytes: int
    nbytes_packed: int = 0
    counted: Counted
    work: Work | None = None

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


@dataclass(frozen=True)
class ByteCount:
    """Bytes of K and V of batches on one model; sums over batches with `+`.

    Attributes:
        unfused_nbytes, nbytes, nbytes_packed: see `Batch` and `HeldBatch`.
        itemsize: bytes per number in the model's dtype.
    """

    unfused_nbytes: int
    nbytes: int
    nbytes_packed: int
    itemsize: int

    @classmethod
    def of(cls, held: HeldBatch, batch: Batch) -> ByteCount:
        """What is counted of `batch` as it is held."""
        return cls(batch.unfused_nbytes, held.nbytes, held.nbytes_packed, batch.model.dtype.itemsize)

    def __add__(self, other: ByteCount) -> ByteCount:
        return ByteCount(
            self.unfused_nbytes + other.unfused_nbytes,
            self.nbytes + other.nbytes,
            self.nbytes_packed + other.nbytes_packed,
            self.itemsize,
        )

    @property
    def share(self) -> float:
        """`nbytes / unfused_nbytes`."""
        return self.nbytes / self.unfused_nbytes

    @property
    def share_16bit(self) -> float:
        """`share` if the model's dtype had 16 bits: packed codes stay, the rest shrinks."""
        narrower = 2 / self.itemsize
        at_16bit = self.nbytes_packed + (self.nbytes - self.nbytes_packed) * narrower
        return at_16bit / (self.unfused_nbytes * narrower)


def true_logits(held: HeldBatch, requests: Sequence[Request]) -> Tensor:
    """Logits `[requests, n, vocab]` over the true continuations, of which `held` has all but the last token afterwards.

    The last prompt token, which no prefill covers, is fed before them: position `i` is for `continuation[i]`.
    """
    return held.feed(torch.tensor([(request.prompt[-1], *request.continuation[:-1]) for request in requests]))


def greedy(held: HeldBatch, requests: Sequence[Request], tokens: int) -> tuple[tuple[int, ...], ...]:
    """The next `tokens` most likely token ids of each request; `held` has them appended afterwards."""
    fed = torch.tensor([request.prompt[-1:] for request in requests])
    outputs = []
    for _ in range(tokens):
        fed = held.feed(fed)[:, -1].argmax(-1, keepdim=True).cpu()
        outputs.append(fed)
    return tuple(tuple(row) for row in torch.cat(outputs, 1).tolist())


def end_tokens(model: PreTrainedModel) -> frozenset[int]:
    """Ids that end an answer, by the model's generation config."""
    configured = model.generation_config.eos_token_id if model.generation_config is not None else None
    ids = configured if isinstance(configured, list) else [configured]
    return frozenset(token for token in ids if token is not None)
