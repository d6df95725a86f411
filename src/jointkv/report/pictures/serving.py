"""What a server gives with and without fusion, by load."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from jointkv.bench.result import Run
from jointkv.report.figure import grid, key, legend_below
from jointkv.report.pictures.base import Picture
from jointkv.report.serving.charts import draw_levels, styles
from jointkv.report.serving.metrics import DECISIVE
from jointkv.report.serving.pairs import heading
from jointkv.report.serving.result import Serving, conditions
from jointkv.report.serving.table import markdown


class ServingLevels(Picture[Serving]):
    """A column per result; TTFT, output tokens/s and end-to-end time from top to bottom."""

    name = "serving"
    reads = Serving

    def rows(self, results: Sequence[Serving]) -> list[Run]:
        return [run for result in results for run in result.runs]

    def draw(self, results: Sequence[Serving]) -> Figure | None:
        titles = {arm.name: arm.title for result in results for arm in result.arms}
        looks, columns = styles(list(titles)), len(results)
        figure, panels = grid(len(DECISIVE) * columns, columns, (3.6, 2.6), sharex="col")
        for place, axes in enumerate(panels):
            draw_levels(axes, results[place % columns], DECISIVE[place // columns], looks)
        for axes, result in zip(panels, results, strict=False):
            axes.set_title(heading(result))
        legend_below(figure, 2 * columns, [key(title, **looks[name]) for name, title in titles.items()])
        return figure

    def table(self, results: Sequence[Serving]) -> str:
        return markdown(results)

    def conditions(self, result: Serving) -> Mapping[str, object]:
        return conditions(result)
