"""What pages cost by codec: how many times smaller they get, against what the answers lose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jointkv.evaluate.record import Positive, Record
from jointkv.report.figure import colour, grid, legend_below, log_axis, marker, plain_ticks
from jointkv.report.markdown import NOT_MEASURED, Columns, number, table, words
from jointkv.report.pictures.base import Picture

LEAST_KL = 1e-6


class CodecRow(Record):
    """One codec on one kind of traffic.

    Attributes:
        codec: lines of one codec are joined.
        setting: its step, or bounds and step.
        ratio: bytes at 16 bits per number over those sent.
        kl, worst_request_kl: in nats per token behind the prompts; the mean, and that of the worst prompt.
    """

    traffic: str
    codec: str
    setting: str
    ratio: Positive
    kl: float
    worst_request_kl: float | None = None


class Published(Record):
    """What others say of their own codec, on models and by measures of their own.

    Attributes:
        low, high: times smaller than 16 bits.
    """

    name: str
    low: Positive
    high: Positive
    quality: str
    source: str


class CodecRates(Record):
    """Bytes of pages against KL, as benchmarks/codec.py writes them."""

    format: Literal["jointkv.codec/1"] = "jointkv.codec/1"
    model: str
    block_size: int
    rows: list[CodecRow]
    published: list[Published]


class RatesOfCodecs(Picture[CodecRates]):
    """A panel per traffic, and one of what others published, whose KL nobody knows."""

    name = "codec_rates"
    reads = CodecRates

    def rows(self, results: Sequence[CodecRates]) -> list[CodecRow]:
        return [row for result in results for row in result.rows]

    def draw(self, results: Sequence[CodecRates]) -> Figure:
        rows, published = self.rows(results), _published(results)
        traffics, codecs = (list(dict.fromkeys(getattr(row, part) for row in rows)) for part in ("traffic", "codec"))
        highest = max(*(row.ratio for row in rows), *(peer.high for peer in published), 2.0)
        figure, panels = grid(len(traffics) + bool(published), 4, (3.2, 3.4), "times smaller than 16 bits", sharey=True)
        for axes, traffic in zip(panels, traffics, strict=False):
            for place, codec in enumerate(codecs):
                _draw(axes, [row for row in rows if (row.traffic, row.codec) == (traffic, codec)], place)
            log_axis(axes, "x", LEAST_KL, max(1e-2, *(row.kl for row in rows)))
            axes.set_xticks([10.0**power for power in range(-6, -1, 2)])
            axes.axvline(1e-3, color="black", linewidth=0.8, linestyle=":")
            axes.set_xlabel("KL (nats)")
            axes.set_title(words(traffic))
        if published:
            _draw_published(panels[-1], published)
        for axes in panels:
            log_axis(axes, "y", 1.0, highest)
            plain_ticks(axes.yaxis)
        legend_below(figure, 7)
        return figure

    def table(self, results: Sequence[CodecRates]) -> str:
        published = _published(results)
        return (
            f"Model {results[0].model}, blocks of {results[0].block_size} tokens. Times smaller: against 16 bits per "
            "number. KL in nats per token behind a prompt that is read from decoded pages, against the model with what "
            "it computed: the mean, and that of the worst prompt.\n\n"
            + table(TEXT, NUMBERS, self.rows(results))
            + "\nWhat others publish, on other models and by other measures, so beside and not against:\n\n"
            + table(PUBLISHED, {"times smaller": _range}, published)
        )

    def conditions(self, result: CodecRates) -> Mapping[str, object]:
        return {"model": result.model, "block size": result.block_size}


TEXT: Columns[CodecRow] = {
    "traffic": lambda row: words(row.traffic),
    "codec": lambda row: row.codec,
    "setting": lambda row: row.setting or NOT_MEASURED,
}
NUMBERS: Columns[CodecRow] = {
    "times smaller": lambda row: f"{row.ratio:.2f}",
    "KL": lambda row: number(row.kl, ".2g"),
    "KL, worst prompt": lambda row: number(row.worst_request_kl, ".2g"),
}
PUBLISHED: Columns[Published] = {
    "codec": lambda peer: peer.name,
    "quality": lambda peer: peer.quality,
    "source": lambda peer: peer.source,
}


def _published(results: Sequence[CodecRates]) -> list[Published]:
    return list({peer.name: peer for result in results for peer in result.published}.values())


def _range(peer: Published) -> str:
    return f"{peer.low:g}" if peer.low == peer.high else f"{peer.low:g} to {peer.high:g}"


def _draw(axes: Axes, rows: Sequence[CodecRow], place: int) -> None:
    points = sorted((max(row.kl, LEAST_KL), row.ratio) for row in rows)
    if points:
        axes.plot(*zip(*points, strict=True), marker=marker(place), color=colour(place), label=rows[0].codec)


def _draw_published(axes: Axes, published: Sequence[Published]) -> None:
    for place, peer in enumerate(published):
        axes.plot([place, place], [peer.low, peer.high], marker="_", color="0.35", linewidth=2, markersize=10)
    axes.set_xticks(range(len(published)), [peer.name for peer in published], rotation=25, ha="right", fontsize=8)
    axes.set_xlim(-0.6, len(published) - 0.4)
    axes.set_title("published, KL unknown")
