"""What fusion changes in serving, round by round, and how short memory was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from jointkv.report.figure import grid, key, legend_below
from jointkv.report.pictures.base import Picture
from jointkv.report.serving.charts import draw_break_even, styles
from jointkv.report.serving.metrics import OUTPUT_RATE, TTFT_P95
from jointkv.report.serving.pairs import heading
from jointkv.report.serving.result import Serving, conditions
from jointkv.report.serving.table import ratio_markdown
from jointkv.report.serving.verdict import Verdict, ranked, verdicts


class ServingRatios(Picture[Serving]):
    """Ratios of TTFT p95 and output tokens/s against how full the pool was, and how many waited, without fusion."""

    name = "serving_ratios"
    reads = Serving

    def rows(self, results: Sequence[Serving]) -> list[Verdict]:
        return [verdict for result in results for verdict in verdicts(result)]

    def draw(self, results: Sequence[Serving]) -> Figure | None:
        found, looks = ranked(self.rows(results)), styles([heading(result) for result in results])
        figure, panels = grid(4, 2, (4.6, 3.0), sharex="col", sharey="row")
        for place, axes in enumerate(panels):
            metric, across = (TTFT_P95, OUTPUT_RATE)[place // 2], ("usage", "waiting")[place % 2]
            draw_break_even(axes, found, metric, across, looks)
            axes.label_outer()
        legend_below(figure, 3, [key(name, **look) for name, look in looks.items()])
        return figure

    def table(self, results: Sequence[Serving]) -> str:
        return ratio_markdown(results)

    def conditions(self, result: Serving) -> Mapping[str, object]:
        return conditions(result)
