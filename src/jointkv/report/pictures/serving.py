"""What a server gives with and without fusion, against the load."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jointkv.report.pictures.base import Picture, grid, legend_below
from jointkv.report.results import Serving
from jointkv.report.serving.charts import arm_styles, draw_levels, families
from jointkv.report.serving.metrics import E2EL_P95, OUTPUT_RATE, TTFT_P95
from jointkv.report.serving.pairs import baseline
from jointkv.report.serving.table import markdown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = (OUTPUT_RATE, TTFT_P95, E2EL_P95)


class ServingLevels(Picture[Serving]):
    """A column per result and kind of load; output tokens/s, TTFT and end-to-end time from top to bottom."""

    name = "serving"
    reads = Serving

    def shows(self, result: Serving) -> bool:
        return bool(result.runs)

    def draw(self, results: Sequence[Serving]) -> Figure | None:
        import matplotlib

        # Names of arms and traffics are the user's, and may have dollar signs.
        with matplotlib.rc_context({"text.parse_math": False}):
            return _draw(results)

    def table(self, results: Sequence[Serving]) -> str:
        return markdown(results)


def _draw(results: Sequence[Serving]) -> Figure:
    columns = [(result, loads) for result in results for loads in families(result)]
    columns = [pair for pair in columns if any(run.load in {load.label for load in pair[1]} for run in pair[0].runs)]
    styles = arm_styles(results)
    figure, panels = grid(len(SHOWN) * len(columns), len(columns), (3.6, 2.6), sharex="col")
    for place, (result, loads) in enumerate(columns):
        for row, metric in enumerate(SHOWN):
            axes = panels[row * len(columns) + place]
            draw_levels(axes, result, loads, metric, styles)
            if row + 1 < len(SHOWN):
                axes.set_xlabel("")
        pool = f"{baseline(result).pool_blocks:,} blocks"
        panels[place].set_title(f"{result.traffic.replace('_', '-')}, {pool}", fontsize=10)
    legend_below(figure, 2 * len(columns), _handles(results, styles))
    return figure


def _handles(results: Sequence[Serving], styles: dict[str, Any]) -> list[Any]:
    from matplotlib.lines import Line2D

    titles = {arm.name: arm.title for result in results for arm in result.arms}
    return [Line2D([], [], **styles[name], label=title) for name, title in titles.items()]
