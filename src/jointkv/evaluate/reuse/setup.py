"""What the study of skipped blocks runs on: settings, and requests with one text behind headers of one kind."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from jointkv.errors import BadInput
from jointkv.evaluate.holding.batch import context_of
from jointkv.evaluate.reuse.headers import KINDS, headers
from jointkv.evaluate.reuse.texts import texts_of
from jointkv.evaluate.traffic.base import Request, Tokenizer, encode
from jointkv.system.nearest import not_known

UNIT = 16
"""Tokens of the blocks that are compared; larger blocks are several of them."""

FEWEST_TEXTS = 2
"""A setting is chosen on the other texts."""

FEWEST_HEADERS = 8


@dataclass(frozen=True)
class ReuseSettings:
    """Sizes of the study.

    Attributes:
        kinds: of headers.
        texts: of each kind, at the most.
        headers: per text, hence requests that are compared with each other.
        header_tokens, text_tokens: of every request.
        block_sizes: tokens per block, multiples of `UNIT`.
        sources, witnesses: requests that hold the text, and earlier comparisons with each of them; all are combined.
        draws: of a request, its sources and their witnesses, from each text.
        seed: of headers and texts.
    """

    kinds: tuple[str, ...] = tuple(KINDS)
    texts: int = 4
    headers: int = 20
    header_tokens: int = 32
    text_tokens: int = 384
    block_sizes: tuple[int, ...] = (16, 32)
    sources: tuple[int, ...] = (1, 4)
    witnesses: tuple[int, ...] = (0, 2, 8, 15)
    draws: int = 200
    seed: int = 0

    def check(self, model: PreTrainedModel) -> None:
        """Raises `BadInput` where a setting makes no sense or does not fit into the model's context."""
        for kind in self.kinds:
            if kind not in KINDS:
                raise BadInput(f"unknown kind of headers {not_known(kind, KINDS)}")
        least = {"texts": FEWEST_TEXTS, "headers": FEWEST_HEADERS, "draws": 1}
        least |= {"header_tokens": UNIT, "text_tokens": UNIT}
        for name, minimum in least.items():
            if getattr(self, name) < minimum:
                raise BadInput(f"{name}: {getattr(self, name)} is less than {minimum}")
        for size in self.block_sizes:
            if size < UNIT or size % UNIT or self.header_tokens % size or self.text_tokens % size:
                raise BadInput(f"block size {size}: no multiple of {UNIT} that divides header and text")
        if any(count < 1 for count in self.sources) or any(count < 0 for count in self.witnesses):
            raise BadInput("sources must be at least 1, witnesses at least 0")
        context, needed = context_of(model), self.header_tokens + self.text_tokens + 1
        if context is not None and needed > context:
            raise BadInput(f"{needed} tokens per request; the model reads {context}")

    @property
    def evidence(self) -> list[tuple[int, int]]:
        """Numbers of sources and witnesses for which there are requests enough."""
        return [
            (sources, witnesses)
            for witnesses in self.witnesses
            for sources in self.sources
            if 1 + sources + witnesses <= self.headers
        ]


@dataclass(frozen=True)
class Sample:
    """Requests that hold one text, each behind a header of its own."""

    kind: str
    text: str
    requests: Sequence[Request]


def samples(tokenizer: Tokenizer, settings: ReuseSettings) -> list[Sample]:
    """All texts of all kinds; one seed, one result. Raises `BadInput` where there are too few headers or tokens."""
    made = []
    for kind in settings.kinds:
        for name, write in list(texts_of(kind).items())[: settings.texts]:
            rng = random.Random(f"{settings.seed} {kind} {name}")
            text = encode(tokenizer, write(rng))[: settings.text_tokens]
            if len(text) < settings.text_tokens:
                raise BadInput(f"{name}: the text has {len(text)} tokens with this tokenizer")
            drawn = headers(kind, tokenizer, settings.headers, settings.header_tokens, rng)
            if len(drawn) < settings.headers:
                raise BadInput(f"{kind}: {len(drawn)} headers of {settings.header_tokens} tokens with this tokenizer")
            # The last token of a prompt is not prefilled, so one more stands behind the text.
            requests = [Request((*header, *text, text[-1]), (), "") for header in drawn]
            made.append(Sample(kind, name, requests))
    return made
