"""What a command shows in a terminal, as a picture that needs no network: SVG."""

from __future__ import annotations

import io
import re

from rich.console import CONSOLE_SVG_FORMAT, Console
from rich.markdown import Markdown
from rich.text import Text

FONT_FACE = re.compile(r"@font-face \{\{.*?\}\}\s*", re.DOTALL)
"""Of rich's picture: fonts from another server. Without them the reader's own monospaced one is taken."""

COLUMNS = 150


def recording(command: str, shown: str, columns: int = COLUMNS) -> str:
    """An SVG of a terminal of so many `columns` in which `command` was given and has printed the Markdown `shown`."""
    console = Console(record=True, file=io.StringIO(), width=columns, color_system="truecolor", force_terminal=True)
    console.print(Text(f"$ {command}", style="bold"))
    console.print(Markdown(shown))
    svg = console.export_svg(title=command, code_format=FONT_FACE.sub("", CONSOLE_SVG_FORMAT), unique_id="jointkv")
    return "\n".join(line.rstrip() for line in svg.splitlines()) + "\n"
