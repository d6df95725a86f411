"""The workers' part: compares pages on real K and V, and replaces table entries that the scheduler has committed."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from jointkv.core.bookkeeping import bookkeeping
from jointkv.core.packed import PackedPages
from jointkv.errors import IntegrityError
from jointkv.fusion.pair_sums import pair_cosines, pair_errors, pair_sums, with_own_norms
from jointkv.policy import FusionPolicy
from jointkv.vllm_plugin.attention.norms import OwnNorms
from jointkv.vllm_plugin.messages import Inquiry, Remap, Verdict


class PageComparer:
    """Answers which pairs of pages are within the bounds of a policy.

    Args:
        policy: its thresholds; one per layer group where they differ.
        groups: pages of each KV-cache group that takes part, by group number.
        norms: takes the factors, where blocks keep their own norms.
    """

    def __init__(self, policy: FusionPolicy, groups: dict[int, PackedPages], norms: OwnNorms | None = None) -> None:
        self.policy = policy
        self.groups = groups
        self.norms = norms
        self._threshold_of = {number: place for place, number in enumerate(sorted(groups))}
        # Builds the kernel now rather than inside the first request; what goes wrong will do so there, and be told.
        with contextlib.suppress(Exception):
            for pages in groups.values():
                pair_sums(pages, torch.tensor([0]), torch.tensor([0]))

    @bookkeeping
    def answer(self, inquiry: Inquiry) -> Verdict:
        """Compare the pairs of `inquiry`. Changes nothing but what `norms` proposes."""
        start = time.perf_counter()
        count = len(inquiry.group)
        accepted = np.zeros(count, bool)
        errors = np.full((3, count), np.inf, np.float32)
        norms = self.norms
        factors = torch.ones(count, 0 if norms is None else norms.layers, 2)
        for number in np.unique(inquiry.group):
            chosen = inquiry.group == number
            own, other = (torch.from_numpy(pages[chosen]) for pages in (inquiry.own, inquiry.other))
            sums = pair_sums(self.groups[int(number)], own, other)
            cosines = pair_cosines(sums)
            if norms is not None and norms.enabled:
                sums, found = with_own_norms(sums)
                factors[torch.from_numpy(chosen), : found.shape[1]] = found
            accepted[chosen], errors[:, chosen] = self._judged(int(number), sums, cosines)
        if norms is not None:
            norms.propose(inquiry.step, factors)
        return Verdict(inquiry.step, accepted, *errors, seconds=time.perf_counter() - start)

    def _judged(
        self, number: int, sums: torch.Tensor, cosines: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[np.ndarray, np.ndarray]:
        rule = self.policy.rule(self._threshold_of[number])
        errors = pair_errors(sums, rule.across_layers)
        accepted = rule.allows(errors, cosines)
        return accepted.numpy(), torch.stack(errors).numpy()


def apply_remaps(runner: Any, remaps: Sequence[Remap]) -> None:
    """Replace entries in the block tables of a V1 `model_runner`, both of the request and of its row in the batch.

    A request that has left the runner is passed over: its table is gone with it.
    """
    for request_id, group, slot, page, *_ in remaps:
        request = runner.requests.get(request_id)
        if request is None or slot >= len(request.block_ids[group]):
            continue
        request.block_ids[group][slot] = page
        row = runner.input_batch.req_id_to_index.get(request_id)
        if row is not None:
            runner.input_batch.block_table[group].block_table.np[row, slot] = page


def check_tables(runner: Any, tables: dict[str, tuple[list[int], ...]]) -> None:
    """Raises IntegrityError when a scheduled request's tables differ from the scheduler's."""
    for request_id, groups in tables.items():
        row = runner.input_batch.req_id_to_index[request_id]
        for group, pages in enumerate(groups):
            table = runner.input_batch.block_table[group].block_table.np[row, : len(pages)]
            if runner.requests[request_id].block_ids[group] != pages or table.tolist() != pages:
                raise IntegrityError(f"worker and scheduler disagree on the table of {request_id}, group {group}")
