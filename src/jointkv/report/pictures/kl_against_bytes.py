"""What every method saves, and what it costs, on the same requests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jointkv.report.markdown import NOT_MEASURED, number, table, yes
from jointkv.report.pictures.base import Picture, colour, grid, kl_axis, legend_below, marker
from jointkv.report.results import Evaluation, MethodResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LINEAR_KL = 1e-6
"""KL below this is rounding in float32; the axis is linear there."""
TARGET_KL = 1e-3


class KLAgainstBytes(Picture[Evaluation]):
    """KL against the share of KV bytes saved: a panel per traffic, a line per method, a marker per level."""

    name = "kl_against_bytes"
    reads = Evaluation

    def shows(self, result: Evaluation) -> bool:
        return bool(result.rows)

    def draw(self, results: Sequence[Evaluation]) -> Figure | None:
        rows = [row for row in _rows(results) if row.saved is not None and row.kl is not None]
        if not rows:
            return None
        styles = _styles(rows)
        traffics = list(dict.fromkeys(row.traffic for row in rows))
        figure, panels = grid(len(traffics), 3, (5.2, 4.0), sharey=True)
        most = max(max(row.kl or 0.0, row.kl_worst_request or 0.0) for row in rows)
        for axes, traffic in zip(panels, traffics, strict=True):
            for method, style in styles.items():
                _draw_method(axes, [row for row in rows if (row.traffic, row.method) == (traffic, method)], style)
            _dress(axes, _heading(results, traffic), most)
        for axes in panels[:: min(3, len(panels))]:
            axes.set_ylabel("KL to the unfused model\n(nats per token; whisker: worst request)")
        legend_below(
            figure, 5 if len(panels) > 1 else 3, title="solid: shares across requests, dashed: works on each request"
        )
        return figure

    def table(self, results: Sequence[Evaluation]) -> str:
        first = results[0]
        meanings = {row.method: row.level_means for row in _rows(results) if row.level_means}
        return (
            f"Model {first.model}, {first.dtype}. Saved: share of the unfused KV bytes if numbers had 16 bits, "
            "as served models have. KL in nats per token, mean over all requests and of the worst one.\n\n"
            + table(WORDS, NUMBERS, map(_line, _rows(results)))
            + "".join(f"\n- level of {method}: {means}" for method, means in meanings.items())
            + ("\n" if meanings else "")
        )


WORDS = ("traffic", "method", "level", "shares across requests", "frees engine memory", "counted")
NUMBERS = ("KV bytes saved", "KL", "KL, worst request", "top-1 equal", "NLL (unfused)", "common prefix")


def _line(row: MethodResult) -> list[str]:
    nll, prefix = number(row.nll, ".4f"), number(row.common_prefix, ".1f")
    return [
        row.traffic.replace("_", "-"),
        row.method,
        f"{row.level:g}",
        yes(row.shares_across_requests),
        yes(row.frees_engine_memory),
        row.counted or NOT_MEASURED if row.not_run is None else f"not run: {row.not_run}",
        number(row.saved, ".1%"),
        number(row.kl, ".3g"),
        number(row.kl_worst_request, ".3g"),
        number(row.top1, ".3f"),
        nll if row.nll_reference is None else f"{nll} ({row.nll_reference:.4f})",
        f"{prefix} of {row.generated}" if row.generated and row.common_prefix is not None else prefix,
    ]


def _rows(results: Sequence[Evaluation]) -> list[MethodResult]:
    return [row for result in results for row in result.rows]


def _heading(results: Sequence[Evaluation], traffic: str) -> str:
    known = [result.traffics[traffic] for result in results if traffic in result.traffics]
    return traffic.replace("_", "-") + (f", {known[0].requests} requests" if known else "")


def _styles(rows: Sequence[MethodResult]) -> dict[str, dict[str, Any]]:
    """How each method is drawn; those that share across requests come first and stand out."""
    shares = dict(
        sorted({row.method: row.shares_across_requests for row in rows}.items(), key=lambda pair: not pair[1])
    )
    return {
        method: {
            "color": colour(place),
            "marker": marker(place),
            "linestyle": "-" if sharing else "--",
            "linewidth": 1.8 if sharing else 1.0,
            "markersize": 6 if sharing else 5,
            "markerfacecolor": colour(place) if sharing else "white",
            "label": method,
            "zorder": 3 if sharing else 2,
        }
        for place, (method, sharing) in enumerate(shares.items())
    }


def _draw_method(axes: Axes, rows: Sequence[MethodResult], style: dict[str, Any]) -> None:
    points = sorted((row.saved or 0.0, row.kl or 0.0, row.kl_worst_request or row.kl or 0.0) for row in rows)
    if not points:
        return
    saved, mean, worst = zip(*points, strict=True)
    axes.vlines(saved, mean, worst, color=style["color"], linewidth=0.8, alpha=0.6, zorder=1)
    axes.plot(saved, mean, **style)


def _dress(axes: Axes, heading: str, most: float) -> None:
    from matplotlib.ticker import PercentFormatter

    kl_axis(axes, LINEAR_KL, most)
    axes.axhline(TARGET_KL, color="black", linewidth=0.8, linestyle=":")
    axes.text(
        1.0, TARGET_KL, f"KL {TARGET_KL:g} ", transform=axes.get_yaxis_transform(), fontsize=7, ha="right", va="bottom"
    )
    axes.axvline(0, color="0.85", linewidth=0.8, zorder=0)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xlabel("KV bytes saved (at 16 bits per number)")
    axes.set_title(heading, fontsize=10)
