"""Run a task under a method: hold a batch, decode greedily or choose, score."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from statistics import fmean

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from jointkv.errors import BadInput
from jointkv.evaluate.holding import held as holding
from jointkv.evaluate.holding.batch import Batch, context_of
from jointkv.evaluate.holding.held import ByteCount, HeldBatch
from jointkv.evaluate.holding.work import Work
from jointkv.evaluate.methods.base import Method
from jointkv.evaluate.score.choices import margin
from jointkv.evaluate.tasks.base import Example, Task
from jointkv.evaluate.tasks.result import TaskRow


def run_task(
    task: Task,
    method: Method,
    level: float,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    batch_size: int,
    *,
    seed: int = 0,
    block_size: int = 16,
    max_tokens: int | None = None,
) -> TaskRow:
    """Score `count` examples of `task` in batches of `batch_size` requests that `method` may let share memory.

    `max_tokens` is the room for a prompt and its answer; the model's context if that is smaller or none is given.
    Raises `BadInput` when the data, or the batch size, does not do.
    """
    if batch_size < 1:
        raise BadInput(f"batch_size must be at least 1, got {batch_size}")
    rooms = [room for room in (max_tokens, context_of(model)) if room is not None]
    examples = task.examples(tokenizer, count, seed, max_tokens=min(rooms, default=None))
    start = time.perf_counter()
    answers: list[str | int] = []
    likelihoods: list[tuple[float, ...]] = []
    counts: list[ByteCount] = []
    works: list[Work] = []
    for first in range(0, count, batch_size):
        part = examples[first : first + batch_size]
        held, bytes_held = _hold(part, method, level, model, block_size)
        chosen = choice_likelihoods(held, part) if _all_or_none(bool(example.choices) for example in part) else []
        likelihoods += chosen
        if _all_or_none(example.max_new_tokens > 0 for example in part):
            answers += answer(held, part, tokenizer, end_tokens(model, tokenizer))
        else:
            answers += map(_best, chosen)
        counted = held.counted
        works += [] if held.work is None else [held.work]
        del held  # it need not stand beside the next batch
        counts.append(bytes_held)
    total = sum(counts[1:], counts[0])
    scores = tuple(task.score(given, example) for given, example in zip(answers, examples, strict=True))
    return TaskRow(
        task=task.name,
        metric=task.metric,
        method=method.name,
        level=level,
        scores=scores,
        answers=tuple(answers),
        likelihoods=tuple(likelihoods),
        margins=tuple(
            margin(each, [index for index in range(len(each)) if task.score(index, example)])
            for each, example in zip(likelihoods, examples, strict=False)
        ),
        mean=fmean(scores),
        source="; ".join(dict.fromkeys(example.loaded_from.source for example in examples)),
        stand_in=any(example.loaded_from.stand_in for example in examples),
        nbytes=total.nbytes,
        unfused_nbytes=total.unfused_nbytes,
        share=total.share,
        share_16bit=total.share_16bit,
        counted=counted,
        batch_size=batch_size,
        seconds=time.perf_counter() - start,
        work=sum(works[1:], works[0]) if works else None,
    )


def _hold(
    examples: Sequence[Example], method: Method, level: float, model: PreTrainedModel, block_size: int
) -> tuple[HeldBatch, ByteCount]:
    """What `method` holds of a batch, and how many bytes that is."""
    batch = Batch(model, [example.request for example in examples], block_size)
    held = method.hold(batch, level)
    batch.release()  # what is held need not stand beside the prefill that it was made from
    return held, ByteCount.of(held, batch)


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids that end an answer: those of the model's generation config and the tokenizer's."""
    return holding.end_tokens(model) | ({tokenizer.eos_token_id} - {None})


@torch.inference_mode()
def answer(
    held: HeldBatch, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, ends: frozenset[int]
) -> list[str]:
    """What the model writes after the held prompts.

    Decoding is greedy, for the whole batch at once, until every row has ended: by one of `ends`, at a stop text (which
    is cut off), or at its `max_new_tokens`. A row that has ended is fed on with its last token.
    """
    logits = _next_logits(held, examples)
    rows = [_Written(example, tokenizer, ends) for example in examples]
    while True:
        next_tokens = logits.argmax(-1).tolist()
        for row, token in zip(rows, next_tokens, strict=True):
            row.add(token)
        if all(row.ended for row in rows):
            return [row.text for row in rows]
        logits = held.feed(torch.tensor([[row.tokens[-1]] for row in rows]))[:, -1]


@torch.inference_mode()
def choice_likelihoods(held: HeldBatch, examples: Sequence[Example]) -> list[tuple[float, ...]]:
    """Of each example, which must have some, the log-probability of every choice after the held prompt.

    In nats per token, so that a long answer is not the less likely one by its length. `held` stays as it is.
    """
    held = held.fork()
    first = _next_logits(held, examples).float().log_softmax(-1)
    found = [row[[tokens[0] for tokens in each.choices]].tolist() for row, each in zip(first, examples, strict=True)]
    for place in range(max(len(example.choices) for example in examples)):
        column = [example.choices[place] if place < len(example.choices) else (0,) for example in examples]
        width = max(map(len, column)) - 1
        if not width:
            continue
        # Padding on the right is read by nothing that is scored.
        fed = torch.tensor([[*tokens[:-1], *(0,) * (width + 1 - len(tokens))] for tokens in column])
        rest = held.fork().feed(fed).float().log_softmax(-1)
        for row, tokens in enumerate(column):
            if len(tokens) > 1:
                sums = rest[row, range(len(tokens) - 1), tokens[1:]].sum().item()
                found[row][place] = (found[row][place] + sums) / len(tokens)
    return [tuple(row) for row in found]


def _all_or_none(flags: Iterable[bool]) -> bool:
    """Whether all are set. Raises `BadInput` when some are."""
    kinds = set(flags)
    if len(kinds) > 1:
        raise BadInput("of the examples of a batch all must have choices or none, and all be written or none")
    return kinds == {True}


def _next_logits(held: HeldBatch, examples: Sequence[Example]) -> Tensor:
    """Of the token behind each prompt, `[examples, vocabulary]`."""
    return held.feed(torch.tensor([[example.request.prompt[-1]] for example in examples]))[:, -1]


def _best(likelihoods: Sequence[float]) -> int:
    return max(range(len(likelihoods)), key=likelihoods.__getitem__)


class _Written:
    """The answer of one row while it is being written."""

    def __init__(self, example: Example, tokenizer: PreTrainedTokenizerBase, ends: frozenset[int]) -> None:
        self.tokens: list[int] = []
        self.text = ""
        self.ended = False
        self._example, self._tokenizer, self._ends = example, tokenizer, ends

    def add(self, token: int) -> None:
        """Append `token` unless the answer has ended."""
        if self.ended:
            return
        self.tokens.append(token)
        text = self._tokenizer.decode(self.tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        found = [text.find(stop) for stop in self._example.stop if stop in text]
        self.text = text[: min(found)] if found else text
        self.ended = bool(found) or token in self._ends or len(self.tokens) >= self._example.max_new_tokens
