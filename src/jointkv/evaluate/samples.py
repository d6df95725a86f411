"""The texts that come with the package; `data/SOURCES.md` gives origin and licence of each."""

from importlib import resources
from pathlib import Path


def packaged(file: str) -> Path:
    """A file in the folder of samples."""
    return Path(str(resources.files("jointkv.evaluate") / "data" / file))
