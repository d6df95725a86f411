"""What a task gives under a method."""

from __future__ import annotations

from pydantic import Field

from jointkv.evaluate.record import Record
from jointkv.evaluate.score.bootstrap import Interval


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
        difference: of the scores to the unfused model's, paired by request.
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
    difference: Interval | None = None
