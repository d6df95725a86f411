"""Audits of reuse: requests that nothing was chosen on, all computed, each compared with what it would have reused."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from jointkv.evaluate.progress import Progress
from jointkv.evaluate.traffic.base import Request
from jointkv.hf.cache import JointCache
from jointkv.hf.pool import JointPool
from jointkv.hf.prefill_result import RowPrefill
from jointkv.hf.reuse import ReuseOptions
from jointkv.policy import FusionPolicy
from jointkv.policy.profile import ReuseEvidence
from jointkv.policy.reuse import ReuseRule
from jointkv.theory.confidence import UpperLimit

RESIDENT = 32
"""Requests whose pages are kept for those that follow, the latest ones."""

RESIDENT_MOVED = 1
"""The same where text that moved is audited: of many one has it at the same position, and it is read there instead."""

CONFIDENCE = 0.95
"""Of the limit that is shown; a licence reads the audits at its own."""

NEAR = (1.0, 0.75)
"""Ratios of entry blocks that are tried, the boldest first, before the rule's own."""

TOLERATED = 0.01
"""Share of blocks beyond the bounds by which a bolder rule is taken: half of what a licence allows, unless told."""

ENOUGH = round(1 / TOLERATED)
"""Blocks with new echoes of which that is asked; fewer would not show it."""


class _Walk(NamedTuple):
    """Blocks that would be reused, and those of them beyond the bounds."""

    blocks: int
    missed: int

    @property
    def is_tolerable(self) -> bool:
        return self.missed <= TOLERATED * self.blocks

    @property
    def share(self) -> float:
        return self.missed / self.blocks if self.blocks else 0.0

    @classmethod
    def still(cls, row: RowPrefill) -> _Walk:
        return cls(row.audited_blocks - row.audited_moved, row.missed_blocks - row.missed_moved)

    @classmethod
    def moved(cls, row: RowPrefill) -> _Walk:
        return cls(row.audited_moved, row.missed_moved)

    def beyond(self, other: _Walk) -> _Walk:
        """What this walk has besides `other`."""
        return _Walk(max(0, self.blocks - other.blocks), max(0, self.missed - other.missed))


class Audit:
    """Audits of reuse under one policy.

    Args:
        policy: with the bounds of the blocks.
        moved: whether text that stands at other positions is audited as well.
    """

    def __init__(
        self, model: PreTrainedModel, policy: FusionPolicy, block_size: int, progress: Progress, moved: bool = False
    ) -> None:
        self._model, self._policy, self._block_size, self._progress = model, policy, block_size, progress
        self._moved = moved

    def rule(self, requests: Sequence[Request]) -> ReuseRule:
        """What may count as evidence: how far an entry block may be, and whether blocks with new echoes are read.

        Every block is taken as if nothing were known of its page, as when many requests follow the first of its kind.
        New echoes are let through where few enough of those blocks themselves are beyond the bounds.
        """
        rule = ReuseRule()
        for near in NEAR:
            walks = self._walks(requests, ReuseRule(near=near))
            if any(walk.blocks for walk in walks) and all(walk.is_tolerable for walk in walks):
                rule = ReuseRule(near=near)
                break
        else:
            walks = self._walks(requests, rule)
        bolder = replace(rule, echoes=False)
        echoing = [more.beyond(walk) for more, walk in zip(self._walks(requests, bolder), walks, strict=True)]
        enough = sum(walk.blocks for walk in echoing) >= ENOUGH
        return bolder if enough and all(walk.is_tolerable for walk in echoing) else rule

    def evidence(self, requests: Sequence[Request], rule: ReuseRule) -> ReuseEvidence:
        """What reuse would do with `requests`, one after another, and how many blocks would be beyond the bounds."""
        found = self._said(requests, rule)
        if not self._moved:
            return found
        return found.model_copy(update={"moved": self._said(requests, rule, moved=True)})

    def _walks(self, requests: Sequence[Request], rule: ReuseRule) -> list[_Walk]:
        """What of `requests` would be reused where they are, and where wanted at other positions as well."""
        alone = replace(rule, witnesses=sys.maxsize)
        walks = [self._rows(requests, alone, moved) for moved in ((False, True) if self._moved else (False,))]
        return [
            _Walk(sum(row.audited_blocks for row in rows), sum(row.missed_blocks for row in rows)) for rows in walks
        ]

    def _said(self, requests: Sequence[Request], rule: ReuseRule, moved: bool = False) -> ReuseEvidence:
        """What audits of blocks that stand where they are read say, or of those that moved.

        Here all requests are computed, and pages have a witness for each. Under a licence few are computed, and pages
        may have none: of each request that walk counts of which the larger share is beyond the bounds.
        """
        unwitnessed = replace(rule, witnesses=sys.maxsize, margin=sys.float_info.max)
        walks = [
            [_Walk.moved(row) if moved else _Walk.still(row) for row in self._rows(requests, each, moved)]
            for each in (rule, unwitnessed)
        ]
        worse = [max(pair, key=lambda walk: (walk.share, walk.blocks)) for pair in zip(*walks, strict=True)]
        limit = UpperLimit(CONFIDENCE)
        for walk in worse:
            if walk.blocks:
                limit.observe(walk.share)
        blocks = sum(walk.blocks for walk in worse)
        return ReuseEvidence(
            audits=limit.count,
            blocks=blocks,
            missed_blocks=sum(walk.missed for walk in worse),
            skipped=blocks * self._block_size / sum(len(request.prompt) for request in requests),
            limit=limit.limit,
            evidence=limit.to_json(),
            near=rule.near,
            echoes=rule.echoes,
        )

    def _rows(self, requests: Sequence[Request], rule: ReuseRule, moved: bool = False) -> list[RowPrefill]:
        options = ReuseOptions(mode="probed", audit_rate=1.0, rule=rule, seed=0, moved=moved)
        pool = JointPool(self._model, self._policy, block_size=self._block_size, reuse=options)
        kept: deque[JointCache] = deque(maxlen=RESIDENT_MOVED if moved else RESIDENT)
        rows = list[RowPrefill]()
        for number, request in enumerate(requests, start=1):
            cache = JointCache(pool)
            rows += cache.prefill(self._model, torch.tensor([request.prompt])).rows
            kept.append(cache)
            self._progress.part(number / len(requests))
        return rows
