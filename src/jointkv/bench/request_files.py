"""The workload in a user's requests: those that can be served, as token ids."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC
from pathlib import Path
from typing import Any

from jointkv.bench.requests import Limits, ServingRequest, Workload
from jointkv.errors import BadInput
from jointkv.evaluate.request_files import LoggedRequest, Unusable, iter_requests, prompt_tokens

SHOWN = 3
FEWEST_TOKENS = 4
"""Of a prompt and an answer in ShareGPT's format, as in vLLM's benchmark; shorter ones are mostly broken."""


def from_file(
    path: Path,
    tokenizer: Any,
    count: int | None,
    output_tokens: int | None,
    default_output_tokens: int,
    limits: Limits,
    *,
    timed: bool = False,
) -> Workload:
    """The first `count` requests (None: all) of a source that can be used; others before them are counted.

    See `iter_requests` for what a source may hold. How much is generated is said by `output_tokens`, `max_tokens` or
    `max_completion_tokens`, or else by the length of the answer; with `timed` each request has a `timestamp`, in
    seconds or ISO 8601 (without a zone: UTC). Requests with one `session_id` are turns of a conversation, and those
    with a `cache_salt` keep it.

    Args:
        tokenizer: of the `transformers` library.
        output_tokens: for all requests, whatever the file says.
        default_output_tokens: where neither that nor the file says anything.

    Raises:
        BadInput: the file cannot be read, or has no request that can be used; says what is wrong with the first ones.
    """
    requests: list[ServingRequest] = []
    wrong: list[str] = []
    total = 0
    for read in iter_requests(path, LoggedRequest):
        total += 1
        if count is not None and len(requests) == count:
            continue
        try:
            if isinstance(read, Unusable):
                raise BadInput(read.reason)
            request = _serving_request(read, tokenizer, output_tokens, default_output_tokens)
            if timed and request.timestamp is None:
                raise BadInput("no 'timestamp'")
            if (problem := limits.problem(request)) is not None:
                raise BadInput(problem)
        except BadInput as reason:
            wrong.append(f"{read.place.within}: {reason}")
        else:
            requests.append(request if timed else replace(request, timestamp=None))
    if not requests:
        raise BadInput(f"{path}: no request that can be used; {'; '.join(wrong[:SHOWN]) or 'it is empty'}")
    if timed:
        requests = _from_zero(requests)
    description = f"{len(requests)} of {total} requests of {path.name}"
    if wrong:
        description += f"; {len(wrong)} could not be used, the first at {wrong[0]}"
    return Workload(path.stem, description, tuple(requests))


def _serving_request(read: LoggedRequest, tokenizer: Any, output_tokens: int | None, default: int) -> ServingRequest:
    """Raises `BadInput` for a conversation with hardly any tokens of prompt or answer, and as `prompt_tokens`."""
    prompt = prompt_tokens(tokenizer, read)
    answer = len(tokenizer(read.answer, add_special_tokens=False)["input_ids"]) if read.answer else 0
    if read.from_conversation and min(len(prompt), answer) < FEWEST_TOKENS:
        raise BadInput(f"a prompt of {len(prompt)} tokens and an answer of {answer}; {FEWEST_TOKENS} are the least")
    when = read.timestamp
    if when is not None and when.tzinfo is None:
        when = when.replace(tzinfo=UTC)
    length = output_tokens or read.output_tokens or answer or default
    seconds = None if when is None else when.timestamp()
    return ServingRequest(prompt, length, seconds, session=read.session_id, salt=read.cache_salt, answer=read.answer)


def _from_zero(requests: list[ServingRequest]) -> list[ServingRequest]:
    """By time, the first at 0."""
    timed = sorted((request.timestamp or 0.0, place) for place, request in enumerate(requests))
    return [replace(requests[place], timestamp=when - timed[0][0]) for when, place in timed]
