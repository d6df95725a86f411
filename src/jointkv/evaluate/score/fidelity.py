"""How far next-token distributions moved from the unfused model's: KL, equal top-1, log-likelihood."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from jointkv.errors import IntegrityError, LayoutError

# Positions widened to float64 at a time: 64 of a vocabulary of 150k are 80 MB per copy.
_CHUNK = 64


@dataclass(frozen=True)
class Fidelity:
    """Candidate logits against reference logits over all scored positions. Natural logarithms throughout."""

    kl: float
    """Mean over positions of KL(reference || candidate), in nats."""
    kl_worst_request: float
    """Largest mean KL of one request, in nats."""
    top1: float
    """Share of positions at which both have the same most likely token."""
    top1_worst_request: float
    """Smallest such share of one request."""
    nll: float
    """Mean negative log-likelihood of the true next tokens under the candidate, in nats per token."""
    nll_reference: float
    """The same under the reference."""
    requests: int
    """How many requests were scored."""
    positions: int
    """How many positions, over all requests, were scored."""


@dataclass(frozen=True)
class RequestSums:
    """Sums over the scored positions of one request, from which `summarize` takes the means."""

    positions: int
    kl: float
    top1_equal: int
    nll: float
    nll_reference: float


class Scorer:
    """Fidelity of requests that are added one at a time, so that the caller never holds all logits.

    Positions count equally, whichever request they belong to. A NaN in any logits shows as NaN in the result.
    """

    def __init__(self) -> None:
        self._rows: list[RequestSums] = []

    def add(
        self, logits_row: Tensor, reference_row: Tensor, targets_row: Tensor, mask_row: Tensor | None = None
    ) -> None:
        """Score one request; the tensors are not kept.

        `logits_row` and `reference_row` are `[positions, vocab]`, `targets_row` `[positions]` holds the true
        next token ids, `mask_row` `[positions]` is True where a position counts. Raises `LayoutError` on any
        other shape or dtype, a target outside the vocabulary, or a request without a position that counts.
        """
        _check_row(logits_row, reference_row, targets_row, mask_row)
        if mask_row is not None:
            logits_row, reference_row = logits_row[mask_row], reference_row[mask_row]
            targets_row = targets_row[mask_row]
        _check_targets(targets_row, vocab=reference_row.shape[1])
        self._rows.append(_sum_request(logits_row, reference_row, targets_row))

    def result(self) -> Fidelity:
        """Fidelity over everything added so far. Raises `LayoutError` when nothing was."""
        return summarize(self._rows)

    @property
    def requests(self) -> tuple[RequestSums, ...]:
        """What was added so far, in that order."""
        return tuple(self._rows)

    def check_integrity(self) -> None:
        """Raises `IntegrityError` unless every request has positions, and no more equal top-1 than those."""
        for index, row in enumerate(self._rows):
            if row.positions < 1 or not 0 <= row.top1_equal <= row.positions or row.kl < 0:
                raise IntegrityError(f"request {index} has impossible sums: {row}")


def summarize(rows: Sequence[RequestSums]) -> Fidelity:
    """Fidelity over `rows`. Raises `LayoutError` when there is none."""
    if not rows:
        raise LayoutError("no request was scored")
    positions = sum(row.positions for row in rows)
    # torch's max keeps a NaN, Python's drops it depending on the order.
    worst_kl = torch.tensor([row.kl / row.positions for row in rows], dtype=torch.float64).max()
    return Fidelity(
        kl=sum(row.kl for row in rows) / positions,
        kl_worst_request=worst_kl.item(),
        top1=sum(row.top1_equal for row in rows) / positions,
        top1_worst_request=min(row.top1_equal / row.positions for row in rows),
        nll=sum(row.nll for row in rows) / positions,
        nll_reference=sum(row.nll_reference for row in rows) / positions,
        requests=len(rows),
        positions=positions,
    )


def score(logits: Tensor, reference_logits: Tensor, targets: Tensor, mask: Tensor | None = None) -> Fidelity:
    """Fidelity of `logits` to `reference_logits`, both `[requests, positions, vocab]`.

    `targets` `[requests, positions]` holds the true next token ids and `mask` of the same shape is True where
    a position counts (everywhere if None). Works on one request at a time to bound memory. Raises
    `LayoutError` as `Scorer.add` and `Scorer.result` do.
    """
    if logits.ndim != 3 or logits.shape != reference_logits.shape:
        raise LayoutError(
            "logits and reference logits must have one shape [requests, positions, vocab], "
            f"got {tuple(logits.shape)} and {tuple(reference_logits.shape)}"
        )
    for name, tensor in (("targets", targets), ("mask", mask)):
        if tensor is not None and tensor.shape != logits.shape[:2]:
            raise LayoutError(f"{name} must be {tuple(logits.shape[:2])}, got {tuple(tensor.shape)}")
    scorer = Scorer()
    for row in range(logits.shape[0]):
        scorer.add(logits[row], reference_logits[row], targets[row], None if mask is None else mask[row])
    return scorer.result()


def common_prefix_length(a: Sequence[int], b: Sequence[int]) -> int:
    """How many token ids `a` and `b` have in common before they first differ or one of them ends."""
    for index, (left, right) in enumerate(zip(a, b, strict=False)):
        if left != right:
            return index
    return min(len(a), len(b))


def cut_at_end(tokens: Sequence[int], ends: Collection[int]) -> tuple[int, ...]:
    """`tokens` up to the first of `ends`, which is kept."""
    stop = next((index for index, token in enumerate(tokens) if token in ends), len(tokens))
    return tuple(tokens[: stop + 1])


def _sum_request(logits: Tensor, reference: Tensor, targets: Tensor) -> RequestSums:
    chunks = [
        _sum_chunk(*chunk)
        for chunk in zip(logits.split(_CHUNK), reference.split(_CHUNK), targets.split(_CHUNK), strict=True)
    ]
    return RequestSums(
        positions=sum(chunk.positions for chunk in chunks),
        kl=sum(chunk.kl for chunk in chunks),
        top1_equal=sum(chunk.top1_equal for chunk in chunks),
        nll=sum(chunk.nll for chunk in chunks),
        nll_reference=sum(chunk.nll_reference for chunk in chunks),
    )


def _sum_chunk(logits: Tensor, reference: Tensor, targets: Tensor) -> RequestSums:
    log_q = torch.log_softmax(logits.to(reference.device, torch.float64), dim=-1)
    log_p = torch.log_softmax(reference.to(torch.float64), dim=-1)
    p = log_p.exp()
    # A token ruled out by the reference (logit -inf) adds 0; the plain product would be 0 * inf = NaN.
    kl = torch.where(p == 0, 0.0, p * (log_p - log_q)).sum(dim=-1)
    picked = targets.to(reference.device, torch.int64).unsqueeze(1)
    return RequestSums(
        positions=targets.shape[0],
        # KL is never negative; what is left below zero is rounding.
        kl=kl.clamp(min=0).sum().item(),
        top1_equal=int((log_q.argmax(dim=-1) == log_p.argmax(dim=-1)).sum()),
        nll=-log_q.gather(1, picked).sum().item(),
        nll_reference=-log_p.gather(1, picked).sum().item(),
    )


def _check_row(logits: Tensor, reference: Tensor, targets: Tensor, mask: Tensor | None) -> None:
    if logits.ndim != 2 or logits.shape != reference.shape or logits.shape[1] == 0:
        raise LayoutError(
            "logits and reference logits of a request must have one shape [positions, vocab], "
            f"got {tuple(logits.shape)} and {tuple(reference.shape)}"
        )
    if not (logits.is_floating_point() and reference.is_floating_point()):
        raise LayoutError(f"logits must be floating point, got {logits.dtype} and {reference.dtype}")
    if targets.shape != logits.shape[:1]:
        raise LayoutError(f"targets of a request must be {tuple(logits.shape[:1])}, got {tuple(targets.shape)}")
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise LayoutError(f"targets must be integer token ids, got {targets.dtype}")
    if mask is not None and (mask.shape != targets.shape or mask.dtype != torch.bool):
        raise LayoutError(
            f"mask of a request must be bool {tuple(targets.shape)}, got {mask.dtype} {tuple(mask.shape)}"
        )


def _check_targets(targets: Tensor, vocab: int) -> None:
    if targets.shape[0] == 0:
        raise LayoutError("a request has no position that counts")
    low, high = int(targets.min()), int(targets.max())
    if low < 0 or high >= vocab:
        raise LayoutError(f"targets must lie in 0..{vocab - 1}, got {low}..{high}")
