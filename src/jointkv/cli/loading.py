"""What verbs load before they compute: a model, and the token ids of a user's requests."""

from typing import TYPE_CHECKING

from jointkv.cli.console import stages
from jointkv.errors import BadInput

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from jointkv.evaluate.traffic.jsonl import UserRequest


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


def request_tokens(tokenizer: "PreTrainedTokenizerBase", request: "UserRequest", chat: bool) -> list[int]:
    """Token ids to prefill for `request`; with `chat` a plain prompt becomes a user message where possible.

    Raises `BadInput` when there are messages and the tokenizer has no chat template, or refuses them.
    """
    from jinja2 import TemplateError

    from jointkv.evaluate.traffic.base import encode

    if request.prompt is not None and not (chat and tokenizer.chat_template):
        return list(encode(tokenizer, request.prompt))
    if not tokenizer.chat_template:
        raise BadInput(f"line {request.line}: messages, but this model's tokenizer has no chat template")
    messages = list(request.messages) or [{"role": "user", "content": request.prompt}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise BadInput(f"line {request.line}: the chat template refuses the messages: {error}") from error
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
