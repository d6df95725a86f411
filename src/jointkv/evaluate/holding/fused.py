"""A prefilled batch on fused pages."""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from transformers import PreTrainedModel

from jointkv.evaluate.holding.held import HeldBatch, true_logits
from jointkv.evaluate.holding.prefilled import Prefilled
from jointkv.hf.cache import JointCache
from jointkv.hf.pool import JointPool
from jointkv.policy import FusionPolicy

OFF = FusionPolicy.preset("off")


class FusedBatch(HeldBatch):
    """A prefilled batch on pages of a `JointPool` of its own, fused under a policy.

    `nbytes` are the pages in use at the allocator, and the scales of members that read a shared direction.

    Attributes:
        cache: the cache; `cache.pool` counts.
        pages_before: pages in use before anything was fused.
        pages_after: pages in use after it.
        ratio_fused_layers: references per page over the layers that take part in fusion.
        seconds_fuse: the time that fusing took.
    """

    counted = "allocator"

    def __init__(self, model: PreTrainedModel, batch: Prefilled, policy: FusionPolicy) -> None:
        self.model = model
        self.cache = JointCache(JointPool(model, policy, block_size=batch.block_size))
        self._mask = batch.mask
        with torch.inference_mode():
            self.cache.restore(batch.length, regroup(batch.state, self.cache.pool.groups.layers))
        self._measure()

    def _measure(self) -> None:
        stats = self.cache.pool.stats()
        self.pages_before, self.pages_after = stats["pages_peak"], stats["pages_used"]
        self.seconds_fuse = stats["seconds_fusing"]
        self.ratio_fused_layers = _ratio_fused_layers(self.cache)
        self.nbytes = stats["bytes_used"] + sum(
            scale.nbytes for table in self.cache.tables for scale in (table.k_scale, table.v_scale) if scale is not None
        )

    @property
    def ratio(self) -> float:
        """Pages before over pages after."""
        return self.pages_before / self.pages_after

    @torch.inference_mode()
    def feed(self, tokens: Tensor, seen: Tensor | None = None) -> Tensor:
        """See `HeldBatch.feed`; `seen` is the attention mask of `tokens` where that is not 1 throughout."""
        device = self.model.device
        new = torch.ones_like(tokens) if seen is None else seen
        positions = (self._mask.sum(1, keepdim=True) + new.cumsum(1) - 1).clamp(min=0)
        self._mask = torch.cat((self._mask, new), 1)
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


def fused_logits(model: PreTrainedModel, batch: Prefilled, policy: FusionPolicy) -> tuple[FusedBatch, Tensor]:
    """`batch` fused under `policy`, and its logits over the true continuations, see `true_logits`."""
    fused = FusedBatch(model, batch, policy)
    logits = true_logits(fused, batch.requests)
    fused.cache.check_integrity()
    return fused, logits


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


def _ratio_fused_layers(cache: JointCache) -> float:
    groups = cache.pool.groups
    held = [table.held() for group, table in enumerate(cache.tables) if groups.fused[group]]
    if not held:
        return 1.0
    entries = torch.cat(held)
    return len(entries) / len(entries.unique())
