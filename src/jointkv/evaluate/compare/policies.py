"""Policies side by side on the same requests: pages at the allocator, and fidelity to the unfused cache."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor
from transformers import PreTrainedModel

from jointkv.evaluate.compare.result import PolicyRow
from jointkv.evaluate.holding.fused import OFF, FusedBatch, fused_logits
from jointkv.evaluate.holding.held import true_logits
from jointkv.evaluate.holding.prefilled import Prefilled
from jointkv.evaluate.holding.reused import ReusedBatch
from jointkv.evaluate.progress import Report
from jointkv.evaluate.score.fidelity import score
from jointkv.evaluate.score.summary import summarize
from jointkv.hf.reuse import ReuseOptions
from jointkv.policy import FusionPolicy

REUSING = "safe, reuse"
"""Name of the row of prompts that read each other's pages before they are computed."""


def compare_policies(
    model: PreTrainedModel,
    batch: Prefilled,
    policies: Mapping[str, FusionPolicy],
    traffic: str,
    report: Report,
    reuse: ReuseOptions | None = None,
) -> Iterator[PolicyRow]:
    """A row of the unfused batch, one of each of `policies`, and with `reuse` one of the policy `safe` that reuses.

    `report` gets one line before each.
    """
    reference, bytes_before = None, 0
    for name, policy in {"unfused": OFF, **policies}.items():
        report(f"{traffic}: {name}")
        fused, logits = fused_logits(model, batch, policy)
        if reference is None:
            reference, bytes_before = logits, _bytes(fused)
        yield _row(fused, batch, traffic, name, bytes_before, logits, reference)
    if reuse is not None and reuse.mode != "off" and reference is not None:
        report(f"{traffic}: {REUSING}")
        reused = ReusedBatch(model, batch.requests, policies["safe"], reuse, batch.block_size)
        logits = true_logits(reused, batch.requests)
        yield _row(reused, batch, traffic, REUSING, bytes_before, logits, reference, reused.done.skipped)


def _bytes(fused: FusedBatch) -> int:
    return int(fused.pages_after * fused.cache.pool.stats()["page_bytes"])


def _row(
    fused: FusedBatch,
    batch: Prefilled,
    traffic: str,
    policy: str,
    bytes_before: int,
    logits: Tensor,
    reference: Tensor,
    skipped: int = 0,
) -> PolicyRow:
    fidelity = summarize(score(logits, reference, [request.continuation for request in batch.requests]))
    return PolicyRow(
        traffic=traffic,
        policy=policy,
        ratio=fused.ratio,
        ratio_fused_layers=fused.ratio_fused_layers,
        pages_before=fused.pages_before,
        pages_after=fused.pages_after,
        bytes_before=bytes_before,
        bytes_after=_bytes(fused),
        kl=fidelity.kl,
        kl_worst_request=fidelity.kl_worst_request,
        top1=fidelity.top1,
        top1_worst_request=fidelity.top1_worst_request,
        nll=fidelity.nll,
        nll_unfused=fidelity.nll_reference,
        seconds_fuse=fused.seconds_fuse,
        seconds_prefill=batch.seconds,
        requests=fidelity.requests,
        prompt_tokens=sum(len(request.prompt) for request in batch.requests),
        tokens_skipped=skipped,
        scored_tokens=fidelity.positions,
    )
