"""What scheduler and workers say to each other, once per engine step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata, KVConnectorWorkerMetadata

from jointkv.core.moved import Fills
from jointkv.core.reuse import Integers
from jointkv.errors import IntegrityError, LayoutError
from jointkv.store.names import Named
from jointkv.vllm_plugin.engine.runners.base import Remap

ERRORS = ("key_error", "value_error", "token_error")
COSINES = ("key_cosine", "value_cosine")


def patience(batches: int) -> int:
    """Steps that the verdict on one may take, of which `batches` are in flight at a time.

    It comes with that step or the next, and before so many later ones are scheduled; twice that is not to be seen.
    """
    return 2 * (batches + 1)


class Pair(NamedTuple):
    """A new block and a resident one, to be compared.

    Attributes:
        group: KV-cache group.
        own, other: their pages.
        second, offset, shift: where the resident text stands at another position: the page that holds the rest of it,
            its first token in `other`, and by how many tokens the new block stands later, see `core.moved.Fills`.
    """

    group: int
    own: int
    other: int
    second: int = 0
    offset: int = 0
    shift: int = 0


class PageFill(NamedTuple):
    """Pages to write from text at another position.

    Attributes:
        pages: to write, int64 `[n]`.
        fills: from what, `[n]`.
    """

    pages: Integers
    fills: Fills


class ReadInPlace(NamedTuple):
    """Slots of a request that hold no page, because their text is read where it is resident: at another position.

    Attributes:
        request_id: whose, from the step on in which it starts.
        fills: what each reads instead, `[n]`.
    """

    request_id: str
    fills: Fills


class DirectionWrite(NamedTuple):
    """A page to write with the direction that blocks share.

    Attributes:
        group: KV-cache group.
        page: to write; nobody reads it.
        members: pages of the blocks.
    """

    group: int
    page: int
    members: tuple[int, ...]


class Save(NamedTuple):
    """Pages to be stored as they are after the step.

    Attributes:
        pages: int64 `[n]`.
        named: under which address each, `n`.
        positions: of their first tokens, int64 `[n]`.
    """

    pages: Integers
    named: Sequence[Named]
    positions: Integers


class Load(NamedTuple):
    """Pages of a request to be filled from the store.

    Attributes:
        request_id: whose they are.
        pages: int64 `[n]`.
        addresses: of what each is to hold; where there are fewer, those of the last pages are unknown.
    """

    request_id: str
    pages: Integers
    addresses: Sequence[bytes]


@dataclass
class Inquiry(KVConnectorMetadata):
    """Scheduler to workers: table entries to replace before the step, pages to compare after it.

    Attributes:
        step: number of the scheduler step, counted from 1.
        remaps: already committed; every worker must apply them before it prepares the step.
        group, own, other, second, offset, shift: of the pairs to compare, int64 `[n]`; see `Pair`.
        sign_group, sign: per page whose signature is asked for the layer group and the page, int64 `[m]`.
        tables: block ids per request and fused group as the scheduler knows them, only while integrity is checked.
        fills: pages to write before the step, in this order: a later one may write what an earlier one reads.
        in_place: what requests that start in the step read at other positions, for as long as they hold their tables.
        directions: pages to write before the step, and before `fills`.
        gathered: groups and pages of blocks to compare all with all after the step.
        found: tokens that requests found in the prefix cache which start or come back and are told of more: what
            another connector or the store has is loaded to pages that hold what they never computed.
        loads: to begin after the step.
        save: what to store after it.
        emptied: whether the prefix cache was emptied before it, as is done when weights change.
    """

    step: int
    remaps: list[Remap] = field(default_factory=list)
    group: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    own: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    other: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    second: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    offset: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    shift: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    sign_group: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    sign: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    tables: dict[str, dict[int, list[int]]] | None = None
    fills: list[PageFill] = field(default_factory=list)
    in_place: list[ReadInPlace] = field(default_factory=list)
    directions: list[DirectionWrite] = field(default_factory=list)
    gathered: list[tuple[int, list[int]]] = field(default_factory=list)
    found: dict[str, int] = field(default_factory=dict)
    loads: list[Load] = field(default_factory=list)
    save: Save | None = None
    emptied: bool = False

    def __post_init__(self) -> None:
        for name in ("second", "offset", "shift"):  # unless something else is said, text stands where it is read
            if not len(getattr(self, name)):
                setattr(self, name, np.zeros(len(self.group), np.int64))

    @classmethod
    def among(cls, metadata: Any) -> Inquiry:
        """What the plugin's connector says in a step, of which `metadata` is that of one connector or of several."""
        found = cls._among(metadata)
        assert found is not None, "the step has no inquiry"
        return found

    @classmethod
    def _among(cls, metadata: Any) -> Inquiry | None:
        if isinstance(metadata, cls):
            return metadata
        return next(filter(None, map(cls._among, getattr(metadata, "metadata", ()))), None)

    @property
    def asks(self) -> bool:
        """Whether there is anything to answer."""
        return bool(len(self.group) or len(self.sign) or self.fills or self.directions or self.gathered)

    @property
    def gathered_cosines(self) -> int:
        """How many cosines the answer to `gathered` has."""
        return sum(2 * len(pages) ** 2 for _, pages in self.gathered)

    def moved(self, chosen: np.ndarray) -> Fills:
        """By what the resident blocks of the pairs `chosen [n]`, by number, would be written: they stand elsewhere."""
        columns = (self.own, self.other, self.second, self.offset, self.shift)
        return Fills(*(column[chosen] for column in columns))


@dataclass
class Verdict(KVConnectorWorkerMetadata):
    """Workers to scheduler: how alike the pages of an inquiry are. What follows from it, the scheduler decides.

    Attributes:
        step: of the inquiry.
        key_error, value_error, token_error: relative errors of the new block when it reads the resident page, float32
            `[n]`; NaN or infinite where they cannot be told.
        key_cosine, value_cosine: of the two pages, mean over layers, float32 `[n]`.
        signatures: of the pages that were asked for, float16 `[m, size]`; not finite where a page holds no numbers.
        gathered: cosines of the blocks to compare all with all, one matrix of K and one of V after another, float32;
            not a number where a page holds none.
        seconds: spent on comparing and signing.
        sign_seconds: those of them spent on signing.
        apply_seconds: spent on replacing table entries and writing pages of text that moved since the last verdict.
        in_place: whether requests may start that read text in place.
        fault: why the worker gave up, if it did; then there is no answer.
        broken: whether the fault is a broken invariant.
        ranks: workers whose answers are joined in this one.
    """

    step: int
    key_error: np.ndarray
    value_error: np.ndarray
    token_error: np.ndarray
    key_cosine: np.ndarray
    value_cosine: np.ndarray
    signatures: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.float16))
    gathered: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    seconds: float = 0.0
    sign_seconds: float = 0.0
    apply_seconds: float = 0.0
    in_place: bool = False
    fault: str | None = None
    broken: bool = False
    ranks: int = 1

    @classmethod
    def given_up(cls, step: int, fault: str, broken: bool = False) -> Verdict:
        """No answer, because of an internal error."""
        none = np.zeros(0, np.float32)
        return cls(step, none, none, none, none, none, fault=fault, broken=broken)

    @classmethod
    def failed(cls, step: int, error: Exception) -> Verdict:
        """No answer, because of `error`."""
        return cls.given_up(step, f"{type(error).__name__}: {error}", isinstance(error, IntegrityError))

    def check(self, pairs: int, signed: int = 0, size: int = 0, gathered: int = 0) -> None:
        """Whatever has happened to a verdict on its way, it is understood as it was meant or not at all.

        Args:
            size: numbers of a signature.
            gathered: cosines of blocks that are compared all with all.

        Raises:
            LayoutError: not one answer of the right kind to each of `pairs` pairs, and of `signed` pages.
            IntegrityError: an error is negative.
        """
        for name in (*ERRORS, *COSINES):
            _check_array(name, getattr(self, name), np.float32, (pairs,))
        _check_array("signatures", self.signatures, np.float16, (signed, size if signed else 0))
        _check_array("gathered", self.gathered, np.float32, (gathered,))
        for name in ERRORS:
            if (getattr(self, name) < 0).any():
                raise IntegrityError(f"a worker measures a {name} below zero")

    def aggregate(self, other: KVConnectorWorkerMetadata) -> Verdict:
        """Join the ranks of one step: errors, cosines and seconds are the worst rank's, signatures add up.

        With heads split over ranks, K and V within a bound on every rank are within it as a whole. An error here
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
        if (self.step, len(self.key_error)) != (other.step, len(other.key_error)):
            fault = f"ranks answer different inquiries (steps {self.step} and {other.step})"
            return Verdict.given_up(self.step, fault)
        for verdict in (self, other):
            signed, size = np.shape(self.signatures)
            verdict.check(len(self.key_error), signed, size, np.size(self.gathered))
        signatures = self.signatures.astype(np.float32) + other.signatures
        return Verdict(
            self.step,
            # What is not a number stays so, whichever rank it comes from.
            *(np.maximum(getattr(self, name), getattr(other, name)) for name in ERRORS),
            *(np.minimum(getattr(self, name), getattr(other, name)) for name in COSINES),
            signatures.astype(np.float16),
            np.minimum(self.gathered, other.gathered),
            max(self.seconds, other.seconds),
            max(self.sign_seconds, other.sign_seconds),
            max(self.apply_seconds, other.apply_seconds),
            self.in_place and other.in_place,
            ranks=self.ranks + other.ranks,
        )


def _check_array(name: str, found: object, dtype: type, shape: tuple[int, ...]) -> None:
    if not isinstance(found, np.ndarray) or found.dtype != dtype or found.shape != shape:
        told = (found.dtype, list(found.shape)) if isinstance(found, np.ndarray) else (type(found).__name__,)
        raise LayoutError(f"{name} is {' '.join(map(str, told))} instead of {np.dtype(dtype)} {list(shape)}")
