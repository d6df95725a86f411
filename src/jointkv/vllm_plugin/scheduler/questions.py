"""What the workers were asked to compare, by step, and who waits for the answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from jointkv.vllm_plugin.messages import Inquiry, Pair, Verdict
from jointkv.vllm_plugin.metrics import Statistics
from jointkv.vllm_plugin.scheduler.bounds import Bounds


@dataclass(frozen=True)
class Answer:
    """What became of `n` pairs.

    Attributes:
        step: after which they were compared.
        allowed: within all thresholds, bool `[n]`.
        within: within the bounds on errors, whatever the cosines, bool `[n]`.
        block, token: relative error of the block, the larger one of K and V, and of its worst token, float32 `[n]`.
        ratio: error over bound, the larger one of block and token, float32 `[n]`; infinite where it cannot be told.
        cost: the least is the best of those that are allowed, float32 `[n]`.
    """

    step: int
    allowed: np.ndarray
    within: np.ndarray
    block: np.ndarray
    token: np.ndarray
    ratio: np.ndarray
    cost: np.ndarray

    def part(self, first: int, count: int) -> Answer:
        """That of `count` pairs from `first` on."""
        pairs = slice(first, first + count)
        measured = (self.allowed, self.within, self.block, self.token, self.ratio, self.cost)
        return Answer(self.step, *(array[pairs] for array in measured))


@dataclass(frozen=True)
class Question:
    """Pairs to compare.

    Attributes:
        pairs: blocks to compare.
        hear: gets their answer, unless there is none any more.
    """

    pairs: Sequence[Pair]
    hear: Callable[[Answer], None]


@dataclass(frozen=True)
class Signing:
    """Pages to sign.

    Attributes:
        pages: group and page of each.
        hear: gets their signatures, float32 `[n, size]`, unless there is no answer any more.
    """

    pages: Sequence[tuple[int, int]]
    hear: Callable[[np.ndarray], None]


@dataclass(frozen=True)
class Gathering:
    """Pages to compare all with all.

    Attributes:
        group: KV-cache group.
        hear: gets the cosines of K and of V, float32 `[2, n, n]`, unless there is no answer any more.
    """

    group: int
    pages: list[int]
    hear: Callable[[np.ndarray], None]


@dataclass(frozen=True)
class _Asked:
    """What was asked after a step, with the KV-cache groups of all pairs, `[n]`."""

    questions: Sequence[Question]
    groups: np.ndarray
    signing: Signing | None
    gatherings: Sequence[Gathering]
    cosines: int


class Questions:
    """Sends questions and hands out the answers, in order.

    Args:
        bounds: decide what is allowed.
        statistics: counts seconds.
        patience: steps that a verdict may take.
        size: numbers of a signature.
    """

    def __init__(self, bounds: Bounds, statistics: Statistics, patience: int, size: int = 0) -> None:
        self.bounds, self.statistics, self._patience, self._size = bounds, statistics, patience, size
        self.asked: dict[int, _Asked] = {}
        """By step, the oldest first."""

    def ask(
        self,
        inquiry: Inquiry,
        questions: Sequence[Question],
        signing: Signing | None = None,
        gatherings: Sequence[Gathering] = (),
    ) -> None:
        """Add to `inquiry` what the workers shall compare and sign after its step.

        Raises:
            RuntimeError: a verdict is lost.
        """
        self._expect_none_before(inquiry.step - self._patience)
        pairs = [pair for question in questions for pair in question.pairs]
        if pairs:
            columns = np.array(pairs, np.int64).T
            inquiry.group, inquiry.own, inquiry.other, inquiry.second, inquiry.offset, inquiry.shift = columns
        if signing is not None:
            inquiry.sign_group, inquiry.sign = np.array(signing.pages, np.int64).T
        inquiry.gathered = [(each.group, each.pages) for each in gatherings]
        if inquiry.asks:
            self.asked[inquiry.step] = _Asked(questions, inquiry.group, signing, gatherings, inquiry.gathered_cosines)

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
        asked = self.asked.pop(verdict.step)
        groups = asked.groups
        self._expect_none_before(verdict.step)
        signed = 0 if asked.signing is None else len(asked.signing.pages)
        verdict.check(len(groups), signed, self._size, asked.cosines)
        self.statistics.add("compare_seconds", verdict.seconds)
        self.statistics.add("sign_seconds", verdict.sign_seconds)
        self.statistics.add("apply_seconds", verdict.apply_seconds)
        answer = Answer(
            verdict.step,
            self.bounds.allowed(groups, verdict),
            self.bounds.within(groups, verdict),
            np.maximum(verdict.key_error, verdict.value_error),
            verdict.token_error,
            self.bounds.ratio(groups, verdict),
            self.bounds.cost(groups, verdict),
        )
        first = 0
        for question in asked.questions:
            question.hear(answer.part(first, len(question.pairs)))
            first += len(question.pairs)
        if asked.signing is not None:
            asked.signing.hear(verdict.signatures.astype(np.float32))
        first = 0
        for gathering in asked.gatherings:
            count = len(gathering.pages)
            gathering.hear(verdict.gathered[first : first + 2 * count**2].reshape(2, count, count))
            first += 2 * count**2

    def start_anew(self) -> None:
        """Forget what was asked; answers that still come are passed over."""
        self.asked = {}

    def _expect_none_before(self, step: int) -> None:
        """Verdicts come in the order of the inquiries. Raises RuntimeError when there is none on one before `step`."""
        oldest = next(iter(self.asked), step)
        if oldest < step:
            raise RuntimeError(f"the verdict of step {oldest} is lost")
