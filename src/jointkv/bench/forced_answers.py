"""Has an engine give answers that are known, and notes what it held of each of their tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

from jointkv.evaluate.score.likeliest import Likeliest
from jointkv.evaluate.score.summary import RequestSums

ARGUMENT = "forced_answer"
"""The extra argument with the number of the request; one without it is left alone."""

KEPT = 1024
"""Tokens of a distribution that are told apart."""

COLUMNS = ("tokens", "log_probabilities", "rest")

Answers = Mapping[int, Sequence[Likeliest]]
"""By request and token the distributions of a reference, whose answer is the likeliest token of each."""


class ForcedAnswers(AdapterLogitsProcessor):
    """Of requests with `ARGUMENT`; a processor of vLLM's V1 runner with synchronous scheduling.

    Without a reference it takes the engine's own greedy answers for one.

    Attributes:
        reference: what is forced.
        held: by request and token what the engine held: a distribution, or its sums against the reference.
    """

    def __init__(self, config: Any, device: torch.device, is_pin_memory: bool) -> None:
        super().__init__(config, device, is_pin_memory)
        self.reference: Answers | None = None
        self.held: dict[int, dict[int, Any]] = {}

    def is_argmax_invariant(self) -> bool:
        """It changes the likeliest token."""
        return False

    def new_req_logits_processor(self, params: SamplingParams) -> Callable[[list[int], Tensor], Tensor] | None:
        """What notes and forces the tokens of one request."""
        number = (params.extra_args or {}).get(ARGUMENT)
        if number is None:
            return None

        def force(output: list[int], logits: Tensor) -> Tensor:
            # A prompt that is computed in parts, or again, is asked about before it is whole; the last word counts.
            held = self.held.setdefault(number, {})
            if self.reference is None:
                held[len(output)] = right = Likeliest.of(logits.cpu(), KEPT)
            else:
                right = self.reference[number][len(output)]
                held[len(output)] = _sums(right, logits.cpu())
            return torch.full_like(logits, -torch.inf).index_fill(0, right.tokens[:1].to(logits.device), 0.0)

        return force

    def answers(self) -> dict[int, list[Likeliest]]:
        """What was noted without a reference."""
        return {number: [row[place] for place in sorted(row)] for number, row in self.held.items()}

    def sums(self) -> list[RequestSums]:
        """What was noted with one, by request."""
        return [
            RequestSums(len(row), *(sum(each[field] for each in row.values()) for field in range(4)))
            for _, row in sorted(self.held.items())
        ]


def write_answers(path: Path, answers: Answers) -> None:
    """Keep `answers` for other processes."""
    columns = {
        f"{name} {number}": torch.stack([getattr(one, name) for one in row])
        for number, row in answers.items()
        for name in COLUMNS
    }
    save_file(columns, path)


def read_answers(path: Path) -> dict[int, list[Likeliest]]:
    """What `write_answers` wrote."""
    columns = load_file(path)
    numbers = sorted({int(name.split()[1]) for name in columns})
    return {
        number: [Likeliest(*one) for one in zip(*(columns[f"{name} {number}"] for name in COLUMNS), strict=True)]
        for number in numbers
    }


def _sums(right: Likeliest, logits: Tensor) -> tuple[float, int, float, float]:
    """KL, whether the likeliest token is the same, and both negative log-likelihoods of it."""
    token = int(right.tokens[0])
    held = torch.log_softmax(logits.double(), dim=-1)
    return right.kl(logits), int(int(held.argmax()) == token), -float(held[token]), -float(right.log_probabilities[0])
