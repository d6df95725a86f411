"""Which blocks of which requests may be compared with which: isolation, position, text."""

from __future__ import annotations

import itertools
import os
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.v1.request import Request

from jointkv.core.evidence import Echoes, standing
from jointkv.fusion.signature import token_hashes
from jointkv.fusion.token_index import contexts
from jointkv.vllm_plugin.engine.opt_out import left_alone
from jointkv.vllm_plugin.scheduler.evidence import Audit


class IsolationKey(NamedTuple):
    """What two requests must have in common to be compared.

    Salts are secrets, and what is wrong with an index of keys is logged: its text says nothing.

    Attributes:
        salt: `cache_salt`.
        adapter: name, number and path of the LoRA adapter.
        media: identifier, first token and number of tokens of each.
    """

    salt: str | None
    adapter: tuple[str, int, str] | None
    media: tuple[tuple[str, int, int], ...]

    def __repr__(self) -> str:
        return "<isolation key>"


@dataclass
class TrackedRequest:
    """What the plugin remembers of a request that takes part.

    Attributes:
        request: vLLM's own object.
        isolation: requests are compared only when this is equal.
        block_size: tokens per block.
        number: of the request, as the source of the pages that it computes.
        epoch: `num_preemptions` that the rest belongs to.
        next_slot: first block not looked at yet.
        late: blocks before that are still to be looked at.
        served: (group, slot) of blocks read from another request's page; they are never fused again, because errors
            would add up.
        private_from: first token of the blocks that only this request finds in the prefix cache; None while all are
            exact.
        secret: what tells its private hashes from all others.
        audit: what its comparisons say of reuse, while it computes its prompt exactly and reuse is on.
        tried: whether the pool was in use enough for fusion when blocks of it were filled.
        helped: tokens that helpers had computed for it when it was looked up anew.
        planned: epoch in which it was decided that nothing more is reused before it starts.
    """

    request: Request
    isolation: Hashable
    block_size: int
    number: int = 0
    epoch: int = 0
    next_slot: int = 0
    late: list[int] = field(default_factory=list)
    served: set[tuple[int, int]] = field(default_factory=set)
    private_from: int | None = None
    secret: bytes = field(default_factory=lambda: os.urandom(16), repr=False)
    audit: Audit | None = None
    tried: bool = False
    helped: int = 0
    planned: int | None = None
    _hashes: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64), repr=False)
    _standing: Echoes = field(default_factory=lambda: np.zeros(0, np.uint64), repr=False)
    _contexts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64), repr=False)
    _tokens: NDArray[np.int32] | None = field(default=None, repr=False)

    def restart(self, kept: int) -> None:
        """The request was preempted: forget all blocks but the first `kept`, which it found again."""
        self.epoch = self.request.num_preemptions
        self.next_slot, self.late = kept, []
        self.served = {(group, slot) for group, slot in self.served if slot < kept}

    def hashes(self, end: int) -> NDArray[np.int64]:
        """Hashes of the tokens of each block, of at least the first `end`, which must be full of known tokens."""
        known = len(self._hashes)
        if end > known:
            tokens = self.request.all_token_ids[known * self.block_size : end * self.block_size]
            new = token_hashes(torch.tensor(tokens), self.block_size).numpy()
            self._hashes = np.concatenate([self._hashes, new])
        return self._hashes

    def tokens(self, first: int, end: int) -> NDArray[np.int32]:
        """The tokens of blocks `first` to `end`: int32 `[end - first, block_size]`."""
        known = 0 if self._tokens is None else len(self._tokens)
        if end > known:
            new = self.request.all_token_ids[known * self.block_size : end * self.block_size]
            more = np.array(new, np.int32).reshape(-1, self.block_size)
            self._tokens = more if self._tokens is None else np.concatenate([self._tokens, more])
        assert self._tokens is not None or first == end
        return np.zeros((0, self.block_size), np.int32) if self._tokens is None else self._tokens[first:end]

    def contexts(self, first: int, end: int) -> NDArray[np.int64]:
        """One number for all tokens before each of the blocks `first` to `end`: int64 `[end - first]`."""
        if end > len(self._contexts):
            blocks = max(end, self.request.num_prompt_tokens // self.block_size)
            self._contexts = contexts(self.hashes(blocks)[:blocks])
        return self._contexts[first:end]

    def is_exact(self, slot: int) -> bool:
        """Whether block `slot` is computed, like all before it, or an exact hit: nothing approximates it."""
        return self.private_from is None or (slot + 1) * self.block_size <= self.private_from

    def standing(self, first: int, end: int) -> Echoes:
        """Which tokens of blocks `first` to `end` stand before their block too, see `core.evidence`."""
        if end > len(self._standing):
            blocks = max(end, self.request.num_prompt_tokens // self.block_size)
            self._standing = standing(self.tokens(0, blocks).ravel(), self.block_size)
        return self._standing[first:end]


class Requests:
    """What is remembered of requests.

    Args:
        block_size: tokens per block.

    Attributes:
        active: requests that take part, by name.
        left_alone: those that did until an internal error. Their private hashes are still to be forgotten.
    """

    def __init__(self, block_size: int) -> None:
        self.active: dict[str, TrackedRequest] = {}
        self.left_alone: dict[str, TrackedRequest] = {}
        self.block_size = block_size
        self._numbers = itertools.count()

    def admit(self, request: Request) -> TrackedRequest | None:
        """A new request; None if it does not take part."""
        if left_alone(request) is not None:
            return None
        tracked = TrackedRequest(request, isolation_key(request), self.block_size, next(self._numbers))
        self.active[request.request_id] = tracked
        return tracked

    def find(self, request_id: str) -> TrackedRequest | None:
        """Whether active or left alone."""
        return self.active.get(request_id) or self.left_alone.get(request_id)

    def among(self, request_ids: Iterable[str]) -> Iterator[TrackedRequest]:
        """Those of these requests that take part."""
        for request_id in request_ids:
            tracked = self.active.get(request_id)
            if tracked is not None:
                yield tracked

    def pop(self, request_id: str) -> TrackedRequest | None:
        """A request that has ended."""
        return self.active.pop(request_id, None) or self.left_alone.pop(request_id, None)

    def leave_alone(self) -> None:
        """All that run now, for good."""
        self.left_alone.update(self.active)
        self.active = {}


def isolation_key(request: Request) -> IsolationKey:
    """The key of a request. No coarser than what vLLM's own prefix cache tells apart."""
    adapter = request.lora_request
    media = ((one.identifier, one.mm_position.offset, one.mm_position.length) for one in request.mm_features)
    return IsolationKey(
        request.cache_salt, adapter and (adapter.lora_name, adapter.lora_int_id, adapter.lora_path), tuple(media)
    )
