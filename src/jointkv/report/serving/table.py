"""Serving results as tables: a line per metric and a column per arm for pages, a line per arm for Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jointkv.bench.result import Arm, Fidelity, Load, ServingResult
from jointkv.report.markdown import NOT_MEASURED, table
from jointkv.report.serving import metrics
from jointkv.report.serving.cautions import cautions
from jointkv.report.serving.metrics import GROUPS
from jointkv.report.serving.pairs import Pair, Ratio, baseline, called, fusion_pairs, ratio
from jointkv.report.serving.verdict import Verdict, verdicts


@dataclass(frozen=True)
class Cell:
    """A value with its range or other small print."""

    value: str
    small: str = ""


@dataclass(frozen=True)
class Row:
    """One metric."""

    title: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class LoadTable:
    """All numbers of a result under one load.

    Attributes:
        arms: of the first columns.
        pairs: of the columns behind them, which hold ratios.
        groups: rows by heading.
    """

    load: Load
    arms: tuple[Arm, ...]
    pairs: tuple[Pair, ...]
    groups: dict[str, tuple[Row, ...]]


def load_table(result: ServingResult, load: Load) -> LoadTable:
    """The table of one load, with the arms that were run under it."""
    arms = tuple(arm for arm in result.arms if result.of(arm.name, load.label))
    pairs = tuple(pair for pair in fusion_pairs(result) if pair.upper in arms and pair.lower in arms)
    groups = {}
    for heading, chosen in GROUPS.items():
        rows = []
        for metric in chosen:
            runs = [result.of(arm.name, load.label) for arm in arms]
            cells = [Cell(metric.median(each), metric.range(each)) for each in runs]
            if any(cell.value != NOT_MEASURED for cell in cells):
                ratios = [ratio(result, pair.upper, pair.lower, load, metric) for pair in pairs]
                shown = [_ratio_cell(each) if metric.higher_is_better is not None else Cell("") for each in ratios]
                rows.append(Row(metric.title, (*cells, *shown)))
        groups[heading] = tuple(rows)
    fidelity = _fidelity_rows(result, load, arms, len(pairs))
    return LoadTable(load, arms, pairs, {**groups, "Same answers": fidelity} if fidelity else groups)


def _ratio_cell(found: Ratio) -> Cell:
    if found.median is None or found.p is None:
        return Cell(NOT_MEASURED)
    return Cell(f"{found.written}x", f"{found.range}; p {found.p:.2g}" if found.range else "one round")


def _fidelity_rows(result: ServingResult, load: Load, arms: Sequence[Arm], ratios: int) -> tuple[Row, ...]:
    """Equal answers and common beginnings: against each other arm, and of an arm with itself in other rounds."""
    known = [each for each in result.fidelity if each.load == load.label]
    against = list(dict.fromkeys(each.against for each in known if each.against != each.arm))
    rows = []
    for name in against:
        chosen = {each.arm: each for each in known if each.against == name != each.arm}
        rows += _both_rows(f"to {name.replace('_', ' ')}", chosen, arms, ratios)
    own = {each.arm: each for each in known if each.arm == each.against}
    return (*rows, *(_both_rows("to itself in other rounds", own, arms, ratios) if own else ()))


def _both_rows(words: str, found: dict[str, Fidelity], arms: Sequence[Arm], ratios: int) -> list[Row]:
    def cells(part: str) -> tuple[Cell, ...]:
        shown = [
            Cell(f"{getattr(found[arm.name], part):.1%}", f"of {found[arm.name].pairs}")
            if arm.name in found
            else Cell("-")
            for arm in arms
        ]
        return (*shown, *[Cell("")] * ratios)

    return [Row(f"equal {words}", cells("equal")), Row(f"common beginning, {words}", cells("common_prefix"))]


WORDS = ("traffic", "load", "arm")
SHOWN = (
    metrics.OUTPUT_RATE,
    metrics.TTFT_P50,
    metrics.TTFT_P95,
    metrics.ITL_P50,
    metrics.E2EL_P95,
    metrics.RUNNING_PEAK,
    metrics.WAITING_MEAN,
    metrics.PREEMPTIONS,
    metrics.PAGES_FREED,
    metrics.PLUGIN_SECONDS,
)
NUMBERS = ("pool blocks", *(metric.title for metric in SHOWN), "same output")


def markdown(results: Sequence[ServingResult]) -> str:
    """Verdicts, cautions and one line per arm and load; medians, with the range of output tokens/s."""
    verdict_lines = [f"- {verdict.sentence}\n" for result in results for verdict in verdicts(result)]
    caution_lines = [f"- {_of(result)}: {caution}\n" for result in results for caution in cautions(result)]
    lines = [
        _line(result, load, arm)
        for result in results
        for load in result.loads
        for arm in result.arms
        if result.of(arm.name, load.label)
    ]
    return (
        f"Model {results[0].model}, {results[0].dtype}. Medians over rounds; output tokens/s with the range.\n\n"
        + "".join(verdict_lines)
        + "\n" * bool(verdict_lines)
        + table(WORDS, NUMBERS, lines)
        + "\n" * bool(caution_lines)
        + "".join(caution_lines)
    )


def _line(result: ServingResult, load: Load, arm: Arm) -> list[str]:
    runs = result.of(arm.name, load.label)
    rate, *others = SHOWN
    spread = rate.range(runs)
    return [
        _of(result),
        load.label,
        called(arm),
        f"{arm.pool_blocks:,}",
        rate.median(runs) + (f" ({spread})" if spread else ""),
        *(metric.median(runs) for metric in others),
        _same_output(result, load, arm),
    ]


def _same_output(result: ServingResult, load: Load, arm: Arm) -> str:
    """Equal to the reference arm, with the arm's own noise."""
    known = [each for each in result.fidelity if (each.arm, each.load) == (arm.name, load.label)]
    own = [f"itself {each.equal:.0%}" for each in known if each.against == each.arm]
    other = [f"{each.against.replace('_', ' ')} {each.equal:.0%}" for each in known if each.against != each.arm]
    return ", ".join((*other, *own)) or NOT_MEASURED


def _of(result: ServingResult) -> str:
    return f"{result.traffic.replace('_', '-')}, pool {baseline(result).pool_blocks:,}"


RATIO_WORDS = ("traffic", "load", "arm", "against")
RATIO_NUMBERS = (*(f"{metric.short}, ratio" for metric in metrics.COMPARED), "smallest p", "verdict")


def ratio_markdown(results: Sequence[ServingResult]) -> str:
    """One line per comparison and load: median ratio, range over rounds and p."""
    lines = [line for result in results for verdict in verdicts(result) for line in _ratio_lines(result, verdict)]
    return (
        f"Model {results[0].model}, {results[0].dtype}. Ratios within a round: median (range; p of an exact "
        "permutation test). More output tokens/s and less of the times is better.\n\n"
        + table(RATIO_WORDS, RATIO_NUMBERS, lines)
    )


def _ratio_lines(result: ServingResult, verdict: Verdict) -> list[list[str]]:
    lines = []
    for effect in verdict.effects:
        cells = [_ratio_cell(effect.ratios[metric.name]) for metric in metrics.COMPARED]
        least = effect.ratios[metrics.OUTPUT_RATE.name].smallest_p
        lines.append(
            [
                _of(result),
                effect.load,
                called(verdict.pair.upper),
                called(verdict.pair.lower),
                *(f"{cell.value.removesuffix('x')} ({cell.small})" if cell.small else cell.value for cell in cells),
                f"{least:.2g}",
                KIND_WORDS[effect.kind],
            ]
        )
    return lines


KIND_WORDS = {"helps": "helps", "mixed": "trade", "costs": "costs", "unclear": "unclear", "none": "no effect"}
