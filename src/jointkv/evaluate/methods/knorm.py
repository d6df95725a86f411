"""Key norms, arXiv 2406.11430."""

from typing import Any

from jointkv.evaluate.methods.pressed import Pressed


class Knorm(Pressed):
    """Keeps per head the tokens whose keys have the smallest norms."""

    name = "knorm"
    description = "tokens whose keys have a small norm"

    def press(self, compression_ratio: float) -> Any:
        from kvpress import KnormPress

        return KnormPress(compression_ratio)
