"""Whether vLLM is installed so that it can start: one place, and one advice, for every verb that runs it."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from jointkv.cli.console import require
from jointkv.errors import BadInput

COMPANIONS = ("torchvision", "torchaudio", "torchcodec")
"""What vLLM's CPU wheel asks for in any build, without using it for text."""


def require_vllm() -> None:
    """Raises ModuleNotFoundError, which `named_errors` explains, where vLLM is missing. Imports nothing.

    Raises `BadInput` where a companion was built for CUDA beside a torch that was not: vLLM's import would fail.
    """
    require("vllm")
    if not _build("torch").endswith("+cpu"):
        return
    wrong = [name for name in COMPANIONS if _build(name) and not _build(name).endswith("+cpu")]
    if wrong:
        raise BadInput(
            f"{', '.join(wrong)} came in another build than torch, which breaks vLLM's import; run: "
            f"pip uninstall --yes {' '.join(wrong)}"
        )


def _build(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
