"""How alike KV blocks are, layer by layer: the heat maps of `jointkv inspect`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.colors import Normalize

from jointkv.evaluate.predict.similarity import ERROR_BOUNDS, RELATIONS, SIDES, Similarity
from jointkv.report.figure import grid, heat_map, png, style
from jointkv.system.files import replacing


def draw_similarity(found: Sequence[Similarity], path: Path, title: str) -> None:
    """Write a PNG with layers from left to right, and K and V across and within requests from top to bottom.

    One map shows the mean cosine, and one per error bound the share of pairs within it. Cells without a pair are grey.
    Raises `BadInput` if the file cannot be written.
    """
    maps: list[tuple[str, str, Callable[[Similarity], float]]] = [
        ("Mean cosine of two blocks", "cosine", lambda row: row.mean)
    ]
    for place, bound in enumerate(ERROR_BOUNDS):
        heading = f"Pairs that could share a page within a relative error of {bound:g}"
        maps.append((heading, "share of pairs", lambda row, place=place: row.share_within[place]))  # type: ignore[misc]
    layers = sorted({row.layer for row in found})
    lines = [(side, relation) for side in SIDES for relation in RELATIONS]
    lines = [line for line in lines if line in {(row.side, row.relation) for row in found}]
    names = [f"{'K' if side == 'key' else 'V'} {relation}" for side, relation in lines]
    with style():
        figure, panels = grid(len(maps), 1, (min(24.0, max(7.5, 3.0 + 0.4 * len(layers))), 1.2 + 0.42 * len(lines)))
        figure.suptitle(title, fontsize=10)
        for axes, (heading, unit, value) in zip(panels, maps, strict=True):
            cells = {(row.side, row.relation, row.layer): value(row) for row in found}
            values = np.array([[cells[(*line, layer)] for layer in layers] for line in lines])
            # From 0 wherever possible, so that one colour means one number in every picture.
            norm = Normalize(min(0.0, *values[np.isfinite(values)]), 1.0)
            image = heat_map(axes, values, names, list(map(str, layers)), norm, ".2f")
            axes.set_title(heading)
            figure.colorbar(image, ax=axes, label=unit, pad=0.01)
        panels[-1].set_xlabel("layer")
        with replacing(path) as file:
            file.write_bytes(png(figure))
