"""Heat map of how alike KV blocks are, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jointkv.errors import BadInput
from jointkv.evaluate.predict.similarity import ERROR_BOUNDS, RELATIONS, SIDES, Similarity
from jointkv.system.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_LABELLED_LAYERS = 40
"""With more layers the cells are too narrow for numbers."""

Value = Callable[[Similarity], float]


def draw_similarity(found: Sequence[Similarity], path: Path, title: str) -> None:
    """Write a PNG with layers from left to right, and K and V across and within requests from top to bottom.

    One map shows the mean cosine, and one per error bound the share of pairs within it. Cells without a
    pair are grey.

    Raises:
        BadInput: matplotlib is not installed, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise BadInput("the heat map needs matplotlib; run: pip install 'jointkv[plot]'") from None
    maps: list[tuple[str, str, Value]] = [("Mean cosine of two blocks", "cosine", lambda row: row.mean)]
    for number, bound in enumerate(ERROR_BOUNDS):
        maps.append(
            (
                f"Pairs that could share a page within a relative error of {bound:g}",
                "share of pairs",
                lambda row, number=number: row.share_within[number],  # type: ignore[misc]
            )
        )
    layers = sorted({row.layer for row in found})
    present = {(row.side, row.relation) for row in found}
    lines = [(side, relation) for side in SIDES for relation in RELATIONS if (side, relation) in present]
    width = min(24.0, max(7.5, 3.0 + 0.4 * len(layers)))
    figure = Figure(figsize=(width, len(maps) * (1.0 + 0.42 * len(lines)) + 0.8), layout="constrained")
    figure.suptitle(title, fontsize=10)
    all_axes = figure.subplots(len(maps), 1, squeeze=False)[:, 0]
    for axes, (heading, unit, value) in zip(all_axes, maps, strict=True):
        cells = {(row.side, row.relation, row.layer): value(row) for row in found}
        grid = [[cells[(*line, layer)] for layer in layers] for line in lines]
        axes.set_title(heading, fontsize=10)
        _draw_map(axes, grid, layers, [f"{'K' if side == 'key' else 'V'} {rel}" for side, rel in lines], unit)
    all_axes[-1].set_xlabel("layer")
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=130)


def _draw_map(axes: Axes, grid: list[list[float]], layers: list[int], names: list[str], unit: str) -> None:
    import matplotlib

    colours = matplotlib.colormaps["viridis"].with_extremes(bad="0.85")
    values = np.asarray(grid, dtype=float)
    lowest = float(np.nanmin(values)) if np.isfinite(values).any() else 0.0
    # From 0 wherever possible, so that one colour means one number in every picture.
    image = axes.imshow(values, cmap=colours, vmin=min(0.0, lowest), vmax=1.0, aspect="auto")
    axes.set_yticks(range(len(names)), names)
    step = -(-len(layers) // MOST_LABELLED_LAYERS)
    axes.set_xticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]], fontsize=8)
    axes.figure.colorbar(image, ax=axes, label=unit, pad=0.01)
    if step == 1:
        _write_numbers(axes, values, image)


def _write_numbers(axes: Axes, values: Any, image: Any) -> None:
    for (line, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            colour = "black" if image.norm(value) > 0.6 else "white"
            text = f"{value:.2f}".replace("0.", ".", 1)
            axes.text(column, line, text, ha="center", va="center", fontsize=7, color=colour)
