"""SnapKV, arXiv 2404.14469."""

from typing import Any

from jointkv.evaluate.methods.pressed import Pressed


class SnapKV(Pressed):
    """Keeps per head the tokens that the last 64 tokens of the prompt attend to, and those 64."""

    name = "snapkv"
    description = "tokens that the last 64 tokens of the prompt attend to (SnapKV)"

    def press(self, compression_ratio: float) -> Any:
        from kvpress import SnapKVPress

        return SnapKVPress(compression_ratio)
