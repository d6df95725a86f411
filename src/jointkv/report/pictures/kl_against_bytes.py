"""What every method saves, and what it costs, on the same requests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from jointkv.evaluate.compare.result import Evaluation, MethodRow
from jointkv.report.figure import colour, grid, kl_axis, legend_below, marker
from jointkv.report.markdown import NOT_MEASURED, Columns, beside, number, table, words
from jointkv.report.pictures.base import Picture

TARGET_KL = 1e-3


class KLAgainstBytes(Picture[Evaluation]):
    """KL against the share of KV bytes saved: a panel per traffic, a line per method, a marker per level."""

    name = "kl_against_bytes"
    reads = Evaluation

    def rows(self, results: Sequence[Evaluation]) -> list[MethodRow]:
        return [row for result in results for row in result.rows]

    def draw(self, results: Sequence[Evaluation]) -> Figure | None:
        rows = [row for row in self.rows(results) if row.share_16bit is not None and row.kl is not None]
        if not rows:
            return None
        # Methods that share across requests come first and stand out.
        methods = sorted({row.method: row.shares_across_requests for row in rows}.items(), key=lambda pair: not pair[1])
        requests = {name: traffic.requests for result in results for name, traffic in result.traffics.items()}
        traffics = list(dict.fromkeys(row.traffic for row in rows))
        label = "KL to the unfused model\n(nats per token; whisker: worst request)"
        figure, panels = grid(len(traffics), 3, (5.2, 4.0), label, sharey=True)
        most = max(max(row.kl or 0.0, row.kl_worst_request or 0.0) for row in rows)
        for axes, traffic in zip(panels, traffics, strict=True):
            for place, (method, shares) in enumerate(methods):
                chosen = [row for row in rows if (row.traffic, row.method) == (traffic, method)]
                _draw_method(axes, chosen, place, shares)
            kl_axis(axes, most)
            axes.axhline(TARGET_KL, color="black", linewidth=0.8, linestyle=":")
            right = axes.get_yaxis_transform()
            axes.text(1.0, TARGET_KL, f"KL {TARGET_KL:g} ", transform=right, fontsize=7, ha="right", va="bottom")
            axes.axvline(0, color="0.85", linewidth=0.8, zorder=0)
            axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
            axes.set_xlabel("KV bytes saved (at 16 bits per number)")
            axes.set_title(words(traffic) + (f", {requests[traffic]} requests" if traffic in requests else ""))
        title = "solid: shares across requests, dashed: works on each request"
        legend_below(figure, 5 if len(panels) > 1 else 3, title=title)
        return figure

    def table(self, results: Sequence[Evaluation]) -> str:
        rows = self.rows(results)
        meanings = {row.method: row.level_means for row in rows if row.level_means}
        return (
            f"Model {results[0].model}, {results[0].dtype}. Saved: share of the unfused KV bytes if numbers had 16 "
            "bits, as served models have. KL in nats per token, mean over all requests and of the worst one.\n\n"
            + table(TEXT, NUMBERS, rows)
            + "".join(f"\n- level of {method}: {means}" for method, means in meanings.items())
            + ("\n" if meanings else "")
        )

    def conditions(self, result: Evaluation) -> Mapping[str, object]:
        requests = {
            f"requests of traffic {name}": (asked.requests, asked.prompt_tokens)
            for name, asked in result.traffics.items()
        }
        return {"model": result.model, "dtype": result.dtype, **requests}


TEXT: Columns[MethodRow] = {
    "traffic": lambda row: words(row.traffic),
    "method": lambda row: row.method,
    "level": lambda row: f"{row.level:g}",
    "shares across requests": lambda row: "yes" if row.shares_across_requests else "no",
    "frees engine memory": lambda row: "yes" if row.frees_engine_memory else "no",
    "counted": lambda row: row.counted or NOT_MEASURED if row.not_run is None else f"not run: {row.not_run}",
}
NUMBERS: Columns[MethodRow] = {
    "KV bytes saved": lambda row: NOT_MEASURED if row.share_16bit is None else f"{1 - row.share_16bit:.1%}",
    "KL": lambda row: number(row.kl, ".3g"),
    "KL, worst request": lambda row: number(row.kl_worst_request, ".3g"),
    "top-1 equal": lambda row: number(row.top1, ".3f"),
    "NLL (unfused)": lambda row: beside(row.nll, row.nll_reference, ".4f"),
    "common prefix": lambda row: (
        number(row.common_prefix, ".1f")
        + (f" of {row.generated}" if row.generated and row.common_prefix is not None else "")
    ),
}


def _draw_method(axes: Axes, rows: Sequence[MethodRow], place: int, shares: bool) -> None:
    points = sorted(
        (1 - (row.share_16bit or 0.0), row.kl or 0.0, row.kl_worst_request or row.kl or 0.0) for row in rows
    )
    if not points:
        return
    saved, mean, worst = zip(*points, strict=True)
    hue = colour(place)
    look = (
        {"linestyle": "-", "linewidth": 1.8, "markersize": 6, "zorder": 3}
        if shares
        else {"linestyle": "--", "linewidth": 1.0, "markersize": 5, "markerfacecolor": "white"}
    )
    axes.vlines(saved, mean, worst, color=hue, linewidth=0.8, alpha=0.6, zorder=1)
    axes.plot(saved, mean, color=hue, marker=marker(place), label=rows[0].method, **look)
