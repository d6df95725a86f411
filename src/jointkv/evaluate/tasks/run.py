"""Run a task under a method: hold a batch, decode greedily or choose, score."""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import fmean

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from jointkv.errors import BadInput
from jointkv.evaluate.holding import held as holding
from jointkv.evaluate.holding.batch import Batch, context_of
from jointkv.evaluate.holding.held import ByteCount, Counted, HeldBatch
from jointkv.evaluate.methods.base import Method
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
    counts: list[ByteCount] = []
    for first in range(0, count, batch_size):
        part = examples[first : first + batch_size]
        given, counted, bytes_held = _answer_batch(part, method, level, model, tokenizer, block_size)
        answers += given
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
    )


def _answer_batch(
    examples: Sequence[Example],
    method: Method,
    level: float,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
) -> tuple[list[str | int], Counted, ByteCount]:
    """Answers, and how many bytes were held; a function, so that nothing is held any more when the next batch is."""
    batch = Batch(model, [example.request for example in examples], block_size)
    held = method.hold(batch, level)
    batch.release()  # what is held need not stand beside the prefill that it was made from
    return answer(held, examples, tokenizer, end_tokens(model, tokenizer)), held.counted, ByteCount.of(held, batch)


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids that end an answer: those of the model's generation config and the tokenizer's."""
    return holding.end_tokens(model) | ({tokenizer.eos_token_id} - {None})


@torch.inference_mode()
def answer(
    held: HeldBatch, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, ends: frozenset[int]
) -> list[str | int]:
    """What the model answers after the held prompts: text, or the index of the choice with the largest logit.

    Decoding is greedy, for the whole batch at once, until every row has ended: by one of `ends`, at a stop text (which
    is cut off), or at its `max_new_tokens`. A row that has ended is fed on with its last token.
    """
    fed = torch.tensor([[example.request.prompt[-1]] for example in examples])
    logits = held.feed(fed)[:, -1]
    rows = [_Written(example, tokenizer, ends) for example in examples]
    chosen = [
        int(row[list(example.choices)].argmax())
        for row, example in zip(logits, examples, strict=True)
        if example.choices
    ]
    if len(chosen) == len(examples):
        return list(chosen)
    if chosen:
        raise BadInput("a batch must hold either choices or written answers, not both")
    while True:
        next_tokens = logits.argmax(-1).tolist()
        for row, token in zip(rows, next_tokens, strict=True):
            row.add(token)
        if all(row.ended for row in rows):
            return [row.text for row in rows]
        logits = held.feed(torch.tensor([[row.tokens[-1]] for row in rows]))[:, -1]


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
