"""Audits of reuse: requests that nothing was chosen on, all computed, each compared with what it would have reused."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from jointkv.evaluate.progress import Progress
from jointkv.evaluate.traffic.base import Request
from jointkv.hf.cache import JointCache
from jointkv.hf.pool import JointPool
from jointkv.hf.prefill import RowPrefill
from jointkv.hf.reuse import ReuseOptions
from jointkv.policy import FusionPolicy
from jointkv.policy.profile import ReuseEvidence
from jointkv.theory.confidence import UpperLimit

RESIDENT = 32
"""Requests whose pages are kept for those that follow, the latest ones."""

CONFIDENCE = 0.95
"""Of the limit that is shown; a licence reads the audits at its own."""


def audit(
    model: PreTrainedModel, requests: Sequence[Request], policy: FusionPolicy, block_size: int, progress: Progress
) -> ReuseEvidence:
    """What reuse would do with `requests`, one after another, and how many of the blocks would be beyond the bounds."""
    options = ReuseOptions(mode="probed", audit_rate=1.0, seed=0)
    pool = JointPool(model, policy, block_size=block_size, reuse=options)
    kept: deque[JointCache] = deque(maxlen=RESIDENT)
    limit, rows = UpperLimit(CONFIDENCE), list[RowPrefill]()
    for number, request in enumerate(requests, start=1):
        kept.append(JointCache(pool))
        (row,) = kept[-1].prefill(model, torch.tensor([request.prompt])).rows
        if row.audited_blocks:
            limit.observe(row.missed_blocks / row.audited_blocks)
        rows.append(row)
        progress.part(number / len(requests))
    blocks = sum(row.audited_blocks for row in rows)
    return ReuseEvidence(
        audits=limit.count,
        blocks=blocks,
        missed_blocks=sum(row.missed_blocks for row in rows),
        skipped=blocks * block_size / sum(row.tokens for row in rows),
        limit=limit.limit,
        evidence=limit.to_json(),
    )
