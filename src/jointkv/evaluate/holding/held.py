"""Prefill a batch of requests under a policy, measure what it holds, then score the true tokens that follow."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from jointkv.evaluate.methods.base import HeldBatch, scored_tokens
from jointkv.evaluate.score.fidelity import Scorer
from jointkv.evaluate.traffic.base import Request
from jointkv.hf.cache import JointCache
from jointkv.hf.pool import JointPool
from jointkv.policy import FusionPolicy


@dataclass(frozen=True)
class Held:
    """A batch held in the cache after prefill and fusion, and the distributions that follow.

    Attributes:
        pages_before: pages in use at the allocator when prefill ended, before anything was fused.
        pages_after, bytes_after: in use after fusion.
        ratio_fused_layers: the same ratio over the layers that take part in fusion.
        logits: next-token logits at the scored positions, `[requests, positions, vocab]`.
    """

    pages_before: int
    pages_after: int
    page_bytes: int
    ratio_fused_layers: float
    seconds_fuse: float
    logits: Tensor


@dataclass(frozen=True)
class Row:
    """One line of a comparison: a traffic under a policy, against the same requests unfused."""

    traffic: str
    policy: str
    ratio: float
    ratio_fused_layers: float
    pages_before: int
    pages_after: int
    bytes_before: int
    bytes_after: int
    kl: float
    kl_worst_request: float
    top1: float
    top1_worst_request: float
    nll: float
    nll_unfused: float
    seconds_fuse: float
    seconds_prefill: float
    requests: int
    prompt_tokens: int
    scored_tokens: int


def left_padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask of left-padded rows, both `[rows, longest]`."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


@dataclass(frozen=True)
class Prefilled:
    """A batch of requests after an unfused prefill, kept outside any pool so that several policies can start from it.

    Attributes:
        state: K, V and tables in one layer group, see `jointkv.hf.saving.State`.
        length: tokens per row, left padding included.
        mask: attention mask of the prompt, `[requests, length]`.
        seconds: time of the forward pass.
    """

    requests: Sequence[Request]
    state: dict[str, Tensor]
    length: int
    mask: Tensor
    seconds: float


@torch.inference_mode()
def prefill(model: PreTrainedModel, requests: Sequence[Request], *, block_size: int = 16) -> Prefilled:
    """Prefill all but the last prompt token of `requests` as one left-padded batch."""
    cache = JointCache(JointPool(model, "off", block_size=block_size))
    prompt, mask = left_padded([request.prompt[:-1] for request in requests], pad=model.config.pad_token_id or 0)
    start = time.perf_counter()
    model(
        input_ids=prompt.to(model.device),
        attention_mask=mask.to(model.device),
        position_ids=(mask.cumsum(1) - 1).clamp(min=0).to(model.device),
        past_key_values=cache,
        logits_to_keep=1,
    )
    seconds = time.perf_counter() - start
    return Prefilled(requests, cache.state(), cache.length, mask, seconds)


class FusedBatch(HeldBatch):
    """A prefilled batch on pages of a `JointPool` of its own, fused under a policy.

    `nbytes` are the pages in use at the allocator, and the scales of members that read a shared direction.

    Attributes:
        cache: the cache; `cache.pool` counts.
        pages_before: pages in use before anything was fused.
        pages_after: pages in use after it.
        ratio_fused_layers: references per page over the layers that take part in fusion.
    """

    counted = "allocator"

    def __init__(self, model: PreTrainedModel, batch: Prefilled, policy: FusionPolicy, *, block_size: int = 16) -> None:
        self.model = model
        self.cache = JointCache(JointPool(model, policy, block_size=block_size))
        self._mask = batch.mask
        with torch.inference_mode():
            self.cache.restore(batch.length, regroup(batch.state, self.cache.pool.groups.layers))
        stats = self.cache.pool.stats()
        self.pages_before, self.pages_after = stats["pages_peak"], stats["pages_used"]
        self.ratio_fused_layers = _ratio_fused_layers(self.cache)
        self.nbytes = stats["bytes_used"] + sum(
            scale.nbytes for table in self.cache.tables for scale in (table.k_scale, table.v_scale) if scale is not None
        )

    @torch.inference_mode()
    def feed(self, tokens: Tensor) -> Tensor:
        device = self.model.device
        positions = self._mask.sum(1, keepdim=True) + torch.arange(tokens.shape[1])
        self._mask = torch.cat((self._mask, torch.ones_like(tokens)), 1)
        return self.model(
            input_ids=tokens.to(device),
            attention_mask=self._mask.to(device),
            position_ids=positions.to(device),
            past_key_values=self.cache,
        ).logits

    def fork(self) -> FusedBatch:
        """A copy that reads the same pages; its blocks may fuse with this one's as any others in the pool."""
        twin = copy.copy(self)
        twin.cache = copy.deepcopy(self.cache)
        return twin


def hold(model: PreTrainedModel, batch: Prefilled, policy: FusionPolicy, *, block_size: int = 16) -> Held:
    """Put `batch` on pages, fuse it under `policy`, then feed the last prompt token and the true continuation.

    Every scored distribution therefore comes after the fused prompt.
    """
    fused = FusedBatch(model, batch, policy, block_size=block_size)
    stats = fused.cache.pool.stats()
    logits = fused.feed(scored_tokens(batch.requests))
    fused.cache.check_integrity()
    return Held(
        pages_before=fused.pages_before,
        pages_after=fused.pages_after,
        page_bytes=stats["page_bytes"],
        ratio_fused_layers=fused.ratio_fused_layers,
        seconds_fuse=stats["seconds_fusing"],
        logits=logits,
    )


def regroup(state: dict[str, Tensor], layers_per_group: int) -> dict[str, Tensor]:
    """Lay out a state of one layer group for groups of `layers_per_group` layers: more, smaller pages."""
    layers = sum(name.startswith("key.") for name in state)
    groups = layers // layers_per_group
    pages = len(state["key.0"])
    other = {
        name: tensor for name, tensor in state.items() if name.split(".")[0] not in ("key", "value", "table", "served")
    }
    for side in ("key", "value"):
        for member in range(layers_per_group):
            parts = [state[f"{side}.{group * layers_per_group + member}"] for group in range(groups)]
            other[f"{side}.{member}"] = torch.cat(parts) if groups > 1 else parts[0]
    table = state["table.0"]
    for group in range(groups):
        other[f"table.{group}"] = torch.where(table < 0, table, table + group * pages)
        other[f"served.{group}"] = state["served.0"]
    return other


def compare(traffic: str, name: str, batch: Prefilled, held: Held, unfused: Held) -> Row:
    """Score `held` against `unfused`, the same requests under policy `off`."""
    scorer = Scorer()
    for logits, reference, request in zip(held.logits, unfused.logits, batch.requests, strict=True):
        scorer.add(logits, reference, torch.tensor(request.continuation))
    fidelity = scorer.result()
    return Row(
        traffic=traffic,
        policy=name,
        ratio=held.pages_before / held.pages_after,
        ratio_fused_layers=held.ratio_fused_layers,
        pages_before=held.pages_before,
        pages_after=held.pages_after,
        bytes_before=unfused.pages_after * unfused.page_bytes,
        bytes_after=held.pages_after * held.page_bytes,
        kl=fidelity.kl,
        kl_worst_request=fidelity.kl_worst_request,
        top1=fidelity.top1,
        top1_worst_request=fidelity.top1_worst_request,
        nll=fidelity.nll,
        nll_unfused=fidelity.nll_reference,
        seconds_fuse=held.seconds_fuse,
        seconds_prefill=batch.seconds,
        requests=len(batch.requests),
        prompt_tokens=sum(len(request.prompt) for request in batch.requests),
        scored_tokens=fidelity.positions,
    )


def _ratio_fused_layers(cache: JointCache) -> float:
    groups = cache.pool.groups
    held = [table.held() for group, table in enumerate(cache.tables) if groups.fused[group]]
    if not held:
        return 1.0
    entries = torch.cat(held)
    return len(entries) / len(entries.unique())
