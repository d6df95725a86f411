"""The paper's Table 1 and Figure 5: ratio and answers against the size of the batch, at fixed thresholds."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from statistics import fmean

import numpy as np

from jointkv.evaluate.holding.fused import OFF, FusedBatch
from jointkv.evaluate.holding.held import greedy
from jointkv.evaluate.holding.prefilled import Prefilled, take
from jointkv.evaluate.paper.result import BatchRow, GrowthRow
from jointkv.evaluate.paper.setup import Sample, Setup, compared, label, policies
from jointkv.evaluate.tasks.metrics import token_f1

LEAST_SIZES = 3


def run_batch(setup: Setup, drawn: Sample) -> list[BatchRow]:
    """All batch sizes of one data set under all policies, from one prefill of the largest."""
    settings = setup.settings
    whole = setup.prefilled(drawn)
    if len(drawn.requests) > settings.largest:
        whole = take(whole, range(settings.largest))
    setup.report(f"{drawn.dataset}: unfused")
    _, reference, unfused_f1 = setup.outcome(whole, OFF, partial(_f1_scores, setup, whole))
    rows = []
    for size in settings.sizes:
        part = whole if size == len(whole.requests) else take(whole, range(size))
        for name, threshold, policy in policies(settings.thresholds):
            setup.report(f"{drawn.dataset}: batch of {size}, {label(name, threshold)}")
            held, logits, f1 = setup.outcome(part, policy, partial(_f1_scores, setup, part))
            measured, fidelity = compared(held, logits, reference[:size], part.requests)
            rows.append(
                BatchRow(
                    **drawn.origin,
                    policy=name,
                    threshold=threshold,
                    batch=size,
                    prompt_tokens=part.length,
                    kl_worst_request=fidelity.kl_worst_request,
                    f1=fmean(f1),
                    f1_unfused=fmean(unfused_f1[:size]),
                    **measured,
                )
            )
    return rows


def _f1_scores(setup: Setup, batch: Prefilled, held: FusedBatch) -> list[float]:
    """Token F1 of what is written greedily, by request."""
    outputs = greedy(held, batch.requests, setup.settings.answer_tokens)
    pairs = zip(outputs, batch.requests, strict=True)
    texts = [[setup.tokenizer.decode(list(ids)) for ids in (output, request.continuation)] for output, request in pairs]
    return [token_f1(given, true) for given, true in texts]


def growth(rows: Sequence[BatchRow]) -> list[GrowthRow]:
    """The fits for every data set and threshold that has at least `LEAST_SIZES` batch sizes."""
    series: dict[tuple[str, str, float | None], list[BatchRow]] = {}
    for row in rows:
        series.setdefault((row.dataset, row.policy, row.threshold), []).append(row)
    fits = []
    for key, found in series.items():
        if len(found) >= LEAST_SIZES:
            sizes = [float(row.batch) for row in found]
            for name in ("ratio", "ratio_fused_layers"):
                ratios = [getattr(row, name) for row in found]
                slope, r2_log = _fit(np.log(sizes).tolist(), ratios)
                fits.append(
                    GrowthRow(
                        dataset=key[0],
                        policy=key[1],
                        threshold=key[2],
                        ratio=name,
                        sizes=len(found),
                        slope_log=slope,
                        r2_log=r2_log,
                        r2_linear=_fit(sizes, ratios)[1],
                    )
                )
    return fits


def _fit(x: Sequence[float], y: Sequence[float]) -> tuple[float, float | None]:
    """Slope of the line of least squares, and its r2."""
    slope, start = np.polyfit(x, y, 1)
    left = np.asarray(y) - (start + slope * np.asarray(x))
    spread = np.var(y)
    return float(slope), None if spread < 1e-12 else float(1 - np.mean(left**2) / spread)
