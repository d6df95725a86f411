"""What the workers were asked to compare, by step, and who waits for the answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from jointkv.vllm_plugin.messages import Inquiry, Verdict
from jointkv.vllm_plugin.metrics import Statistics
from jointkv.vllm_plugin.scheduler.bounds import Bounds


@dataclass(frozen=True)
class Answer:
    """What became of `n` pairs.

    Attributes:
        step: after which they were compared.
        allowed: within all thresholds, bool `[n]`.
        block, token: relative error of the block, the larger one of K and V, and of its worst token, float32 `[n]`.
        ratio: error over bound, the larger one of block and token, float32 `[n]`; infinite where it cannot be told.
    """

    step: int
    allowed: np.ndarray
    block: np.ndarray
    token: np.ndarray
    ratio: np.ndarray

    def part(self, first: int, count: int) -> Answer:
        """That of `count` pairs from `first` on."""
        pairs = slice(first, first + count)
        return Answer(self.step, self.allowed[pairs], self.block[pairs], self.token[pairs], self.ratio[pairs])


@dataclass(frozen=True)
class Question:
    """Pairs to compare.

    Attributes:
        pairs: group, page of the new block and resident page of each.
        hear: gets their answer, unless there is none any more.
    """

    pairs: Sequence[tuple[int, int, int]]
    hear: Callable[[Answer], None]


class Questions:
    """Sends questions and hands out the answers, in order.

    Args:
        bounds: decide what is allowed.
        statistics: counts seconds.
        patience: steps that a verdict may take.
    """

    def __init__(self, bounds: Bounds, statistics: Statistics, patience: int) -> None:
        self.bounds, self.statistics, self._patience = bounds, statistics, patience
        self.asked: dict[int, tuple[Sequence[Question], np.ndarray]] = {}
        """By step, the oldest first: the questions, and the KV-cache group of each of their pairs, `[n]`."""

    def ask(self, inquiry: Inquiry, questions: Sequence[Question]) -> None:
        """Add to `inquiry` what the workers shall compare after its step.

        Raises:
            RuntimeError: a verdict is lost.
        """
        self._expect_none_before(inquiry.step - self._patience)
        pairs = [pair for question in questions for pair in question.pairs]
        if pairs:
            inquiry.group, inquiry.own, inquiry.other = np.array(pairs, np.int64).T
            self.asked[inquiry.step] = questions, inquiry.group

    def settle(self, verdict: Verdict) -> None:
        """Hand out the answers in a verdict.

        One on what was never asked, or is no longer to be done, is passed over: it came twice, or fusion was off
        meanwhile.

        Raises:
            LayoutError, IntegrityError: see `Verdict.check`.
            RuntimeError: the verdict before this one was lost.
        """
        if verdict.step not in self.asked:
            return
        questions, groups = self.asked.pop(verdict.step)
        self._expect_none_before(verdict.step)
        verdict.check(len(groups))
        self.statistics.add("compare_seconds", verdict.seconds)
        self.statistics.add("apply_seconds", verdict.apply_seconds)
        answer = Answer(
            verdict.step,
            self.bounds.allowed(groups, verdict),
            np.maximum(verdict.key_error, verdict.value_error),
            verdict.token_error,
            self.bounds.ratio(groups, verdict),
        )
        first = 0
        for question in questions:
            question.hear(answer.part(first, len(question.pairs)))
            first += len(question.pairs)

    def start_anew(self) -> None:
        """Forget what was asked; answers that still come are passed over."""
        self.asked = {}

    def _expect_none_before(self, step: int) -> None:
        """Verdicts come in the order of the inquiries. Raises RuntimeError when there is none on one before `step`."""
        oldest = next(iter(self.asked), step)
        if oldest < step:
            raise RuntimeError(f"the verdict of step {oldest} is lost")
