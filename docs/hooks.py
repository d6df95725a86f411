"""For mkdocs: what a block of commands needs (```sh needs=vllm,minutes) is shown above it."""

from __future__ import annotations

import re
from typing import Any

NEEDS = {
    "vllm": "vLLM (make setup-vllm)",
    "server": "a running server",
    "eval": "the baselines (make setup-eval)",
    "data": "a model or requests of your own",
    "minutes": "minutes",
    "prometheus": "Prometheus",
}
"""Words that may stand behind `needs=`."""


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """Turn `needs=` into the title of the block."""
    return re.sub(r"^```sh needs=([\w,]+)$", _title, markdown, flags=re.MULTILINE)


def _title(found: re.Match[str]) -> str:
    return f'```sh title="needs {" and ".join(NEEDS[word] for word in found[1].split(","))}"'
