"""The study: prefill all texts behind all headers, compare every pair, ask every predictor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from transformers import PreTrainedModel

from jointkv.evaluate.progress import Report
from jointkv.evaluate.reuse.cases import Cases, draw_cases
from jointkv.evaluate.reuse.features import feature_rows
from jointkv.evaluate.reuse.limits import Count, Scored, add, count, held_out, quantile_limits
from jointkv.evaluate.reuse.pairs import Ratios, pair_ratios, prefilled
from jointkv.evaluate.reuse.predictors import PREDICTORS, evidence_of
from jointkv.evaluate.reuse.result import ALL, CurvePoint, Evidenced, HeldOutRow, ReuseResult, RuleRow, TextRow
from jointkv.evaluate.reuse.setup import ReuseSettings, Sample, samples
from jointkv.evaluate.traffic.base import Tokenizer
from jointkv.policy.reuse import ReuseRule

RATES = (0.01, 0.02)
"""Audited miss rates at which skipped shares are compared."""

CURVE_POINTS = 25
CURVE_WITNESSES = 8
"""Curves are drawn for this many, or as many as there are."""

Measured = list[tuple[Sample, Mapping[int, Ratios]]]


def steps(settings: ReuseSettings, made: Sequence[Sample]) -> int:
    """How often `run_reuse` reports."""
    return len(made) + len(settings.block_sizes)


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
            result.rule.extend(_rule_rows(cases, where))
            curved = witnesses == min(CURVE_WITNESSES, most) and sources == max(settings.sources)
            for key, each in PREDICTORS.items():
                if witnesses >= each.witnesses and sources >= each.sources:
                    scored = [Scored.of(case, fold, each.score(case)) for fold, case in _folds(cases)]
                    result.held_out.extend(_held_out_rows(key, scored, where))
                    if curved:
                        result.curves.extend(_curve(key, scored, where))
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
    kinds = list(dict.fromkeys(each.kind for each in scored))
    for rate in RATES:
        together = held_out(scored, rate)
        alone = {kind: held_out(scored, rate, kind)[kind] for kind in kinds}
        for chosen, found in (("all", {**together, ALL: add(together.values())}), ("kind", alone)):
            for kind, counted in found.items():
                yield HeldOutRow(
                    **where, **_shares(counted), kind=kind, predictor=predictor, rate=rate, chosen=chosen
                )  # type: ignore[arg-type]


def _curve(predictor: str, scored: Sequence[Scored], where: Mapping[str, int]) -> Iterator[CurvePoint]:
    for kind in (*dict.fromkeys(each.kind for each in scored), ALL):
        chosen = [each for each in scored if kind in (ALL, each.kind)]
        for limit in quantile_limits(chosen, CURVE_POINTS):
            yield CurvePoint(**where, **_shares(count(chosen, limit)), kind=kind, predictor=predictor, limit=limit)


def _rule_rows(cases: Sequence[Cases], where: Mapping[str, int]) -> Iterator[RuleRow]:
    rule, found = ReuseRule(), {}
    for case in cases:
        evidence = evidence_of(case)
        new = evidence.new(np.arange(case.true.size), case.echo.ravel()).reshape(case.true.shape)
        heard, worst = (known.reshape(case.true.shape) for known in (evidence.count, evidence.worst))
        used = np.stack(
            [rule.usable(float(case.entry[row]), heard[row], worst[row], new[row]) for row in range(len(case.true))]
        )
        one = Count(used.size, int(used.sum()), int((used & case.missed).sum()), case.share)
        found.setdefault(case.kind, []).append(one)
    totals = {kind: add(counts) for kind, counts in found.items()}
    for kind, counted in {**totals, ALL: add(totals.values())}.items():
        yield RuleRow(**where, **_shares(counted), kind=kind)


def _shares(counted: Count) -> dict[str, float | int | None]:
    return {"skipped": counted.skipped, "missed": counted.missed_share, "reused": counted.reused}


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


__all__ = ["Evidenced", "measure", "run_reuse", "steps", "study"]
