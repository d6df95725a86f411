"""Compression predicted for unseen requests, from the errors of all pairs of blocks of a sample."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from scipy import stats
from torch import Tensor

from jointkv.evaluate.predict.block_pairs import Lines
from jointkv.policy.profile import Prediction
from jointkv.theory.calibrate import cover
from jointkv.theory.rarefaction import rarefaction


def predict_batch(
    errors: Tensor, lines: Lines, setting: Sequence[float], requests: int, partial: float, *, equal_text: bool = False
) -> Prediction:
    """Ratio of pages for a batch of `requests` requests under one bound per layer group.

    Args:
        errors: `[groups, P, N, N]`, lines by position, see `pair_error_matrices`.
        partial: pages of a request and group that are not full, on average: they are held and never shared.
        equal_text: only blocks of equal tokens are compared.
    """
    allowed = lines.equal_text if equal_text else torch.ones_like(lines.equal_text)
    accepted = torch.cat([(error <= bound) & allowed for error, bound in zip(errors, setting, strict=True)])
    [found] = rarefaction(accepted.numpy(), lines.valid.repeat(len(errors), 1).numpy(), [requests])
    held = partial * requests * len(errors)
    total = found.ratio * found.distinct

    def with_partial(ratio: float) -> float:
        return (total + held) / (total / ratio + held) if total else 1.0

    return Prediction(
        ratio=with_partial(found.ratio), low=with_partial(found.low), high=with_partial(found.high), requests=requests
    )


def predict_chunks(
    errors: Tensor, lines: Lines, setting: Sequence[float], requests: int, partial: float, *, equal_text: bool = False
) -> Prediction:
    """The same for the chunk scope: nothing is shared between requests, so each one has a ratio of its own.

    With pages before and after, `b` and `a`, of every request, the ratio is `sum b / sum a`; its interval is that of a
    ratio estimator (Cochran 1977, 6.4) for a further batch: `R (1 ± t s sqrt(1/n + 1/m) / mean a)`, with `s` the spread
    of `b / R - a`.
    """
    known = int(lines.request.max()) + 1
    before, after = torch.full((2, known), partial * len(errors), dtype=torch.float64)
    columns = torch.arange(lines.valid.shape[1])
    for error, bound in zip(errors, setting, strict=True):
        allowed = error if not equal_text else error.masked_fill(~lines.equal_text, torch.inf)
        own = (cover(allowed, lines.valid, bound) == columns) & lines.valid
        before.index_add_(0, lines.request[lines.valid], torch.ones(int(lines.valid.sum()), dtype=torch.float64))
        after.index_add_(0, lines.request[lines.valid], own[lines.valid].double())
    ratio = float(before.sum() / after.sum())
    if known < 2:
        return Prediction(ratio=ratio, low=1.0, high=float(lines.valid.shape[1]), requests=requests)
    spread = float((before / ratio - after).std()) * (1 / known + 1 / requests) ** 0.5 / float(after.mean())
    part = float(stats.t.ppf(0.975, known - 1)) * spread
    return Prediction(ratio=ratio, low=max(1.0, ratio * (1 - part)), high=ratio * (1 + part), requests=requests)
