"""Expected attention, arXiv 2510.00636."""

from typing import Any

from jointkv.evaluate.methods.pressed import Pressed


class ExpectedAttention(Pressed):
    """Keeps per head the tokens to which queries of the prompt's distribution would attend at later positions."""

    name = "expected_attention"
    description = "tokens that future queries are expected to attend to"

    def press(self, compression_ratio: float) -> Any:
        from kvpress import ExpectedAttentionPress

        return ExpectedAttentionPress(compression_ratio)
