"""Who may reuse: one licence per class of run, kept honest by audits."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import NamedTuple

from vllm.logger import init_logger

from jointkv.theory.licence import Licence
from jointkv.vllm_plugin.metrics import Statistics

logger = init_logger(f"vllm.{__name__}")

MOST_CLASSES = 4096
"""Licences kept at the most; the one that was not used for the longest time is forgotten first."""


class RunClass(NamedTuple):
    """What runs must have in common for the audits of one to speak for another.

    Attributes:
        isolation: the isolation key: evidence does not cross tenants either.
        exact: whether all pages of the run were computed behind nothing that was reused or fused.
    """

    isolation: Hashable
    exact: bool


class Licences:
    """Licences by class.

    Args:
        new: makes the first one of a class.
        statistics: counts audits and moves.
    """

    def __init__(self, new: Callable[[], Licence], statistics: Statistics) -> None:
        self._new, self._statistics = new, statistics
        self._licences: dict[RunClass, Licence] = {}

    def granted(self, run_class: RunClass) -> bool:
        """Whether runs of that class may be reused now."""
        return self._of(run_class).granted

    def observe(self, run_class: RunClass, missed: int, audited: int) -> None:
        """An audit found `missed` of `audited` blocks beyond the bounds."""
        self._statistics.add("reuse_audits")
        self._statistics.add("reuse_audited_blocks", audited)
        self._statistics.add("reuse_missed_blocks", missed)
        licence = self._of(run_class)
        if licence.observe(missed / audited) is not None:
            self._statistics.add("licences_granted" if licence.granted else "licences_lost")
            logger.info("jointkv: %s", licence.describe())

    def all(self) -> list[Licence]:
        """Those of all classes."""
        return list(self._licences.values())

    def check_integrity(self) -> None:
        """Raises IntegrityError when a licence is not what its audits allow."""
        for licence in self._licences.values():
            licence.check_integrity()

    def _of(self, run_class: RunClass) -> Licence:
        licence = self._licences.pop(run_class, None) or self._new()
        self._licences[run_class] = licence
        if len(self._licences) > MOST_CLASSES:
            del self._licences[next(iter(self._licences))]
        return licence
