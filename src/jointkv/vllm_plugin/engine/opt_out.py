"""Who takes part in sharing: what a client says, with the extra argument `jointkv` of a request, and what cannot."""

from __future__ import annotations

from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams
from vllm.v1.request import Request
from vllm.v1.sample.logits_processor import LogitsProcessor
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as LogitsProcessorV2

from jointkv.errors import BadInput
from jointkv.vllm_plugin import REQUEST_CHECK

OPT_OUT = "jointkv"
YES, NO = ("true", "1", "yes", "on"), ("false", "0", "no", "off")


def choice(extra: dict[str, Any] | None) -> bool | None:
    """Whether the request is to take part; None where it does not say.

    Raises `BadInput` for what is neither yes nor no: a switch for privacy guesses nothing.
    """
    if not extra or OPT_OUT not in extra:
        return None
    said = extra[OPT_OUT]
    # The OpenAI API knows no booleans here: JSON's false arrives as 0, or as 0.0.
    word = said.strip().lower() if isinstance(said, str) else str(int(said)) if said in (0, 1) else None
    if word in YES:
        return True
    if word in NO:
        return False
    raise BadInput(f"the extra argument {OPT_OUT!r} is neither true nor false")


def left_alone(request: Request) -> str | None:
    """Why `request` takes no part, one of `metrics.LEFT_ALONE`; None if it does."""
    params = request.sampling_params
    try:
        wish = choice(params.extra_args if params is not None else None)
    except BadInput:
        return "not_understood"  # an engine that was not started with `engine_args` may let it through
    if wish is False:
        return "opted_out"
    scored = params is not None and (params.prompt_logprobs, params.prompt_logprob_token_ids) != (None, None)
    if scored and not wish:
        return "prompt_logprobs"
    # Its blocks can be told apart by their tokens alone.
    if request.prompt_embeds is not None or request.prompt_token_ids is None or request.resumable:
        return "not_tokens"
    return None


class RequestCheck(LogitsProcessor, LogitsProcessorV2):
    """Refuses a request whose wish is not understood, where vLLM takes it in: clients of the server get code 400.

    vLLM asks the classes of logits processors about every request, before the engine has seen it. This one has nothing
    else to do, and workers leave it out, see `without_check`: it would cost them the tokens of every request at every
    step. It is one for both of vLLM's model runners: the engine's arguments are there before the runner is chosen.
    """

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Raises vLLM's error for a request that is not valid."""
        try:
            choice(sampling_params.extra_args)
        except BadInput as error:
            raise VLLMValidationError(f"{error}; leave it out, or give one of {', '.join((*YES, *NO))}") from None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to keep."""

    def apply(self, logits: Any, *args: Any, **kwargs: Any) -> Any:
        """As they are."""
        return logits

    def is_argmax_invariant(self) -> bool:
        """Nothing changes."""
        return True

    def update_state(self, batch_update: Any) -> None:
        """Nothing to follow."""


def without_check(processors: list[Any] | None) -> list[Any] | None:
    """A model's logits processors without `RequestCheck`; None if none is left."""
    return [each for each in processors or () if each not in (REQUEST_CHECK, RequestCheck)] or None
