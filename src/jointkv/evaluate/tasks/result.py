"""What a task gives under a method."""

from __future__ import annotations

from pydantic import Field

from jointkv.evaluate.holding.work import Work
from jointkv.evaluate.record import Record
from jointkv.evaluate.score.bootstrap import Interval, interval, paired_difference
from jointkv.evaluate.score.choices import flipped


class TaskRow(Record):
    """A task under a method at one level.

    Attributes:
        scores, answers: per example, in the order of `Task.examples`, so two rows pair up; answers are not written.
        mean: mean score.
        source: where the rows of the data set come from.
        stand_in: whether any of them stands for a data set that could not be reached.
        nbytes, unfused_nbytes: bytes of K and V of all prompts as held, and as they are; sums over batches.
        share, share_16bit: of these sums, see `ByteCount`.
        counted: where `nbytes` comes from, see `HeldBatch`.
        seconds: prefill, compression, decoding and scoring.
        work: what the prefills computed, of a method that does not compute everything.
        difference: of the scores to the unfused model's, paired by request.
        likelihoods: log-probability per token of each answer to choose from, per example; empty where there are none.
        margins: by how much the likeliest right answer is ahead of the likeliest wrong one, in nats, per example.
        margin_difference: to the unfused model's, paired by request.
        flipped_orders: share of examples whose answers stand in another order than the unfused model has them in.
        flipped_pairs: share of pairs of answers that do.
    """

    task: str
    metric: str
    method: str
    level: float
    scores: tuple[float, ...] = ()
    answers: tuple[str | int, ...] = Field((), exclude=True)
    mean: float
    source: str
    stand_in: bool
    nbytes: int
    unfused_nbytes: int
    share: float
    share_16bit: float
    counted: str
    batch_size: int
    seconds: float
    work: Work | None = Field(default=None, exclude_if=lambda work: work is None)
    difference: Interval | None = None
    likelihoods: tuple[tuple[float, ...], ...] = ()
    margins: tuple[float, ...] = ()
    margin_difference: Interval | None = None
    flipped_orders: Interval | None = None
    flipped_pairs: Interval | None = None

    def beside(self, unfused: TaskRow) -> TaskRow:
        """This row, compared with the `unfused` model's on the same examples."""
        found: dict[str, Interval] = {"difference": paired_difference(self.scores, unfused.scores)}
        if self.likelihoods:
            pairs = [flipped(one, other) for one, other in zip(self.likelihoods, unfused.likelihoods, strict=True)]
            found |= {
                "margin_difference": paired_difference(self.margins, unfused.margins),
                "flipped_orders": interval([float(share > 0) for share in pairs]),
                "flipped_pairs": interval(pairs),
            }
        return self.model_copy(update=found)
