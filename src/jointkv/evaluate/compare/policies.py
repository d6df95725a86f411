"""Policies side by side on the same requests: pages at the allocator, and fidelity to the unfused cache."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from transformers import PreTrainedModel

from jointkv.evaluate.compare.result import PolicyRow
from jointkv.evaluate.holding.fused import OFF, fused_logits
from jointkv.evaluate.holding.prefilled import Prefilled
from jointkv.evaluate.progress import Report
from jointkv.evaluate.score.fidelity import score
from jointkv.evaluate.score.summary import summarize
from jointkv.policy import FusionPolicy


def compare_policies(
    model: PreTrainedModel, batch: Prefilled, policies: Mapping[str, FusionPolicy], traffic: str, report: Report
) -> Iterator[PolicyRow]:
    """A row of the unfused batch, then one of each of `policies`; `report` gets one line before each."""
    reference, bytes_before = None, 0
    for name, policy in {"unfused": OFF, **policies}.items():
        report(f"{traffic}: {name}")
        fused, logits = fused_logits(model, batch, policy)
        stats = fused.cache.pool.stats()
        nbytes = fused.pages_after * stats["page_bytes"]
        if reference is None:
            reference, bytes_before = logits, nbytes
        fidelity = summarize(score(logits, reference, [request.continuation for request in batch.requests]))
        yield PolicyRow(
            traffic=traffic,
            policy=name,
            ratio=fused.ratio,
            ratio_fused_layers=fused.ratio_fused_layers,
            pages_before=fused.pages_before,
            pages_after=fused.pages_after,
            bytes_before=bytes_before,
            bytes_after=nbytes,
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
            scored_tokens=fidelity.positions,
        )
