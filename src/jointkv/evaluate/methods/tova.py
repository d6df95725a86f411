"""TOVA, arXiv 2401.06104."""

from typing import Any

from jointkv.evaluate.methods.pressed import Pressed


class TOVA(Pressed):
    """Keeps per layer the tokens that the last token of the prompt attends to."""

    name = "tova"
    description = "tokens that the last token of the prompt attends to (TOVA)"

    def press(self, compression_ratio: float) -> Any:
        from kvpress import TOVAPress

        return TOVAPress(compression_ratio)
