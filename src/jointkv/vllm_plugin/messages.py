"""What scheduler and workers say to each other, once per engine step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata, KVConnectorWorkerMetadata

from jointkv.errors import IntegrityError, LayoutError

KINDS = {"accepted": np.bool_, "key_error": np.float32, "value_error": np.float32, "token_error": np.float32}
"""What a verdict says of every pair."""


class Remap(NamedTuple):
    """From now on `request_id` reads `page` at `slot` of its table of `group`.

    `step` and `pair` say which answer of the workers this follows from: they may have to read it with factors.
    """

    request_id: str
    group: int
    slot: int
    page: int
    step: int = 0
    pair: int = 0


@dataclass
class Inquiry(KVConnectorMetadata):
    """Scheduler to workers: table entries to replace before the step, pages to compare after it.

    Attributes:
        step: number of the scheduler step, counted from 1.
        remaps: already committed; every worker must apply them before it prepares the step.
        group, own, other: per pair the layer group, the page of the new block and the resident page, int64 `[n]`.
        tables: block ids per request and group as the scheduler knows them, only while integrity is checked.
    """

    step: int
    remaps: list[Remap] = field(default_factory=list)
    group: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    own: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    other: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    tables: dict[str, tuple[list[int], ...]] | None = None


@dataclass
class Verdict(KVConnectorWorkerMetadata):
    """Workers to scheduler: which pairs of an inquiry are within the bounds.

    Attributes:
        step: of the inquiry.
        accepted: bool `[n]`.
        key_error, value_error, token_error: relative errors, float32 `[n]`.
        seconds: spent on comparing.
        apply_seconds: spent on replacing table entries since the last verdict.
        fault: why the worker gave up, if it did; then there is no answer.
        broken: whether the fault is a broken invariant.
        ranks: workers whose answers are joined in this one.
    """

    step: int
    accepted: np.ndarray
    key_error: np.ndarray
    value_error: np.ndarray
    token_error: np.ndarray
    seconds: float = 0.0
    apply_seconds: float = 0.0
    fault: str | None = None
    broken: bool = False
    ranks: int = 1

    @classmethod
    def given_up(cls, step: int, fault: str, broken: bool = False) -> Verdict:
        """No answer, because of an internal error."""
        none = np.zeros(0, np.float32)
        return cls(step, np.zeros(0, bool), none, none, none, fault=fault, broken=broken)

    @classmethod
    def failed(cls, step: int, error: Exception) -> Verdict:
        """No answer, because of `error`."""
        return cls.given_up(step, f"{type(error).__name__}: {error}", isinstance(error, IntegrityError))

    def check(self, pairs: int) -> None:
        """Whatever has happened to a verdict on its way, it is understood as it was meant or not at all.

        Raises:
            LayoutError: not one answer of the right kind to each of `pairs` pairs.
            IntegrityError: a pair is accepted with an error that is none.
        """
        for name, kind in KINDS.items():
            found = getattr(self, name)
            if not isinstance(found, np.ndarray) or found.dtype != kind or found.shape != (pairs,):
                shape = (found.dtype, list(found.shape)) if isinstance(found, np.ndarray) else (type(found).__name__,)
                raise LayoutError(f"{name} is {' '.join(map(str, shape))} instead of {np.dtype(kind)} [{pairs}]")
        blocks = np.concatenate((self.key_error[self.accepted], self.value_error[self.accepted]))
        if not ((blocks >= 0) & (blocks < np.inf)).all() or not (self.token_error[self.accepted] >= 0).all():
            raise IntegrityError("a worker accepts a pair whose error is negative, infinite or not a number")

    def aggregate(self, other: KVConnectorWorkerMetadata) -> Verdict:
        """Join the ranks of one step: accepted is what every rank accepts; errors and seconds are the worst rank's.

        With heads split over ranks, K and V within the bound on every rank are within it as a whole. An error here
        would end the engine, so it becomes the fault of the verdict.
        """
        try:
            return self._joined(other)
        except Exception as error:
            return Verdict.failed(self.step, error)

    def _joined(self, other: KVConnectorWorkerMetadata) -> Verdict:
        assert isinstance(other, Verdict)
        fault = self.fault or other.fault
        if fault is not None:
            return Verdict.given_up(self.step, fault, self.broken or other.broken)
        if (self.step, len(self.accepted)) != (other.step, len(other.accepted)):
            fault = f"ranks answer different inquiries (steps {self.step} and {other.step})"
            return Verdict.given_up(self.step, fault)
        for verdict in (self, other):
            verdict.check(len(self.accepted))
        return Verdict(
            self.step,
            self.accepted & other.accepted,
            np.maximum(self.key_error, other.key_error),
            np.maximum(self.value_error, other.value_error),
            np.maximum(self.token_error, other.token_error),
            max(self.seconds, other.seconds),
            max(self.apply_seconds, other.apply_seconds),
            ranks=self.ranks + other.ranks,
        )
