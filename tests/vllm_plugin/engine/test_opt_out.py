"""What a client says of sharing is understood, or refused by name; never guessed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams

from jointkv.errors import BadInput
from jointkv.vllm_plugin import engine_args
from jointkv.vllm_plugin.engine.opt_out import NO, YES, RequestCheck, choice, left_alone, without_check
from tests.vllm_plugin.scheduling import TOKENS, new_request


@pytest.mark.parametrize("word", [*YES, *NO])
def test_the_usual_spellings(word: str) -> None:
    for spelling in (word, word.upper(), f" {word.title()} "):
        assert choice({"jointkv": spelling, "other": 1}) is (word in YES)


@pytest.mark.parametrize("said", [True, 1, 1.0, False, 0, 0.0])
def test_numbers_as_the_api_has_them(said: float) -> None:
    assert choice({"jointkv": said}) is bool(said)


@pytest.mark.parametrize("extra", [None, {}, {"other": "nonsense"}])
def test_who_says_nothing(extra: dict[str, Any] | None) -> None:
    assert choice(extra) is None
    RequestCheck.validate_params(SamplingParams(extra_args=extra))


@pytest.mark.parametrize("said", ["nonsense", "", "fals", "2", 2, -1, 0.5, float("nan"), None, [], ["false"], {}])
def test_what_is_not_understood_is_refused(said: Any) -> None:
    with pytest.raises(BadInput, match="neither true nor false"):
        choice({"jointkv": said})
    with pytest.raises(VLLMValidationError, match="leave it out, or give one of true, 1"):
        RequestCheck.validate_params(SamplingParams(extra_args={"jointkv": said}))


def test_workers_leave_the_check_out() -> None:
    ours = engine_args()["logits_processors"]
    assert without_check(ours) is None and without_check(None) is None
    assert without_check([RequestCheck, "mine:Processor", *ours]) == ["mine:Processor"]


@pytest.mark.parametrize(
    ("extra", "more", "expected"),
    [
        (None, {}, None),
        ({"jointkv": True}, {}, None),
        ({"jointkv": " No "}, {}, "opted_out"),
        ({"jointkv": "nonsense"}, {}, "not_understood"),
        (None, {"prompt_embeds": torch.zeros(len(TOKENS), 8)}, "not_tokens"),
        (None, {"prompt_embeds": torch.zeros(len(TOKENS), 8), "prompt_token_ids": None}, "not_tokens"),
        (None, {"resumable": True}, "not_tokens"),
    ],
)
def test_who_is_left_alone(extra: dict[str, Any] | None, more: dict[str, Any], expected: str | None) -> None:
    assert left_alone(new_request({}, extra=extra, **more)) == expected


def test_log_probabilities_of_a_prompt_are_moved_only_where_the_client_agrees() -> None:
    for extra, expected in ((None, "prompt_logprobs"), ({"jointkv": "on"}, None), ({"jointkv": 0}, "opted_out")):
        request = new_request({}, extra=extra)
        assert request.sampling_params is not None
        request.sampling_params.logprobs = 5
        assert left_alone(request) == (expected if expected == "opted_out" else None)
        request.sampling_params.prompt_logprobs = 0
        assert left_alone(request) == expected
