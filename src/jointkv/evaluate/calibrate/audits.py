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
        rows = self._rows(requests, rule)
        found = self._said([(row, row.audited_blocks, row.missed_blocks) for row in rows], rule)
        if not self._moved:
            return found
        rows = self._rows(requests, rule, moved=True)
        moved = self._said([(row, row.audited_moved, row.missed_moved) for row in rows], rule)
        return found.model_copy(update={"moved": moved})

    def _walks(self, requests: Sequence[Request], rule: ReuseRule) -> list[_Walk]:
        """What of `requests` would be reused where they are, and where wanted at other positions as well."""
        alone = replace(rule, witnesses=sys.maxsize)
        walks = [self._rows(requests, alone, moved) for moved in ((False, True) if self._moved else (False,))]
        return [
            _Walk(sum(row.audited_blocks for row in rows), sum(row.missed_blocks for row in rows)) for rows in walks
        ]

    def _said(self, rows: Sequence[tuple[RowPrefill, int, int]], rule: ReuseRule) -> ReuseEvidence:
        """What `rows` say, each with the blocks of one class that it would have reused, and those beyond the bounds."""
        limit = UpperLimit(CONFIDENCE)
        for _, audited, missed in rows:
            if audited:
                limit.observe(missed / audited)
        blocks = sum(audited for _, audited, _ in rows)
        return ReuseEvidence(
            audits=limit.count,
            blocks=blocks,
            missed_blocks=sum(missed for *_, missed in rows),
            skipped=blocks * self._block_size / sum(row.tokens for row, *_ in rows),
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
