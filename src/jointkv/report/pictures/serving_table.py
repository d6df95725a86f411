"""Every traffic and load at a glance: what each arm gives against stock, and how many answers it changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import median
from typing import Any, ClassVar

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from jointkv.bench.result import NEAR_TIE, Arm, Divergence, Fidelity, Load
from jointkv.report.figure import LIGHT, grid, key, legend_below, log_axis
from jointkv.report.markdown import NOT_MEASURED, Columns, number, words
from jointkv.report.pictures.base import Picture
from jointkv.report.serving.cautions import cautions
from jointkv.report.serving.charts import Looks, styles
from jointkv.report.serving.metrics import COMPUTED, ITL_MEAN, OUTPUT_RATE, PAGES_FREED, TTFT_P50, TTFT_P95, Metric
from jointkv.report.serving.pairs import arms_run, baseline, called, heading, ratio
from jointkv.report.serving.result import Serving, conditions

Row = tuple[Serving, Load, Arm]
Line = tuple[Serving, Load]
TABLED = (OUTPUT_RATE, TTFT_P50, TTFT_P95, ITL_MEAN, COMPUTED)
"""With the mean gap: tokens can come several at once, and then the median is none."""
DRAWN = (OUTPUT_RATE, TTFT_P95, COMPUTED)
KINDS = {"closed": "closed loop", "poisson": "Poisson arrivals", "bursty": "bursts", "one_first": "one first, then all"}
LEAST_SHARE = 0.2
"""The axis of changed answers goes up to this at least: one in twelve is not to look like all."""
WIDTH, LINE, FRAME, LEAST_HEIGHT = 3.1, 0.24, 0.75, 1.7  # inches
SPREAD = 0.55
"""Of a line's height, over which its dots are spread: equal ones would hide each other."""


def _ratio(row: Row, metric: Metric) -> float | None:
    """To the arm without jointkv in the same pool, which has none itself."""
    result, load, arm = row
    base = baseline(result)
    return None if arm == base else ratio(result, arm, base, load, metric).median


def _beside_stock(metric: Metric) -> Callable[[Row], str]:
    def cell(row: Row) -> str:
        found = _ratio(row, metric)
        return metric.median(row[0].of(row[2].name, row[1].label)) + ("" if found is None else f" ({found:.2f})")

    return cell


def _peak_pages(row: Row) -> str:
    """Of the pool, without the page that vLLM keeps for itself."""
    runs = row[0].of(row[2].name, row[1].label)
    return f"{median(run.pool_usage_peak for run in runs) * (row[2].pool_blocks - 1):,.0f}"


def _fidelity(row: Row) -> Fidelity | None:
    """Beside the reference arm's answers; None for the reference itself."""
    result, load, arm = row
    found = (each for each in result.fidelity if (each.arm, each.load) == (arm.name, load.label))
    return next((each for each in found if each.against != arm.name), None)


def _equal(row: Row) -> str:
    found = _fidelity(row)
    return number(None if found is None else found.equal, ".0%")


def _differing(row: Row) -> list[Divergence] | None:
    """None where it is not known how answers differ."""
    result, load, arm = row
    if result.divergences is None or _fidelity(row) is None:
        return None
    return [each for each in result.divergences if (each.arm, each.load) == (arm.name, load.label)]


def _count(near_tie: bool) -> Callable[[Row], int | None]:
    def count(row: Row) -> int | None:
        found = _differing(row)
        return None if found is None else sum(each.near_tie == near_tie for each in found)

    return count


_near_ties, _changed = _count(True), _count(False)


def _changed_share(row: Row) -> float | None:
    changed, compared = _changed(row), _fidelity(row)
    return None if changed is None or compared is None else changed / compared.pairs


def _largest_gap(row: Row) -> str:
    worst = max(_differing(row) or (), key=lambda each: (each.least, each.gap), default=None)
    return NOT_MEASURED if worst is None else f"{'over ' if worst.least else ''}{worst.gap:.2g} at {worst.token}"


class ServingTable(Picture[Serving]):
    """A row of panels per kind of load, in each a line per traffic with a dot per arm; stock is the line at 1."""

    name = "serving_table"
    reads = Serving
    about = (
        "Medians over the rounds; in brackets the ratio to the arm without jointkv in the same pool. Peak pages: in "
        "use at the most, as seen about once a second. Answers are compared with those of stock vLLM in the large pool "
        "where there is one, so stock's own lines show what another batch alone changes. Where an answer differs, that "
        f"server was asked how likely both tokens are: up to {NEAR_TIE:g} nats apart is a near tie, the others are "
        "answers changed. Largest gap: in nats, and at which token of the answer, from 0."
    )
    text: ClassVar[Columns[Any]] = {
        "traffic": lambda row: heading(row[0]),
        "load": lambda row: row[1].label,
        "arm": lambda row: called(row[2]),
    }
    numbers: ClassVar[Columns[Any]] = {
        **{metric.title: _beside_stock(metric) for metric in TABLED},
        "peak pages": _peak_pages,
        PAGES_FREED.title: lambda row: PAGES_FREED.median(row[0].of(row[2].name, row[1].label)),
        "answers equal": _equal,
        "near ties": lambda row: number(_near_ties(row), "d"),
        "answers changed": lambda row: number(_changed(row), "d"),
        "largest gap": _largest_gap,
    }

    def rows(self, results: Sequence[Serving]) -> list[Row]:
        return [(result, load, arm) for result, load in _lines(results) for arm in arms_run(result, load)]

    def draw(self, results: Sequence[Serving]) -> Figure | None:
        rows, lines = self.rows(results), _lines(results)
        kinds = dict.fromkeys(load.kind for _, load in lines)
        by_kind = {kind: [line for line in lines if line[1].kind == kind] for kind in kinds}
        looks = styles([arm.name for _, _, arm in rows])
        columns, most = len(DRAWN) + 1, max(map(len, by_kind.values()))
        size = (WIDTH, max(FRAME + LINE * most, LEAST_HEIGHT))
        figure, panels = grid(len(by_kind) * columns, columns, size, sharex="col", sharey="row")
        for place, (kind, chosen) in enumerate(by_kind.items()):
            *ratios, last = panels[place * columns : (place + 1) * columns]
            for axes, metric in zip(ratios, DRAWN, strict=True):
                axes.axvline(1, linewidth=0.8, color="0.5", zorder=1)
                _draw_dots(axes, chosen, partial(_ratio, metric=metric), looks)
            _draw_dots(last, chosen, _changed_share, looks)
            ratios[0].set_ylabel(KINDS.get(kind, kind))
            ratios[0].set_yticks(range(len(chosen)), _names(chosen))
            ratios[0].set_ylim(len(chosen) - 0.5, -0.5)
        _name_columns(panels[:columns], panels[-columns:], rows)
        legend_below(figure, columns + 1, [key(name.replace("_", " "), **look) for name, look in looks.items()])
        return figure

    def table(self, results: Sequence[Serving]) -> str:
        """Behind the lines stands what must be known before they are trusted."""
        warned: dict[str, list[str]] = {}
        for result in results:
            for caution in cautions(result):
                warned.setdefault(caution, []).append(words(result.traffic))
        said = "".join(f"- {', '.join(traffics)}: {caution}\n" for caution, traffics in warned.items())
        return super().table(results) + (f"\n{said}" if said else "")

    def conditions(self, result: Serving) -> Mapping[str, object]:
        return conditions(result)


def _lines(results: Sequence[Serving]) -> list[Line]:
    """Results and loads that have more than one arm."""
    return [(result, load) for result in results for load in result.loads if len(arms_run(result, load)) > 1]


def _names(lines: Sequence[Line]) -> list[str]:
    """The traffics, with the load where one has several of a kind."""
    names = [words(result.traffic) for result, _ in lines]
    return [
        name if names.count(name) == 1 else f"{heading(result)}, {load.label}"
        for name, (result, load) in zip(names, lines, strict=True)
    ]


def _name_columns(top: Sequence[Axes], bottom: Sequence[Axes], rows: Sequence[Row]) -> None:
    """Titles above, and below an axis that has room for all `rows`; panels of a column share it."""
    for axes, metric in zip(top, DRAWN, strict=False):
        axes.set_title(f"{metric.short} ÷ stock's")
    top[-1].set_title("answers changed (no near ties)")
    for axes, metric in zip(bottom, DRAWN, strict=False):
        found = [value for row in rows if (value := _ratio(row, metric)) is not None]
        log_axis(axes, "x", min([*found, 0.9]), max([*found, 1.1]))
        axes.set_xlabel("more is better" if metric.higher_is_better else "less is better")
    bottom[-1].set_xlim(-0.01, 1.02 * max(LEAST_SHARE, *(_changed_share(row) or 0.0 for row in rows)))
    bottom[-1].xaxis.set_major_formatter(PercentFormatter(1, 0))
    bottom[-1].set_xlabel("less is better")


def _draw_dots(axes: Axes, lines: Sequence[Line], value: Callable[[Row], float | None], looks: Looks) -> None:
    """A dot per arm on the line of each traffic, a little apart in height."""
    for at, (result, load) in enumerate(lines):
        axes.axhline(at, linewidth=0.6, color=LIGHT, zorder=0)
        arms = arms_run(result, load)
        for place, arm in enumerate(arms):
            found = value((result, load, arm))
            if found is not None:
                height = at + SPREAD * ((place + 0.5) / len(arms) - 0.5)
                axes.plot(found, height, markersize=5, linestyle="", clip_on=False, **looks[arm.name])
