"""What the paper's experiments run on: settings, requests of equal length from its data sets, what comes after them."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from jointkv.errors import BadInput
from jointkv.evaluate.datasets import get_dataset
from jointkv.evaluate.holding.batch import context_of
from jointkv.evaluate.holding.fused import FusedBatch
from jointkv.evaluate.holding.held import true_logits
from jointkv.evaluate.holding.prefilled import Prefilled, join, prefill
from jointkv.evaluate.progress import Report
from jointkv.evaluate.score.fidelity import score
from jointkv.evaluate.score.summary import Fidelity, summarize
from jointkv.evaluate.traffic.base import Request, Tokenizer, begins_with_bos, encode
from jointkv.policy import FusionPolicy
from jointkv.theory.rarefaction import LEAST_REQUESTS

Written = TypeVar("Written")

MOST_ROWS = 2000
PREFILL_AT_ONCE = 16
FEWEST_BLOCKS = 2
"""Blocks that a prompt must have at the least, where a data set is too small for longer ones."""

QUESTION_TOKENS = 32
"""Last tokens of a long prompt, with its question: fed after the fused chunks, never fused."""


@dataclass(frozen=True)
class PaperSettings:
    """Sizes and thresholds of the three experiments.

    Attributes:
        datasets: of the batches.
        thresholds: cosines of keys at which the paper's policy fuses a batch.
        largest: largest batch; the others are the powers of two below.
        prompt_tokens: tokens of K and V per request, cut to whole blocks; see `sample`.
        answer_tokens: true tokens scored after each prompt, and tokens written greedily.
        tasks: LongBench's names of the data sets of the chunk scope.
        documents: documents of each.
        chunks, chunk_tokens: length of a document.
        chunk_thresholds: as `thresholds`, for the chunk scope.
        document_answer_tokens: longest answer to a document's question.
        layers_dataset, layers_requests: batch whose layers are compared with predictions from as many other requests.
    """

    datasets: tuple[str, ...] = (
        "GSM8K",
        "HelpSteer",
        "Synthetic Therapy Conversations",
        "MMLU conceptual_physics",
    )
    thresholds: tuple[float, ...] = (0.75, 0.9)
    largest: int = 128
    prompt_tokens: int = 256
    answer_tokens: int = 8
    tasks: tuple[str, ...] = ("qmsum", "lcc", "repobench-p")
    documents: int = 2
    chunks: int = 8
    chunk_tokens: int = 512
    chunk_thresholds: tuple[float, ...] = (0.62, 0.7, 0.8)
    document_answer_tokens: int = 32
    layers_dataset: str = "GSM8K"
    layers_requests: int = 32
    block_size: int = 16
    seed: int = 0

    @property
    def sizes(self) -> tuple[int, ...]:
        """Batch sizes 2, 4, ... up to `largest`."""
        return tuple(2**power for power in range(1, self.largest.bit_length()))

    def check(self, model: PreTrainedModel) -> None:
        """Raises `BadInput` where a size makes no sense or does not fit into the model's context."""
        least = {"largest": 2, "answer_tokens": 1, "documents": 1, "chunks": 2, "document_answer_tokens": 1}
        least |= {"prompt_tokens": FEWEST_BLOCKS * self.block_size, "layers_requests": LEAST_REQUESTS}
        for name, minimum in least.items():
            if getattr(self, name) < minimum:
                raise BadInput(f"{name}: {getattr(self, name)} is less than {minimum}")
        if self.chunk_tokens < 1 or self.chunk_tokens % self.block_size:
            raise BadInput(f"chunk_tokens: {self.chunk_tokens} is no multiple of the block size {self.block_size}")
        context = context_of(model)
        document = self.chunks * self.chunk_tokens + QUESTION_TOKENS
        answers = max(self.answer_tokens, self.document_answer_tokens)
        needed = max(self.prompt_tokens + 1 + self.answer_tokens, document + answers)
        if context is not None and needed > context:
            raise BadInput(f"{needed} tokens of prompt and answer; the model reads {context}")


@dataclass(frozen=True)
class Sample:
    """Requests from a data set, all of one length, and where its rows really come from."""

    dataset: str
    source: str
    stand_in: bool
    requests: Sequence[Request]

    @property
    def origin(self) -> dict[str, Any]:
        """The fields of a row that say where its data comes from."""
        return {"dataset": self.dataset, "source": self.source, "stand_in": self.stand_in}


def sample(name: str, tokenizer: Tokenizer, count: int, settings: PaperSettings) -> Sample:
    """`count` requests from the data set `name`, of `prompt_tokens` tokens of K and V each.

    Rows of these data sets are short: a request is a run of whole rows with their answers and ends, where it is long
    enough by then, with a question whose answer follows. The front of what is too long is cut off. No row is in
    two requests. A data set with too few rows for `count` such requests gives shorter ones, by whole blocks.

    Raises:
        BadInput: it cannot be had, or is too small even for `FEWEST_BLOCKS` blocks per request.
    """
    loaded = get_dataset(name).load(MOST_ROWS)
    rows = random.Random(settings.seed).sample(loaded.rows, len(loaded.rows))
    texts = [(row.text, row.answers[0] if row.answers else "") for row in rows]
    made: list[Request] = []
    for blocks in range(settings.prompt_tokens // settings.block_size, FEWEST_BLOCKS - 1, -1):
        made = _runs(texts, tokenizer, count, blocks * settings.block_size + 1, settings.answer_tokens)
        if len(made) == count:
            return Sample(loaded.name, loaded.source, loaded.stand_in, made)
    raise BadInput(
        f"data set {loaded.name!r} ({loaded.source}) gives {len(made)} requests of "
        f"{FEWEST_BLOCKS * settings.block_size} tokens; {count} are needed"
    )


def _runs(
    texts: Sequence[tuple[str, str]], tokenizer: Tokenizer, count: int, length: int, following: int
) -> list[Request]:
    """At most `count` requests of `length` tokens, the last of which is fed after the prefill."""
    begin = int(begins_with_bos(tokenizer))
    made: list[Request] = []
    run = ""
    for text, answer in texts:
        asked = f"{run}\n\n{text}" if run else text
        run = asked if not answer else f"{asked}{'' if asked[-1].isspace() else ' '}{answer}"
        whole = encode(tokenizer, run)
        split = min(max(len(encode(tokenizer, asked)), length), len(whole) - following)
        if split < length:
            continue
        prompt = whole[:begin] + whole[split - length + begin : split]
        made.append(Request(prompt, whole[split : split + following], tokenizer.decode(list(prompt))))
        run = ""
        if len(made) == count:
            break
    return made


@dataclass
class Setup:
    """The model and the settings; keeps the last prefilled sample, because two experiments share one.

    Attributes:
        report: gets one line before each step.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    settings: PaperSettings
    report: Report = field(default=lambda line: None)
    _last: tuple[Sample, Prefilled] | None = None

    def prefilled(self, drawn: Sample) -> Prefilled:
        """The prefill of all requests of `drawn`; nobody may change it."""
        self.report(f"{drawn.dataset}: prefill of {len(drawn.requests)} requests")
        if self._last is None or self._last[0] is not drawn:
            self._last = None
            self._last = (drawn, self.prefill(drawn.requests, PREFILL_AT_ONCE))
        return self._last[1]

    def prefill(self, requests: Sequence[Request], at_once: int) -> Prefilled:
        """Prefill `requests`, `at_once` in one forward pass."""
        parts = [requests[start : start + at_once] for start in range(0, len(requests), at_once)]
        return join([prefill(self.model, part, block_size=self.settings.block_size) for part in parts])

    def held(self, batch: Prefilled, policy: FusionPolicy) -> FusedBatch:
        """`batch` fused once, at the step from prefill to decode as in the paper; what is fed later is not fused."""
        held = FusedBatch(self.model, batch, policy)
        held.cache.batch.fusable = torch.zeros_like(held.cache.batch.fusable)
        return held

    def outcome(
        self, batch: Prefilled, policy: FusionPolicy, write: Callable[[FusedBatch], Written]
    ) -> tuple[FusedBatch, Tensor, Written]:
        """`batch` under `policy`, its logits over the true continuations, and what `write` makes of a fork of it."""
        held = self.held(batch, policy)
        written = write(held.fork())
        logits = true_logits(held, batch.requests)
        held.cache.check_integrity()
        return held, logits, written


def compared(
    held: FusedBatch, logits: Tensor, unfused: Tensor, requests: Sequence[Request]
) -> tuple[dict[str, Any], Fidelity]:
    """The fields of `FusedRow` that are measured, and the fidelity that they come from."""
    fidelity = summarize(score(logits, unfused, [request.continuation for request in requests]))
    fields = {"ratio": held.ratio, "ratio_fused_layers": held.ratio_fused_layers, "nll_unfused": fidelity.nll_reference}
    return fields | {name: getattr(fidelity, name) for name in ("kl", "top1", "nll")}, fidelity


def policies(thresholds: Sequence[float], **scope: object) -> list[tuple[str, float | None, FusionPolicy]]:
    """Name, threshold and policy: the paper's at each of `thresholds`, then `safe`. Raises `InvalidPolicy`."""
    paper = [("paper", each, FusionPolicy.preset("paper", key_threshold=each, **scope)) for each in thresholds]
    return [*paper, ("safe", None, FusionPolicy.preset("safe", **scope))]


def label(policy: str, threshold: float | None) -> str:
    """A policy and its threshold, for messages."""
    return policy if threshold is None else f"{policy} {threshold:g}"
