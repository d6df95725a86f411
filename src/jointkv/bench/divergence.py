"""Where answers part, and how sure the reference was there: a tie that rounding breaks is no ruined answer."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from jointkv.bench.fidelity import Outputs, reference_arm
from jointkv.bench.plan import Plan
from jointkv.bench.result import Divergence, ServingResult
from jointkv.bench.run import Serve
from jointkv.bench.server import ANSWER_SECONDS, Server, ServerFailed, get
from jointkv.evaluate.traffic.base import Tokenizer

ALTERNATIVES = 20
"""Likeliest tokens that the reference is asked for; vLLM tells no more by default."""

Stages = Callable[[str], AbstractContextManager[Any]]
"""Says what is going on while its context is open."""


@dataclass(frozen=True)
class Parting:
    """Two answers to one request, as tokens, up to the first that differs.

    Attributes:
        request: its number in the plan.
        shared: tokens of both answers before it; one that ends has `None` as its next.
    """

    arm: str
    load: str
    round: int
    request: int
    shared: tuple[int, ...]
    reference_token: int | None
    token: int | None


def with_divergences(
    result: ServingResult, plan: Plan, outputs: Outputs, serve: Serve, tokenizer: Tokenizer, stages: Stages
) -> ServingResult:
    """`result`, and how sure the reference arm is where answers part from its own; a server of it is asked.

    Nothing is added where the reference itself fuses.

    Raises:
        ServerFailed: the server did not start or answer.
    """
    reference = result.arm(reference_arm([arm.name for arm in plan.arms]))
    if reference.fusion is not None:
        return result
    found, asked = list(partings(outputs, plan, tokenizer)), []
    if found:
        with stages(f"asking {reference.name} about {len(found)} answers that differ"), serve(reference, 0) as server:
            asked = ask(server, plan, found)
    return result.model_copy(update={"divergences": asked})


def partings(outputs: Outputs, plan: Plan, tokenizer: Tokenizer) -> Iterator[Parting]:
    """Every answer that differs from the reference arm's in the same round.

    Answers are kept as text and made tokens again, which can move a place by a token or so.
    """
    names = [arm.name for arm in plan.arms]
    reference = reference_arm(names)
    for (arm, load, number), texts in outputs.items():
        expected = outputs.get((reference, load, number))
        if arm == reference or expected is None:
            continue
        for request, (text, right) in enumerate(zip(texts, expected, strict=True)):
            if text != right:
                ours, theirs = ([*_tokens(tokenizer, each), None] for each in (text, right))
                place = next((at for at, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), 0)
                shared = tuple(token for token in ours[:place] if token is not None)
                yield Parting(arm, load, number, request, shared, theirs[place], ours[place])


def _tokens(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def ask(server: Server, plan: Plan, found: Sequence[Parting]) -> list[Divergence]:
    """What the reference's server thinks of both tokens where each of `found` parts.

    Raises:
        ServerFailed: it did not answer.
    """
    told: dict[tuple[int, tuple[int, ...]], dict[str, float]] = {}
    result = []
    for parting in found:
        place = (parting.request, parting.shared)
        if place not in told:
            told[place] = _alternatives(server, plan, parting)
        known = told[place]
        floor = min(known.values())
        reference, other = (known.get(f"token_id:{token}") for token in (parting.reference_token, parting.token))
        result.append(
            Divergence(
                arm=parting.arm,
                against=reference_arm([arm.name for arm in plan.arms]),
                load=parting.load,
                round=parting.round,
                request=parting.request,
                token=len(parting.shared),
                gap=abs((floor if reference is None else reference) - (floor if other is None else other)),
                least=reference is None or other is None,
            )
        )
    return result


def _alternatives(server: Server, plan: Plan, parting: Parting) -> dict[str, float]:
    """Log-probabilities of the likeliest next tokens by `token_id:NUMBER`."""
    body = {
        "model": plan.model,
        "prompt": [*plan.requests[parting.request].prompt, *parting.shared],
        "max_tokens": 1,
        "temperature": 0,
        "logprobs": ALTERNATIVES,
        "return_tokens_as_token_ids": True,
    }
    try:
        answer = json.loads(get(f"{server.url}/v1/completions", timeout=ANSWER_SECONDS, body=body))
    except OSError as error:
        server.require_alive("when asked where answers part")
        raise ServerFailed(f"the server did not say how likely tokens are: {error}") from None
    found: dict[str, float] = answer["choices"][0]["logprobs"]["top_logprobs"][0]
    return found
