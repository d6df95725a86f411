"""Serving results as tables, for pages and for Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from jointkv.bench.result import Arm, Load, Run, ServingResult
from jointkv.report.markdown import NOT_MEASURED, Columns, T, number, table
from jointkv.report.serving import metrics
from jointkv.report.serving.cautions import cautions
from jointkv.report.serving.metrics import Metric
from jointkv.report.serving.pairs import arms_run, called, heading, pairs_run, ratio
from jointkv.report.serving.verdict import WORDS, Effect, Verdict, verdicts


@dataclass(frozen=True)
class Table:
    """A table of a page; what stands in brackets is small print.

    Attributes:
        groups: lines by heading.
    """

    title: str
    headings: list[str]
    groups: dict[str, list[list[str]]]


def page_table(title: str, columns: Columns[T], rows: Iterable[T]) -> Table:
    """A line per row."""
    return Table(title, list(columns), {"": [[write(row) for write in columns.values()] for row in rows]})


def load_table(result: ServingResult, load: Load) -> Table:
    """All numbers under one load: a line per metric, a column per arm that was run, and behind them the ratios."""
    arms, pairs = arms_run(result, load), pairs_run(result, load)
    groups = {}
    for name, chosen in metrics.GROUPS.items():
        groups[name] = [
            [metric.title, *(metric.with_range(result.of(arm.name, load.label)) for arm in arms)]
            + [
                ratio(result, pair.upper, pair.lower, load, metric).written
                if metric.higher_is_better is not None
                else ""
                for pair in pairs
            ]
            for metric in chosen
            if any(metric.samples(result.of(arm.name, load.label)) for arm in arms)
        ]
    for title, part in (("equal to", "equal"), ("common beginning with", "common_prefix")):
        cells = [_agreement(result, load, arm, part) for arm in arms]
        groups.setdefault("Same answers", []).append([title, *cells, *([""] * len(pairs))])
    if result.divergences is not None:
        cells = [_near_ties(result, load, arm) for arm in arms]
        groups["Same answers"].append(["differ first at a near tie of the reference", *cells, *([""] * len(pairs))])
    for title, field, form in SCORED if result.scores else ():
        cells = [_scored(result, arm, field, form) for arm in arms]
        groups["Same answers"].append([title, *cells, *([""] * len(pairs))])
    if result.true_answers:
        cells = [_f1(result, load, arm) for arm in arms]
        groups["Same answers"].append(["F1 beside the true answers", *cells, *([""] * len(pairs))])
    headings = ["", *(f"{called(arm)} ({arm.title}; {arm.pool_blocks:,} blocks)" for arm in arms)]
    headings += [f"{called(pair.upper)} ÷ {called(pair.lower)} (median ratio)" for pair in pairs]
    return Table(f"{load.label}: median and range over rounds", headings, groups)


SCORED = (
    ("KL, given the reference's answers, nats", "kl", ".2g"),
    ("of the worst request", "kl_worst_request", ".2g"),
    ("equal likeliest tokens", "top1", ".1%"),
    ("of the worst request, equal", "top1_worst_request", ".1%"),
)
"""Titles, fields and formats of what an arm was scored for."""


def _scored(result: ServingResult, arm: Arm, field: str, form: str) -> str:
    found = next((each for each in result.scores or () if each.arm == arm.name), None)
    return number(None if found is None else getattr(found, field), form)


def _f1(result: ServingResult, load: Load, arm: Arm) -> str:
    found = next((each for each in result.true_answers if (each.arm, each.load) == (arm.name, load.label)), None)
    return number(None if found is None else found.f1, ".3f")


def _agreement(result: ServingResult, load: Load, arm: Arm, part: str) -> str:
    """With the reference arms, then with the arm itself in other rounds: its own noise."""
    known = [each for each in result.fidelity if (each.arm, each.load) == (arm.name, load.label)]
    parts = [
        f"{'itself' if each.against == arm.name else each.against.replace('_', ' ')} {getattr(each, part):.0%}"
        for each in sorted(known, key=lambda each: each.against == arm.name)
    ]
    return ", ".join(parts) or NOT_MEASURED


def _near_ties(result: ServingResult, load: Load, arm: Arm) -> str:
    """How many of the differing answers rounding may have decided, and the largest gap between the two tokens."""
    found = [each for each in result.divergences or () if (each.arm, each.load) == (arm.name, load.label)]
    if not found:
        return NOT_MEASURED
    worst = max(found, key=lambda each: (each.least, each.gap))
    ties = sum(each.near_tie for each in found)
    return f"{ties} of {len(found)} (largest gap {'over ' if worst.least else ''}{worst.gap:.2g} nats)"


RUNS: Columns[Run] = {
    "arm": lambda run: run.arm,
    "load": lambda run: run.load,
    "round": lambda run: str(run.round),
    "run as": lambda run: str(run.position + 1),
    **{
        metric.title: lambda run, metric=metric: metric.median([run])  # type: ignore[misc]
        for metric in (*metrics.COMPARED, metrics.SKIPPED, metrics.FAILED, metrics.FOREIGN_CPU)
    },
    "answers": lambda run: run.outputs_file or NOT_MEASURED,
}
"""Of every run."""

Compared = tuple[Verdict, Effect]
COMPARED_TEXT: Columns[Compared] = {
    "traffic": lambda pair: heading(pair[0].result),
    "load": lambda pair: pair[1].load.label,
    "arm": lambda pair: called(pair[0].pair.upper),
    "against": lambda pair: called(pair[0].pair.lower),
}
RATIOS: Columns[Compared] = {
    f"{metric.short}, ratio": lambda pair, metric=metric: pair[1].ratios[metric].written  # type: ignore[misc]
    for metric in metrics.COMPARED
}
COMPARED_NUMBERS: Columns[Compared] = {
    **RATIOS,
    "smallest p": lambda pair: f"{pair[1].ratios[metrics.OUTPUT_RATE].smallest_p:.2g}",
    "verdict": lambda pair: WORDS[pair[1].kind],
}
BREAK_EVEN: Columns[Compared] = {
    **COMPARED_TEXT,
    "verdict": COMPARED_NUMBERS["verdict"],
    "pool in use (peak, without fusion)": lambda pair: f"{pair[1].pressure.usage:.0%}",
    "waiting (mean, without fusion)": lambda pair: f"{pair[1].pressure.waiting:.1f}",
    "load ÷ pool (in the large pool)": lambda pair: number(pair[1].demand, ".2f"),
    "pages freed": lambda pair: number(pair[1].freed, ",.0f"),
    "prompt tokens skipped": lambda pair: number(pair[1].skipped, ".0%"),
    **RATIOS,
}
"""Comparisons beside how short memory was."""

Under = tuple[ServingResult, Load, Arm]


def _runs(row: Under) -> list[Run]:
    result, load, arm = row
    return result.of(arm.name, load.label)


def _medians(chosen: Iterable[Metric]) -> Columns[Under]:
    return {
        metric.title: lambda row, metric=metric: metric.median(_runs(row))  # type: ignore[misc]
        for metric in chosen
    }


TEXT: Columns[Under] = {
    "traffic": lambda row: heading(row[0]),
    "load": lambda row: row[1].label,
    "arm": lambda row: called(row[2]),
}
NUMBERS: Columns[Under] = {
    "pool blocks": lambda row: f"{row[2].pool_blocks:,}",
    **_medians(metrics.SHOWN),
    metrics.OUTPUT_RATE.title: lambda row: metrics.OUTPUT_RATE.with_range(_runs(row)),
    **_medians(metrics.SHOWN_BEHIND),
    "same output": lambda row: _agreement(*row, "equal"),
}


def markdown(results: Sequence[ServingResult]) -> str:
    """Verdicts, cautions and one line per arm and load; medians, with the range of output tokens/s."""
    said = [f"- {verdict.sentence}\n" for result in results for verdict in verdicts(result)]
    warned = [f"- {heading(result)}: {caution}\n" for result in results for caution in cautions(result)]
    rows = [(result, load, arm) for result in results for load in result.loads for arm in arms_run(result, load)]
    stored = any(run.stored is not None for result in results for run in result.runs)
    numbers = {**NUMBERS, **_medians(metrics.STORED)} if stored else NUMBERS
    parts = ("".join(said), table(TEXT, numbers, rows), "".join(warned))
    intro = f"Model {results[0].model}, {results[0].dtype}. Medians over rounds; output tokens/s with the range.\n"
    return "\n".join([intro, *filter(None, parts)])


def ratio_markdown(results: Sequence[ServingResult]) -> str:
    """One line per comparison and load: median ratio, range over rounds and p."""
    rows = [(verdict, effect) for result in results for verdict in verdicts(result) for effect in verdict.effects]
    return (
        f"Model {results[0].model}, {results[0].dtype}. Ratios within a round: median (range; p of an exact "
        "permutation test). More output tokens/s and less of the times is better.\n\n"
        + table(COMPARED_TEXT, COMPARED_NUMBERS, rows)
    )
