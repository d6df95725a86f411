"""The model that a verb computes with."""

from typing import TYPE_CHECKING

from jointkv.cli.console import stages

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def locate(name: str) -> str:
    """The folder or hub name of a model; a known one is fetched if it is missing, and the stages are shown.

    Raises `BadInput`, `FetchError`, `ChecksumError`.
    """
    with stages(f"looking for {name}") as show:
        from jointkv.hf.models import locate_model

        return locate_model(name, fetch=True, progress=show)


def load(
    name: str, dtype: str = "bfloat16", attn_implementation: str | None = None
) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """Load a model and its tokenizer, see `locate`. Raises `UnsupportedModel` too."""
    locate(name)
    with stages(f"loading {name}"):
        from jointkv.hf.models import load_model

        return load_model(name, dtype=dtype, attn_implementation=attn_implementation)
