"""What the comparisons of an exactly computed request say of reuse."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from jointkv.core.evidence import Known
from jointkv.core.reuse import Integers
from jointkv.vllm_plugin.messages import Pair
from jointkv.vllm_plugin.scheduler.licences import PageClass


class AuditedText(Protocol):
    """What an audit asks of where its pages were found, see `ResidentText`."""

    def can_be_written(self, pages: Integers) -> NDArray[np.bool_]: ...

    def known(self, slots: Integers, pages: Integers) -> Known: ...

    def pair(self, group: int, own: int, page: int) -> Pair: ...

    def source(self, page: int) -> int: ...

    def testify(self, slots: Integers, pages: Integers, ratios: NDArray[np.floating]) -> None: ...


@dataclass(frozen=True)
class Compared:
    """A resident page, held against the exactly computed block that it would have served.

    Attributes:
        page_class: of the page.
        ratio: error over bound.
        witnesses, worst, new: what was known of the page before, see `core.evidence`.
        offers: by which it is seen whether the page holds that still, see `Residents.unchanged`.
    """

    slot: int
    page: int
    source: int
    page_class: PageClass
    ratio: float
    witnesses: int
    worst: float
    new: bool
    offers: int

    @property
    def moved(self) -> bool:
        """Whether the text stands at another position there: what was compared was never written to a page."""
        return self.page_class.moved


@dataclass
class Audit:
    """The comparisons of one request, computed exactly from the first token on.

    Attributes:
        pages: by slot, those that could have served; where none are named, whatever is compared counts.
        text: where these pages were found.
        chosen: by the draw, after a licence; its blocks keep their pages until the prompt is computed, so that all of
            it is exact.
        by_entries: whether its entry blocks would have been compared, see `Worth`.
        licensed: by class, whether it had a licence when the first page of it was compared; see `policy.reuse.audited`.
        compared: what has come back.
        outstanding: pairs whose answers are still to come.
    """

    pages: dict[int, list[int]] = field(default_factory=dict)
    text: AuditedText | None = None
    chosen: bool = False
    by_entries: bool = True
    licensed: dict[PageClass, bool] = field(default_factory=dict)
    compared: list[Compared] = field(default_factory=list)
    outstanding: int = 0
