"""The study: prefill all texts behind all headers, compare every pair, ask every predictor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel

from jointkv.core.evidence import Known
from jointkv.evaluate.progress import Report
from jointkv.evaluate.reuse.cases import Cases, draw_cases
from jointkv.evaluate.reuse.features import feature_rows
from jointkv.evaluate.reuse.limits import Count, Scored, add, count, held_out, quantile_limits
from jointkv.evaluate.reuse.pairs import Ratios, pair_ratios, prefilled
from jointkv.evaluate.reuse.predictors import PREDICTORS, evidence_of
from jointkv.evaluate.reuse.result import ALL, Curve, HeldOutRow, ReuseResult, RuleRow, Share, TextRow
from jointkv.evaluate.reuse.setup import ReuseSettings, Sample, samples
from jointkv.evaluate.traffic.base import Tokenizer
from jointkv.policy.reuse import ReuseRule

RATES = (0.01, 0.02)
"""Audited miss rates at which skipped shares are compared."""

CURVE_POINTS = 12
DIGITS = 5
CURVE_WITNESSES = 8
"""Curves are drawn for this many, or as many as there are."""

Measured = list[tuple[Sample, Mapping[int, Ratios]]]


def steps(settings: ReuseSettings) -> int:
    """How often `run_reuse` reports."""
    return len(settings.kinds) * settings.texts + len(settings.block_sizes)


def run_reuse(
    model: PreTrainedModel, tokenizer: Tokenizer, name: str, dtype: str, settings: ReuseSettings, progress: Report
) -> ReuseResult:
    """Measure, then predict. Raises `BadInput` for settings that do not fit."""
    settings.check(model)
    return study(measure(model, samples(tokenizer, settings), settings, progress), name, dtype, settings, progress)


def measure(model: PreTrainedModel, made: Sequence[Sample], settings: ReuseSettings, progress: Report) -> Measured:
    """The ratios of all pairs, by block size."""
    found: Measured = []
    for number, sample in enumerate(made, start=1):
        progress(f"{sample.kind} before {sample.text} ({number} of {len(made)})")
        found.append((sample, pair_ratios(prefilled(model, sample), settings)))
    return found


def study(measured: Measured, name: str, dtype: str, settings: ReuseSettings, progress: Report) -> ReuseResult:
    """Everything that needs no model."""
    result = ReuseResult(
        model=name,
        dtype=dtype,
        settings=vars(settings).copy(),
        predictors={key: each.says for key, each in PREDICTORS.items()},
    )
    for size in settings.block_sizes:
        progress(f"predictors at blocks of {size}")
        result.texts.extend(_text_row(sample, ratios[size], size) for sample, ratios in measured)
        most = max(heard for _, heard in settings.evidence)
        for sources, witnesses in settings.evidence:
            rng = np.random.default_rng((settings.seed, size, sources, witnesses))
            cases = [
                draw_cases(sample, ratios[size], settings.header_tokens, sources, witnesses, settings.draws, rng)
                for sample, ratios in measured
            ]
            where = {"block_size": size, "sources": sources, "witnesses": witnesses}
            result.rule.append(_rule_row(cases, where))
            curved = witnesses == min(CURVE_WITNESSES, most) and sources == max(settings.sources)
            for key, each in PREDICTORS.items():
                if witnesses >= each.witnesses and sources >= each.sources:
                    scored = [Scored.of(case, fold, each.score(case)) for fold, case in _folds(cases)]
                    result.held_out.extend(_held_out_rows(key, scored, where))
                    if curved:
                        result.curves.extend(_curves(key, scored, where))
            if curved:
                result.features.extend(feature_rows(cases, size))
    return result


def _folds(cases: Sequence[Cases]) -> Iterator[tuple[int, Cases]]:
    """The first text of every kind is one fold, the second another."""
    seen: dict[str, int] = {}
    for case in cases:
        seen[case.kind] = seen.get(case.kind, -1) + 1
        yield seen[case.kind], case


def _held_out_rows(predictor: str, scored: Sequence[Scored], where: Mapping[str, int]) -> Iterator[HeldOutRow]:
    kinds = dict.fromkeys(each.kind for each in scored)
    for rate in RATES:
        together = held_out(scored, rate)
        alone = {kind: held_out(scored, rate, kind)[kind] for kind in kinds}
        for chosen, found in (("all", {**together, ALL: add(together.values())}), ("kind", alone)):
            shares = {kind: _share(counted) for kind, counted in found.items()}
            yield HeldOutRow(**where, predictor=predictor, rate=rate, chosen=chosen, shares=shares)  # type: ignore[arg-type]


def _curves(predictor: str, scored: Sequence[Scored], where: Mapping[str, int]) -> Iterator[Curve]:
    for kind in (*dict.fromkeys(each.kind for each in scored), ALL):
        chosen = [each for each in scored if kind in (ALL, each.kind)]
        limits = quantile_limits(chosen, CURVE_POINTS)
        points = [_share(count(chosen, limit)) for limit in limits]
        yield Curve(
            **where,
            predictor=predictor,
            kind=kind,
            limit=[round(limit, DIGITS) for limit in limits],
            skipped=[point.skipped for point in points],
            missed=[point.missed or 0.0 for point in points],
        )


def _rule_row(cases: Sequence[Cases], where: Mapping[str, int]) -> RuleRow:
    found: dict[str, list[Count]] = {}
    for case in cases:
        used = usable(case)
        one = Count(used.size, int(used.sum()), int((used & case.missed).sum()), case.share)
        found.setdefault(case.kind, []).append(one)
    totals = {kind: add(counts) for kind, counts in found.items()}
    shares = {kind: _share(counted) for kind, counted in {**totals, ALL: add(totals.values())}.items()}
    return RuleRow(**where, shares=shares)


def usable(case: Cases) -> NDArray[np.bool_]:
    """What `ReuseRule` would reuse of each situation, `[n, b]`."""
    rule, shape, evidence = ReuseRule(), case.true.shape, evidence_of(case)
    new = evidence.new(np.arange(case.true.size), case.echo.ravel()).reshape(shape)
    heard, worst = evidence.count.reshape(shape), evidence.worst.reshape(shape)
    rows = [Known(heard[row], worst[row], new[row]) for row in range(len(case.true))]
    return np.stack([rule.usable(row, float(entry)) for row, entry in zip(rows, case.entry, strict=True)])


def _share(counted: Count) -> Share:
    missed = counted.missed_share
    return Share(
        skipped=round(counted.skipped, DIGITS),
        missed=None if missed is None else round(missed, DIGITS),
        reused=counted.reused,
    )


def _text_row(sample: Sample, ratios: Ratios, size: int) -> TextRow:
    pairs = ratios[~np.eye(len(ratios), dtype=bool)]
    beyond, within = pairs[:, 1:] > 1, pairs[:, 0] <= 1
    return TextRow(
        block_size=size,
        kind=sample.kind,
        text=sample.text,
        pairs=len(pairs),
        beyond=float(beyond.mean()),
        entry_within=float(within.mean()),
        beyond_within=float(beyond[within].mean()) if within.any() else None,
        mean=pairs.mean(0).round(4).tolist(),
    )
