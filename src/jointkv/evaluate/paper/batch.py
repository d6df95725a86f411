"""The paper's Table 1 and Figure 5: ratio and answers against the size of the batch, at fixed thresholds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from jointkv.evaluate.compare.comparison import Outputs
from jointkv.evaluate.holding import prefilled
from jointkv.evaluate.paper.setup import OFF, Outcome, Sample, Setup, fidelity_of, policies
from jointkv.evaluate.tasks.metrics import token_f1
from jointkv.evaluate.traffic.base import Request, Tokenizer

LEAST_SIZES = 3


@dataclass(frozen=True)
class BatchRow:
    """One batch under one policy.

    Attributes:
        source, stand_in: where the rows come from, and whether they stand for a data set that could not be had.
        threshold: cosine of keys; None for `safe`, which has none.
        ratio: pages before / after, all layers, at the allocator.
        kl ... nll_unfused: see `Fidelity`, over the true tokens after the prompts.
        f1, f1_unfused: mean token F1 of the greedy continuation against the true one.
    """

    dataset: str
    source: str
    stand_in: bool
    policy: str
    threshold: float | None
    batch: int
    prompt_tokens: int
    ratio: float
    ratio_fused_layers: float
    kl: float
    kl_worst_request: float
    top1: float
    nll: float
    nll_unfused: float
    f1: float
    f1_unfused: float


@dataclass(frozen=True)
class GrowthRow:
    """How the ratio grows with the batch size B, fitted by `a + b ln B` and by `a + b B`.

    Attributes:
        ratio: which one: `ratio`, that levels off where the layers left out outweigh the rest, or `ratio_fused_layers`.
        r2_log, r2_linear: share of the variance explained; None where the ratio does not change.
        slope_log: `b` of the first: added ratio when B grows e-fold.
    """

    dataset: str
    policy: str
    threshold: float | None
    ratio: str
    sizes: int
    slope_log: float
    r2_log: float | None
    r2_linear: float | None


def run_batch(setup: Setup, drawn: Sample) -> list[BatchRow]:
    """All batch sizes of one data set under all policies, from one prefill of the largest."""
    whole = setup.prefilled(drawn)
    if len(drawn.requests) > setup.settings.largest:
        whole = prefilled.take(whole, range(setup.settings.largest))
    setup.report(f"{drawn.dataset}: unfused")
    unfused = setup.outcome(whole, OFF)
    rows = []
    for size in setup.settings.sizes:
        part = whole if size == len(whole.requests) else prefilled.take(whole, range(size))
        for name, threshold, policy in policies(setup.settings.thresholds):
            setup.report(f"{drawn.dataset}: batch of {size}, {label(name, threshold)}")
            found = setup.outcome(part, policy)
            measured = _compare(found, unfused, part.requests, setup.tokenizer)
            rows.append(
                BatchRow(drawn.dataset, drawn.source, drawn.stand_in, name, threshold, size, part.length, **measured)
            )
    return rows


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
                fits.append(GrowthRow(*key, name, len(found), slope, r2_log, _fit(sizes, ratios)[1]))
    return fits


def label(policy: str, threshold: float | None) -> str:
    """A policy and its threshold, for tables."""
    return policy if threshold is None else f"{policy} {threshold:g}"


def _compare(found: Outcome, unfused: Outcome, requests: Sequence[Request], tokenizer: Tokenizer) -> dict[str, float]:
    count = len(requests)
    fidelity = fidelity_of(found.logits, unfused.logits[:count], requests)
    return {
        "ratio": found.pages_before / found.pages_after,
        "ratio_fused_layers": found.ratio_fused_layers,
        "kl": fidelity.kl,
        "kl_worst_request": fidelity.kl_worst_request,
        "top1": fidelity.top1,
        "nll": fidelity.nll,
        "nll_unfused": fidelity.nll_reference,
        "f1": _mean_f1(found.outputs, requests, tokenizer),
        "f1_unfused": _mean_f1(unfused.outputs[:count], requests, tokenizer),
    }


def _mean_f1(outputs: Outputs, requests: Sequence[Request], tokenizer: Tokenizer) -> float:
    pairs = zip(outputs, requests, strict=True)
    texts = [[tokenizer.decode(list(ids)) for ids in (output, request.continuation)] for output, request in pairs]
    return fmean(token_f1(given, true) for given, true in texts)


def _fit(x: Sequence[float], y: Sequence[float]) -> tuple[float, float | None]:
    """Slope of the line of least squares, and its r2."""
    slope, start = np.polyfit(x, y, 1)
    left = np.asarray(y) - (start + slope * np.asarray(x))
    spread = np.var(y)
    return float(slope), None if spread < 1e-12 else float(1 - np.mean(left**2) / spread)
