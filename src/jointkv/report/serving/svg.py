"""Figures as SVG inside a page: text stays text, ink and grid are the page's, ids are its own, the same every time."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from typing import TYPE_CHECKING

from jointkv.report.serving.charts import BAND, LIGHT

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_INK = "#202124"
_SALT = "jointkv"
_PAGE_COLOURS = {_INK: "currentColor", LIGHT: "var(--grid)", BAND: "var(--band)"}
_SIZE = 9.5


@contextmanager
def page_style() -> Iterator[None]:
    """Figures made and written inside it are for `inline`."""
    import matplotlib

    coloured = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    sizes = ("font.size", "axes.labelsize", "xtick.labelsize", "ytick.labelsize", "legend.fontsize")
    options = {"svg.fonttype": "none", "svg.hashsalt": _SALT, "text.parse_math": False, "axes.linewidth": 0.7}
    options |= {"axes.spines.top": False, "axes.spines.right": False}
    with matplotlib.rc_context({**options, **dict.fromkeys(coloured, _INK), **dict.fromkeys(sizes, _SIZE)}):
        yield


def inline(figure: Figure, name: str, description: str) -> str:
    """`figure` as an `<svg>` element, which a page takes as it is.

    Args:
        name: unique in the page; letters, digits and `-`.
        description: what the chart shows, for those who do not see it.
    """
    stream = io.StringIO()
    no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(stream, format="svg", transparent=True, metadata=no_metadata)
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'href="#', f'href="#{name}-', text)
    text = re.sub(r"url\(#", f"url(#{name}-", text)
    for colour, variable in _PAGE_COLOURS.items():
        text = text.replace(colour, variable)
    head, body = text.split(">", 1)
    head = re.sub(r' (width|height)="[^"]*"', "", head)
    title = f'<title id="{name}-title">{escape(description)}</title>'
    return f'{head} role="img" aria-labelledby="{name}-title">{title}{body}'.rstrip()
