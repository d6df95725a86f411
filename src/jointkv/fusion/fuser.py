"""Fuses newly filled blocks: against resident ones first, then among themselves."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from jointkv.core.blocks import served_errors
from jointkv.core.bookkeeping import bookkeeping
from jointkv.core.plan import FusionPlan
from jointkv.core.pool import BlockPool
from jointkv.core.table import BlockTable
from jointkv.errors import IntegrityError
from jointkv.fusion.resident import ResidentIndex
from jointkv.fusion.signature import BlockSignature
from jointkv.fusion.tree import plan_matrix
from jointkv.policy import FusionPolicy
from jointkv.policy.rule import NOT_ASKED, Rule

SIGNATURE_SLACK = 1.5
"""A signature's squared distance may exceed the true one by this factor and still be looked at: four
standard deviations at the least. A candidate missed costs compression, never correctness."""


_NO_SCALES: dict[str, Any] = dict.fromkeys(("k_scale", "v_scale", "direction_page", "key_direction", "value_direction"))


@dataclass(frozen=True)
class NewBlocks:
    """Newly filled blocks of one table, for one layer group.

    Attributes:
        row, slot: which blocks, `[n]`.
        keys, which: block `i` may be compared with those of bucket `keys[which[i]]` only.
        tokens: token hashes `[n]`, where the caller knows the text.
    """

    row: Tensor
    slot: Tensor
    keys: Sequence[Hashable]
    which: Tensor
    tokens: Tensor | None = None

    def __len__(self) -> int:
        return len(self.row)

    def take(self, selected: Tensor) -> NewBlocks:
        """The blocks that the mask or index `selected` picks."""
        tokens = None if self.tokens is None else self.tokens[selected]
        return NewBlocks(self.row[selected], self.slot[selected], self.keys, self.which[selected], tokens)


class Fuser:
    """Keeps the index of resident pages of a pool and fuses new blocks into it.

    Args:
        pool: whose pages are compared. Pages that become free leave the index at once.
        policy: what may be fused.

    Attributes:
        counters: `blocks_considered`, `blocks_fused`, `pages_freed`, `blocks_not_finite`, `rejected_by_bound`.
    """

    def __init__(self, pool: BlockPool, policy: FusionPolicy) -> None:
        self.pool = pool
        self.policy = policy
        self.signature = BlockSignature(pool.kv)
        self.index = ResidentIndex(self.signature.size, pool.kv.device)
        self.counters: Counter[str] = Counter()
        pool.on_free(self.index.remove)

    @bookkeeping
    def fuse(self, table: BlockTable, blocks: NewBlocks, group: int = 0) -> FusionPlan:
        """Plan and apply the fusion of `blocks`, then make those that kept their page resident.

        Returns:
            The members of both applied plans and their errors, for statistics; scales and directions are left out.
        """
        blocks = self._unknown(table, blocks)
        self.counters["blocks_considered"] += len(blocks)
        if not len(blocks):
            return FusionPlan.empty()
        pages = table.pages[blocks.row, blocks.slot]
        signatures = self.signature(self.pool.kv, pages)
        usable = signatures.isfinite().all(1).cpu()
        self.counters["blocks_not_finite"] += int((~usable).sum())
        own = (self.pool.references[pages] == 1) & ~table.served[blocks.row, blocks.slot]
        own &= ~table.scaled(blocks.row, blocks.slot)
        movable, found = self._take(blocks, signatures, usable & own)
        resident = self.plan_resident(table, movable, found, group)
        freed = table.apply(resident)
        movable, found = self._take(movable, found, ~_among(movable, resident))
        merged = self.plan_new(table, movable, group)
        freed += table.apply(merged)
        self._make_resident(table, movable, found, merged)
        self._make_resident(table, *self._take(blocks, signatures, usable & ~own), FusionPlan.empty())
        self.counters["blocks_fused"] += len(resident) + merged.pages_released
        self.counters["pages_freed"] += freed
        return FusionPlan.join([dataclasses.replace(plan, **_NO_SCALES) for plan in (resident, merged)])

    def plan_resident(self, table: BlockTable, blocks: NewBlocks, signatures: Tensor, group: int = 0) -> FusionPlan:
        """Plan which of `blocks` resident pages may serve. Changes nothing but the counters."""
        rule = self.policy.rule(group)
        candidates = self._candidates(blocks, signatures, rule)
        if not candidates.numel() or not (candidates >= 0).any():
            return FusionPlan.empty()
        own = table.pages[blocks.row, blocks.slot]
        member, place = (candidates >= 0).nonzero(as_tuple=True)
        served_by = candidates[member, place]
        pairs = (own[member], served_by)
        scales = self._by_side(_norm_ratio, *pairs) if rule.shares_directions else (None, None)
        errors = served_errors(self.pool.kv, *pairs, rule.across_layers, *scales)
        cosines = self._by_side(_mean_cosine, *pairs) if rule.compares_cosines else NOT_ASKED
        accepted = rule.allows(errors, cosines)
        cost, number = torch.full(candidates.shape, torch.inf), torch.zeros_like(candidates)
        cost[member, place] = torch.maximum(errors.key, errors.value).masked_fill(~accepted, torch.inf)
        number[member, place] = torch.arange(len(member))
        best, choice = cost.min(1)
        hit = best < torch.inf
        self.counters["rejected_by_bound"] += int(((candidates >= 0).any(1) & ~hit).sum())
        chosen, members = number[hit, choice[hit]], blocks.take(hit)
        return FusionPlan(
            *(members.row, members.slot, own[hit], served_by[chosen], *errors.take(chosen)),
            *(None if scale is None else scale[:, chosen] for scale in scales),
        )

    def plan_new(self, table: BlockTable, blocks: NewBlocks, group: int = 0) -> FusionPlan:
        """Plan the fusion of `blocks` among themselves, bucket by bucket. Changes nothing."""
        if len(blocks) < 2:
            return FusionPlan.empty()
        order = torch.argsort(blocks.which, stable=True)
        _, sizes = blocks.which[order].unique_consecutive(return_counts=True)
        line = torch.arange(len(sizes)).repeat_interleave(sizes)
        column = torch.arange(len(order)) - (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
        shape = (len(sizes), int(sizes.max()))
        pages, rows, slots = (torch.full(shape, -1) for _ in range(3))
        row, slot = blocks.row[order], blocks.slot[order]
        pages[line, column] = table.pages[row, slot]
        rows[line, column], slots[line, column] = row, slot
        several = sizes > 1
        return plan_matrix(self.pool.kv, pages[several], rows[several], slots[several], self.policy, group)

    def forget(self, pages: Tensor) -> None:
        """Take pages that are about to be written out of the index."""
        self.index.remove(pages)

    def close(self) -> None:
        """Forget everything and stop following the pool."""
        self.pool.off_free(self.index.remove)
        self.index.clear()

    def check_integrity(self) -> None:
        """Raises IntegrityError when the index is inconsistent or knows a free page."""
        self.index.check_integrity()
        free = self.pool.references == 0
        known = self.index.contains(torch.arange(len(free)))
        if (known & free).any():
            raise IntegrityError("the index knows a free page")

    def _unknown(self, table: BlockTable, blocks: NewBlocks) -> NewBlocks:
        """Drop blocks whose page the index knows, and all but one of those that read the same page."""
        pages = table.pages[blocks.row, blocks.slot]
        order = pages.argsort(stable=True)
        first = torch.ones(len(pages), dtype=torch.bool)
        first[order[1:]] = pages[order[1:]] != pages[order[:-1]]
        return blocks.take(first & ~self.index.contains(pages))

    @staticmethod
    def _take(blocks: NewBlocks, signatures: Tensor, selected: Tensor) -> tuple[NewBlocks, Tensor]:
        return blocks.take(selected), signatures[selected.to(signatures.device)]

    def _candidates(self, blocks: NewBlocks, signatures: Tensor, rule: Rule) -> Tensor:
        """Resident pages worth verifying, `[n, k]`, -1 where none."""
        count, source = self.policy.max_candidates, self.policy.candidates
        found = []
        if source != "signature" and blocks.tokens is not None:
            found.append(self.index.same_tokens(blocks.keys, blocks.which, blocks.tokens, count))
        if source != "tokens" or blocks.tokens is None:
            limit = SIGNATURE_SLACK * rule.signature_limit + 1e-5
            found.append(self.index.near(blocks.keys, blocks.which, signatures, limit, count)[0])
        candidates = torch.cat(found, 1)
        if len(found) == 2 and candidates.numel():
            candidates, _ = candidates.sort(1, descending=True)
            repeated = torch.zeros_like(candidates, dtype=torch.bool)
            repeated[:, 1:] = candidates[:, 1:] == candidates[:, :-1]
            candidates = candidates.masked_fill(repeated, -1)
        return candidates

    def _by_side(
        self, compare: Callable[[Tensor, Tensor], Tensor], pages: Tensor, served_by: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`compare` of float32 blocks `[L, n, r]` and those read for them, `[..., n]` on the CPU: of K and of V."""
        kv = self.pool.kv
        parts = [
            [compare(*sides).cpu() for sides in zip(kv.vectors(pages[part]), kv.vectors(served_by[part]), strict=True)]
            for part in kv.batches(len(pages))
        ]
        key, value = (torch.cat(side, -1) for side in zip(*parts, strict=True))
        return key, value

    def _make_resident(self, table: BlockTable, blocks: NewBlocks, signatures: Tensor, merged: FusionPlan) -> None:
        """Index the pages that new blocks hold now: their own, or the shared one, each once."""
        moved = _among(blocks, merged, merged.page != merged.old_page)
        blocks, signatures = self._take(blocks, signatures, ~moved)
        pages = table.pages[blocks.row, blocks.slot]
        if merged.direction_page is not None:
            rewritten = torch.isin(pages, merged.direction_page)
            if rewritten.any():
                signatures[rewritten.to(signatures.device)] = self.signature(self.pool.kv, pages[rewritten])
        self.index.add(blocks.keys, blocks.which, pages, signatures, blocks.tokens)


def _norm_ratio(blocks: Tensor, read: Tensor) -> Tensor:
    """The factor per layer with which a member keeps its own norm."""
    return torch.linalg.vector_norm(blocks, dim=-1) / torch.linalg.vector_norm(read, dim=-1)


def _mean_cosine(blocks: Tensor, read: Tensor) -> Tensor:
    return torch.nn.functional.cosine_similarity(blocks, read, dim=-1).mean(0)


def _among(blocks: NewBlocks, plan: FusionPlan, selected: Tensor | None = None) -> Tensor:
    """Which of `blocks` are members of `plan` (of its `selected` members)."""
    rows, slots = (plan.row, plan.slot) if selected is None else (plan.row[selected], plan.slot[selected])
    width = int(blocks.slot.max()) + 1 if len(blocks) else 1
    return torch.isin(blocks.row * width + blocks.slot, rows * width + slots)
