"""StreamingLLM, arXiv 2309.17453."""

from typing import Any

from jointkv.evaluate.methods.pressed import Pressed


class StreamingLLM(Pressed):
    """Keeps the first 4 tokens and the last ones, at their true positions."""

    name = "streaming_llm"
    description = "the first 4 tokens and the last ones (StreamingLLM)"

    def press(self, compression_ratio: float) -> Any:
        from kvpress import StreamingLLMPress

        return StreamingLLMPress(compression_ratio)
