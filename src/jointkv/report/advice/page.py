"""One page of advice on a log."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from matplotlib.axes import Axes

from jointkv.evaluate.advise.result import Advice
from jointkv.report.figure import grid
from jointkv.report.pictures.advice import HUES, PARTS, WORDS, draw_breaks, draw_parts
from jointkv.report.serving.page_charts import page_style, svg
from jointkv.report.template import render
from jointkv.system.files import replace_text

ENOUGH = 0.05
"""Share of the prompt tokens below which a gain is not worth an effort."""


def verdict(advice: Advice) -> str:
    """One sentence: what to do."""
    found = advice.same_tokens + advice.moved_tokens
    if advice.share(advice.gain) >= ENOUGH:
        return (
            "Rewriting the prompts is free, and brings exact prefix caching from "
            f"{advice.share(advice.exact_tokens):.0%} to about "
            f"{min(1.0, advice.share(advice.exact_tokens + advice.gain)):.0%} of the prompt tokens."
        )
    if advice.share(found) >= ENOUGH:
        return (
            f"{advice.share(found):.0%} of the prompt tokens are resident although no prefix is equal, and no single "
            "difference is to blame: fusion and reuse find them, prefix caching does not."
        )
    if advice.share(advice.exact_tokens) >= ENOUGH:
        return "Exact prefix caching finds all that is to be found here: nothing needs to be changed."
    return "These requests have hardly any text in common: neither prefix caching nor reuse can find much."


def write_page(advice: Advice, output: Path) -> None:
    """Write one self-contained HTML page. Raises `BadInput` if `output` cannot be written."""
    replace_text(output, page(advice))


def page(advice: Advice) -> str:
    """The page."""
    pairs = [(advice, row) for row in advice.breaks]
    with page_style():
        charts = [_chart("Prompt tokens", 1.2, lambda axes: draw_parts(axes, [advice]))]
        if pairs:
            charts.append(_chart("Differences", 0.8 + 0.35 * len(pairs), lambda axes: draw_breaks(axes, pairs)))
    return render(
        "advice/page.html.j2",
        it=advice,
        verdict=verdict(advice),
        kind="helps" if advice.share(advice.gain + advice.same_tokens + advice.moved_tokens) >= ENOUGH else "none",
        charts=charts,
        legend=[(HUES[part], WORDS[part]) for part in PARTS],
        parts=[(WORDS[part], getattr(advice, part)) for part in PARTS],
    )


def _chart(title: str, height: float, draw: Callable[[Axes], None]) -> str:
    figure, (axes,) = grid(1, 1, (8.6, height))
    draw(axes)
    return svg(figure, title.lower().replace(" ", "-"), title)
