"""Writing a file in one step: whoever reads it finds either all of it or what was there before."""

import os
from pathlib import Path


def replace_text(path: Path, text: str) -> None:
    """Write `text` beside `path`, then put it in its place. Raises OSError, with `path` as it was."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        if temporary.exists():
            temporary.unlink()
