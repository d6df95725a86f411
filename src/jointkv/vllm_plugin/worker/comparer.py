"""Measures how alike pages are, on their real K and V."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from jointkv.core.blocks import LayerAggregate
from jointkv.core.bookkeeping import bookkeeping
from jointkv.core.packed import PackedPages
from jointkv.fusion.packed_directions import packed_cosines
from jointkv.fusion.pair_sums import (
    pair_cosines,
    pair_errors,
    pair_sums,
    start_pair_sums,
    with_own_norms,
)
from jointkv.vllm_plugin.attention.norms import OwnNorms
from jointkv.vllm_plugin.messages import COSINES, ERRORS, Inquiry, Verdict
from jointkv.vllm_plugin.worker.filler import PageFiller
from jointkv.vllm_plugin.worker.signer import PageSigner


@dataclass(frozen=True)
class Comparison:
    """What has begun for an inquiry.

    Attributes:
        parts: which pairs, bool `[n]` or numbers, and what takes their sums from the device.
        seconds: spent so far.
        signatures: takes those that were asked for from the device, where there are any.
        sign_seconds: those of `seconds` spent on them.
        gathered: cosines of the blocks to compare all with all.
    """

    inquiry: Inquiry
    parts: list[tuple[np.ndarray, Callable[[], Tensor]]]
    seconds: float
    signatures: Callable[[], np.ndarray] | None = None
    sign_seconds: float = 0.0
    gathered: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))


class PageComparer:
    """Answers how alike pairs of pages are. It decides nothing.

    Args:
        across_layers: how the errors of layers become one; see `FusionPolicy`.
        groups: pages of each KV-cache group that takes part, by group number.
        norms: takes the factors, where blocks keep their own norms.
        signer: signs pages, where the scheduler asks for it.
        filler: knows what text at another position would be, where the scheduler asks for it.
    """

    def __init__(
        self,
        across_layers: LayerAggregate,
        groups: dict[int, PackedPages],
        norms: OwnNorms | None = None,
        signer: PageSigner | None = None,
        filler: PageFiller | None = None,
    ) -> None:
        self.across_layers, self.filler = across_layers, filler
        self.groups = groups
        self.norms = norms
        self.signer = signer
        # Builds the kernel now rather than inside the first request; what goes wrong will do so there, and be told.
        with contextlib.suppress(Exception):
            for pages in groups.values():
                pair_sums(pages, torch.tensor([0]), torch.tensor([0]))

    @property
    def is_apart(self) -> bool:
        """Whether pages are on a device that compares while the host does something else."""
        return any(pages.device.type != "cpu" for pages in self.groups.values())

    @bookkeeping
    def begin(self, inquiry: Inquiry) -> Comparison:
        """Have the pairs of `inquiry` compared as their pages are once all that was asked of the device is done."""
        start, parts = time.perf_counter(), []
        moved = inquiry.shift != 0
        for number in np.unique(inquiry.group[~moved]):
            chosen = (inquiry.group == number) & ~moved
            own, other = (torch.from_numpy(pages[chosen]) for pages in (inquiry.own, inquiry.other))
            parts.append((chosen, start_pair_sums(self.groups[int(number)], own, other)))
        if moved.any():
            parts += self._begin_moved(inquiry, np.flatnonzero(moved))
        cosines = [
            packed_cosines(self.groups[group], torch.tensor(pages)).numpy().ravel() for group, pages in inquiry.gathered
        ]
        gathered = np.concatenate(cosines) if cosines else np.zeros(0, np.float32)
        compared, signatures = time.perf_counter(), None
        if self.signer is not None and len(inquiry.sign):
            signatures = self.signer.begin(inquiry)
        end = time.perf_counter()
        return Comparison(inquiry, parts, end - start, signatures, end - compared, gathered)

    def _begin_moved(self, inquiry: Inquiry, pairs: np.ndarray) -> Iterator[tuple[np.ndarray, Callable[[], Tensor]]]:
        """Pairs of which the resident block stands at another position, by their numbers."""
        assert self.filler is not None
        for part, pages, own in self.filler.compared(inquiry.own[pairs], inquiry.moved(pairs)):
            yield pairs[part], start_pair_sums(pages, own, len(own) + own)

    @bookkeeping
    def finish(self, comparison: Comparison) -> Verdict:
        """The answer. Changes nothing but what `norms` proposes."""
        start, inquiry = time.perf_counter(), comparison.inquiry
        count = len(inquiry.group)
        errors = np.full((len(ERRORS), count), np.inf, np.float32)
        cosines = np.zeros((len(COSINES), count), np.float32)
        norms = self.norms
        factors = torch.ones(count, 0 if norms is None else norms.layers, 2)
        for chosen, take in comparison.parts:
            sums = take()
            cosines[:, chosen] = torch.stack(pair_cosines(sums)).numpy()
            if norms is not None and norms.enabled:
                sums, found = with_own_norms(sums)
                factors[torch.from_numpy(chosen), : found.shape[1]] = found
            errors[:, chosen] = torch.stack(pair_errors(sums, self.across_layers)).numpy()
        if norms is not None:
            norms.propose(inquiry, factors)
        verdict = Verdict(inquiry.step, *errors, *cosines, gathered=comparison.gathered)
        compared = time.perf_counter()
        if comparison.signatures is not None:
            verdict.signatures = comparison.signatures()
            verdict.sign_seconds = comparison.sign_seconds + time.perf_counter() - compared
        verdict.seconds = comparison.seconds + time.perf_counter() - start
        return verdict
