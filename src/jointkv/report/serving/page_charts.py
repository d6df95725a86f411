"""The charts of the page, as inline SVG under headings: text stays text, ink and grid are the page's, ids their own."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from html import escape
from typing import Any

from matplotlib.figure import Figure

from jointkv.bench.result import ServingResult
from jointkv.report.figure import LIGHT, grid, style
from jointkv.report.serving import charts
from jointkv.report.serving.charts import Looks
from jointkv.report.serving.metrics import DRAWN, OUTPUT_RATE, TTFT_P95
from jointkv.report.serving.pairs import called, fusion_pairs, heading, large_pool, ratio
from jointkv.report.serving.verdict import LEAST, Effect, Verdict

SIZE = (4.3, 2.8)
"""Inches of a chart; on a phone it has about this width."""
INK = "#202124"
PAGE_COLOURS = {INK: "currentColor", LIGHT: "var(--grid)", charts.BAND: "var(--band)"}


Chart = tuple[str, str]
"""Title, and markup that is safe as it is."""


@dataclass(frozen=True)
class Group:
    """Charts under one heading that share a legend: colour and words."""

    title: str
    note: str
    legend: tuple[tuple[str, str], ...]
    charts: list[Chart]


def page_style() -> AbstractContextManager[None]:
    """Figures made and written inside it are for the page."""
    coloured = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    sizes = ("font.size", "axes.labelsize", "xtick.labelsize", "ytick.labelsize")
    options = {"svg.fonttype": "none", "svg.hashsalt": "jointkv", "axes.linewidth": 0.7}
    return style(**options, **dict.fromkeys(coloured, INK), **dict.fromkeys(sizes, 9.5))


def levels_and_ratios(result: ServingResult, looks: Looks, anchor: str) -> list[Group]:
    """Every drawn metric by load, and the ratios of the arms to those without fusion."""
    levels = [
        _chart(metric.title, anchor, charts.draw_levels, result=result, metric=metric, looks=looks)
        for metric in DRAWN
        if metric.samples(result.runs)
    ]
    ratios = []
    for lower in {pair.lower.name: pair.lower for pair in fusion_pairs(result)}.values():
        limit = large_pool(result, lower)
        uppers = [pair.upper for pair in fusion_pairs(result) if pair.lower == lower] + ([limit] if limit else [])
        draw = partial(charts.draw_ratios, result=result, uppers=uppers, lower=lower, looks=looks)
        ratios += [
            _chart(f"{metric.short}, ratio to {called(lower)}", anchor, draw, metric=metric)
            for metric in DRAWN
            if any(ratio(result, arm, lower, load, metric).rounds for load in result.loads for arm in uppers)
        ]
    legend = _legend(result, looks)
    return [
        Group("Latency and throughput", "Points: rounds; bars: medians.", legend, levels),
        Group("Ratios, round by round", f"Points: rounds; bars: medians; grey: within {LEAST:.0%}.", legend, ratios),
    ]


def first_tokens(result: ServingResult, looks: Looks, anchor: str) -> Group:
    """TTFT of all requests under each load."""
    drawn = []
    for load in result.loads:
        if any(run.requests for run in result.runs if run.load == load.label):
            title = f"First tokens, {load.label}"
            drawn.append(_chart(title, anchor, charts.draw_ttft, result=result, load=load, looks=looks))
    note = "Thick: all rounds together; thin: each round."
    return Group("How long the first token takes", note, _legend(result, looks), drawn)


def timelines(result: ServingResult, looks: Looks, anchor: str) -> Group:
    """The server's metrics over time under each load; what was skipped only where something was."""
    drawn = []
    for load in result.loads:
        runs = [run for run in result.runs if run.load == load.label]
        if any(len(run.timeline.seconds) > 1 for run in runs):
            skipped = any(any(run.timeline.prompt_tokens_skipped or ()) for run in runs)
            figure, panels = grid(5 if skipped else 4, 1, (SIZE[0], 1.15), sharex=True)
            charts.draw_timelines(panels, result, load, looks)
            figure.align_ylabels(panels)
            title = f"Over time, {load.label}"
            drawn.append((title, svg(figure, anchor, title)))
    note = "Thick: first round; thin: the others."
    return Group("The pool and the queue over time", note, _legend(result, looks), drawn)


def break_even_charts(found: Sequence[tuple[Verdict, Effect]], anchor: str) -> Group:
    """Ratios of TTFT p95 and output tokens/s against each measure of how short memory was that all comparisons have."""
    looks = charts.styles([heading(verdict.result) for verdict, _ in found])
    measures = [name for name in charts.PRESSURES if name != "demand" or all(effect.demand for _, effect in found)]
    draw = partial(charts.draw_break_even, found=found, looks=looks)
    return Group(
        "",
        f"Large points: medians; small: rounds; grey: within {LEAST:.0%}.",
        tuple((look["color"], name) for name, look in looks.items()),
        [
            _chart(f"{metric.short} against {charts.PRESSURES[name]}", anchor, draw, metric=metric, across=name)
            for metric in (TTFT_P95, OUTPUT_RATE)
            for name in measures
        ],
    )


def _legend(result: ServingResult, looks: Looks) -> tuple[tuple[str, str], ...]:
    return tuple((looks[arm.name]["color"], f"{called(arm)}: {arm.title}") for arm in result.arms)


def _chart(title: str, anchor: str, draw: Callable[..., None], **what: Any) -> Chart:
    figure, (axes,) = grid(1, 1, SIZE)
    draw(axes, **what)
    return title, svg(figure, anchor, title)


def svg(figure: Figure, anchor: str, title: str) -> str:
    """`figure` as an `<svg>` element, which a page takes as it is; `anchor` and title are its own."""
    stream = io.StringIO()
    figure.savefig(
        stream, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
    )
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    name = f"{anchor}-{hashlib.sha256((title + text).encode()).hexdigest()[:12]}"
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    for hue, variable in PAGE_COLOURS.items():
        text = text.replace(hue, variable)
    head, body = text.split(">", 1)
    head = re.sub(r' (width|height)="[^"]*"', "", head)
    label = f'<title id="{name}-title">{escape(title)}</title>'
    return f'{head} role="img" aria-labelledby="{name}-title">{label}{body}'.rstrip()
