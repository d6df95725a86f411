"""What fusion changes in serving, round by round, and how short memory was."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from jointkv.report.pictures.base import Picture, grid, legend_below
from jointkv.report.results import Serving
from jointkv.report.serving.break_even import points
from jointkv.report.serving.charts import draw_break_even
from jointkv.report.serving.metrics import OUTPUT_RATE, TTFT_P95
from jointkv.report.serving.table import ratio_markdown
from jointkv.report.serving.verdict import verdicts

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class ServingRatios(Picture[Serving]):
    """Ratios of output tokens/s and TTFT p95 against how full the pool was, and how many waited, without fusion."""

    name = "serving_ratios"
    reads = Serving

    def shows(self, result: Serving) -> bool:
        return bool(verdicts(result))

    def draw(self, results: Sequence[Serving]) -> Figure | None:
        import matplotlib

        # Names of arms and traffics are the user's, and may have dollar signs.
        with matplotlib.rc_context({"text.parse_math": False}):
            return _draw(results)

    def table(self, results: Sequence[Serving]) -> str:
        return ratio_markdown(results)


def _draw(results: Sequence[Serving]) -> Figure:
    found = points(results)
    figure, panels = grid(4, 2, (4.6, 3.0), sharex="col", sharey="row")
    for number, axes in enumerate(panels):
        draw_break_even(axes, found, (OUTPUT_RATE, TTFT_P95)[number // 2], ("usage", "waiting")[number % 2])
        axes.label_outer()
    legend_below(figure, 3)
    return figure
