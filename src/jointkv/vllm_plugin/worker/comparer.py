"""Measures how alike pages are, on their real K and V."""

from __future__ import annotations

import contextlib
import time

import numpy as np
import torch

from jointkv.core.blocks import LayerAggregate
from jointkv.core.bookkeeping import bookkeeping
from jointkv.core.packed import PackedPages
from jointkv.fusion.pair_sums import pair_cosines, pair_errors, pair_sums, with_own_norms
from jointkv.vllm_plugin.attention.norms import OwnNorms
from jointkv.vllm_plugin.messages import COSINES, ERRORS, Inquiry, Verdict


class PageComparer:
    """Answers how alike pairs of pages are. It decides nothing.

    Args:
        across_layers: how the errors of layers become one; see `FusionPolicy`.
        groups: pages of each KV-cache group that takes part, by group number.
        norms: takes the factors, where blocks keep their own norms.
    """

    def __init__(
        self, across_layers: LayerAggregate, groups: dict[int, PackedPages], norms: OwnNorms | None = None
    ) -> None:
        self.across_layers = across_layers
        self.groups = groups
        self.norms = norms
        # Builds the kernel now rather than inside the first request; what goes wrong will do so there, and be told.
        with contextlib.suppress(Exception):
            for pages in groups.values():
                pair_sums(pages, torch.tensor([0]), torch.tensor([0]))

    @bookkeeping
    def answer(self, inquiry: Inquiry) -> Verdict:
        """Compare the pairs of `inquiry`. Changes nothing but what `norms` proposes."""
        start = time.perf_counter()
        count = len(inquiry.group)
        errors = np.full((len(ERRORS), count), np.inf, np.float32)
        cosines = np.zeros((len(COSINES), count), np.float32)
        norms = self.norms
        factors = torch.ones(count, 0 if norms is None else norms.layers, 2)
        for number in np.unique(inquiry.group):
            chosen = inquiry.group == number
            own, other = (torch.from_numpy(pages[chosen]) for pages in (inquiry.own, inquiry.other))
            sums = pair_sums(self.groups[int(number)], own, other)
            cosines[:, chosen] = torch.stack(pair_cosines(sums)).numpy()
            if norms is not None and norms.enabled:
                sums, found = with_own_norms(sums)
                factors[torch.from_numpy(chosen), : found.shape[1]] = found
            errors[:, chosen] = torch.stack(pair_errors(sums, self.across_layers)).numpy()
        if norms is not None:
            norms.propose(inquiry, factors)
        return Verdict(inquiry.step, *errors, *cosines, seconds=time.perf_counter() - start)
