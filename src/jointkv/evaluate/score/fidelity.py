"""How far next-token distributions moved from the unfused model's: KL, equal top-1, log-likelihood."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from jointkv.errors import LayoutError
from jointkv.evaluate.score.summary import RequestSums

# Positions widened to float64 at a time: 64 of a vocabulary of 150k are 80 MB per copy.
_CHUNK = 64


def score(
    logits: Tensor, reference_logits: Tensor, continuations: Tensor | Sequence[Sequence[int]]
) -> tuple[RequestSums, ...]:
    """Score `logits` against `reference_logits`, both `[requests, positions, vocab]`, request by request.

    `continuations` has the true next token ids, `[requests, positions]`. Works on some positions at a time to bound
    memory. Raises `LayoutError` for other shapes or dtypes, no position, or a token outside the vocabulary.
    """
    targets = torch.as_tensor(continuations)
    if logits.ndim != 3 or logits.shape != reference_logits.shape or not all(logits.shape[1:]):
        raise LayoutError(
            "logits and reference logits must have one shape [requests, positions, vocab], "
            f"got {tuple(logits.shape)} and {tuple(reference_logits.shape)}"
        )
    if not (logits.is_floating_point() and reference_logits.is_floating_point()):
        raise LayoutError(f"logits must be floating point, got {logits.dtype} and {reference_logits.dtype}")
    if targets.shape != logits.shape[:2]:
        raise LayoutError(f"targets must be {tuple(logits.shape[:2])}, got {tuple(targets.shape)}")
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise LayoutError(f"targets must be integer token ids, got {targets.dtype}")
    if targets.numel() and not 0 <= int(targets.min()) <= int(targets.max()) < logits.shape[2]:
        raise LayoutError(
            f"targets must lie in 0..{logits.shape[2] - 1}, got {int(targets.min())}..{int(targets.max())}"
        )
    return tuple(_request_sums(*row) for row in zip(logits, reference_logits, targets, strict=True))


def _request_sums(logits: Tensor, reference: Tensor, targets: Tensor) -> RequestSums:
    parts = zip(logits.split(_CHUNK), reference.split(_CHUNK), targets.split(_CHUNK), strict=True)
    kl, top1_equal, nll, nll_reference = map(sum, zip(*(_sums(*part) for part in parts), strict=True))
    return RequestSums(len(targets), kl, int(top1_equal), nll, nll_reference)


def _sums(logits: Tensor, reference: Tensor, targets: Tensor) -> tuple[float, int, float, float]:
    """KL, positions of equal top-1, and both negative log-likelihoods, summed over some positions of one request."""
    log_q = torch.log_softmax(logits.to(reference.device, torch.float64), dim=-1)
    log_p = torch.log_softmax(reference.to(torch.float64), dim=-1)
    p = log_p.exp()
    # A token ruled out by the reference (logit -inf) adds 0; the plain product would be 0 * inf = NaN.
    kl = torch.where(p == 0, 0.0, p * (log_p - log_q)).sum(dim=-1)
    picked = targets.to(reference.device, torch.int64).unsqueeze(1)
    return (
        # KL is never negative; what is left below zero is rounding.
        kl.clamp(min=0).sum().item(),
        int((log_q.argmax(dim=-1) == log_p.argmax(dim=-1)).sum()),
        -log_q.gather(1, picked).sum().item(),
        -log_p.gather(1, picked).sum().item(),
    )
