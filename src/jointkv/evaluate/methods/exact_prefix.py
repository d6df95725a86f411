"""Exact prefix sharing in blocks, which is what the prefix cache of vLLM and other engines does."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch import Tensor

from jointkv.evaluate.holding.batch import Batch
from jointkv.evaluate.holding.held import HeldBatch
from jointkv.evaluate.methods.base import Method
from jointkv.evaluate.traffic.base import Request
from jointkv.policy import FusionPolicy


class ExactPrefix(Method):
    """Full blocks are shared when they and everything before them have equal token ids."""

    name = "exact_prefix"
    description = "full blocks shared by requests whose text is equal from the start, as in a prefix cache"
    levels = (1.0,)
    level_means = "nothing to set"
    allowed = "1"
    shares_across_requests = True
    frees_engine_memory = True

    def allows(self, level: float) -> bool:
        return level == 1

    def compress(self, batch: Batch, level: float) -> HeldBatch:
        from jointkv.evaluate.holding.fused import FusedBatch

        prefilled = batch.prefilled
        shared = dataclasses.replace(prefilled, state=share_prefixes(prefilled.state, batch.requests, batch.block_size))
        return FusedBatch(batch.model, shared, FusionPolicy.preset("off"))


def share_prefixes(state: dict[str, Tensor], requests: Sequence[Request], block_size: int) -> dict[str, Tensor]:
    """`state` of a `JointCache` in one layer group, with one page for each distinct prefix of full blocks."""
    table = state["table.0"].clone()
    first: dict[tuple[int, ...], int] = {}
    for row, request in enumerate(requests):
        for slot in range((len(request.prompt) - 1) // block_size):
            prefix = request.prompt[: (slot + 1) * block_size]
            table[row, slot] = first.setdefault(prefix, int(table[row, slot]))
    kept, local = table[table >= 0].unique(return_inverse=True)
    shared = {**state, "table.0": table.masked_scatter(table >= 0, local)}
    for name in state:
        if name.startswith(("key.", "value.")):
            shared[name] = state[name][kept]
    return shared
