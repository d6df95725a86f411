"""Semantic caching: a request whose prompt resembles an earlier one is served from that one's cache."""

from __future__ import annotations

import torch
from torch import Tensor

from jointkv.evaluate.holding.batch import Batch
from jointkv.evaluate.holding.dense import LayerStates, layer_states, nbytes_of
from jointkv.evaluate.holding.held import HeldBatch, RebuiltBatch
from jointkv.evaluate.methods.base import Method


class Semantic(Method):
    """The whole cache of the nearest earlier request stands in for a request's own, if it is near enough.

    Prompts are compared by the cosine of their mean input embedding. The reuse ignores what differs between the two
    prompts, as a semantic cache does: the answer is that to the other request.
    """

    name = "semantic"
    description = "reuse of the nearest earlier request's cache, by cosine of the mean input embeddings of prompts"
    levels = (0.9999, 0.9995, 0.999, 0.99)
    level_means = "least cosine of prompt embeddings"
    allowed = "-1 to 1"
    shares_across_requests = True
    frees_engine_memory = True

    def allows(self, level: float) -> bool:
        return -1 <= level <= 1

    def compress(self, batch: Batch, level: float) -> HeldBatch:
        return ReusedBatch(batch, donors(prompt_embeddings(batch), level))


@torch.inference_mode()
def prompt_embeddings(batch: Batch) -> Tensor:
    """Mean input embedding of each prompt as a unit vector, float32 `[requests, hidden]`."""
    table = batch.model.get_input_embeddings().weight
    means = [table[torch.tensor(request.prompt, device=table.device)].float().mean(0) for request in batch.requests]
    return torch.nn.functional.normalize(torch.stack(means), dim=1)


def donors(embeddings: Tensor, threshold: float) -> list[int]:
    """For each request the one whose cache it reads: its own, or that of the nearest earlier one that has its own."""
    cosine = embeddings @ embeddings.T
    chosen: list[int] = []
    for row in range(len(embeddings)):
        owners = sorted(set(chosen))
        nearest = max(owners, key=lambda other: float(cosine[row, other]), default=row)
        chosen.append(nearest if nearest != row and cosine[row, nearest] >= threshold else row)
    return chosen


class ReusedBatch(RebuiltBatch):
    """The caches of those requests that read their own."""

    counted = "tensors"

    def __init__(self, batch: Batch, donors: list[int]) -> None:
        super().__init__(batch.model, [batch.lengths[donor] for donor in donors])
        self._donors = donors
        self._states = {donor: layer_states(batch.dense[donor]) for donor in set(donors)}
        self.nbytes = sum(nbytes_of(states) for states in self._states.values())

    def rebuild(self, request: int) -> LayerStates:
        return self._states[self._donors[request]]
