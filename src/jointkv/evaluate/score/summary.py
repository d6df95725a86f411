"""Fidelity as numbers: sums by request, and the means over all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jointkv.errors import LayoutError


@dataclass(frozen=True)
class RequestSums:
    """Sums over the scored positions of one request, from which `summarize` takes the means."""

    positions: int
    kl: float
    top1_equal: int
    nll: float
    nll_reference: float


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


def summarize(rows: Sequence[RequestSums]) -> Fidelity:
    """Fidelity over `rows`; positions count equally, whichever request they belong to.

    A NaN in any row shows as NaN. Raises `LayoutError` when there is no row.
    """
    if not rows:
        raise LayoutError("no request was scored")
    positions = sum(row.positions for row in rows)
    return Fidelity(
        kl=sum(row.kl for row in rows) / positions,
        # Python's max drops a NaN depending on the order.
        kl_worst_request=float(np.max([row.kl / row.positions for row in rows])),
        top1=sum(row.top1_equal for row in rows) / positions,
        top1_worst_request=min(row.top1_equal / row.positions for row in rows),
        nll=sum(row.nll for row in rows) / positions,
        nll_reference=sum(row.nll_reference for row in rows) / positions,
        requests=len(rows),
        positions=positions,
    )
