"""Who may reuse: one licence per class of pages, kept honest by audits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from typing import Any, NamedTuple

import numpy as np
from vllm.logger import init_logger

from jointkv.policy.profile import ReuseEvidence
from jointkv.system.recent import Recent
from jointkv.theory.licence import FirstLicences, Licence
from jointkv.vllm_plugin.metrics import LicenceGauges, Statistics
from jointkv.vllm_plugin.settings import PluginSettings

logger = init_logger(f"vllm.{__name__}")

MOST_CLASSES = 4096
"""Licences kept at the most; the one that was not used for the longest time is forgotten first."""

BOUNDS = "max_relative_error", "max_token_error"

SHOWN_KEYS = 8
"""Isolation keys whose licences have gauges of their own, by numbers: keys are secrets, and there may be thousands."""


class PageClass(NamedTuple):
    """What pages must have in common for the audits of some to speak for others.

    Attributes:
        isolation: the isolation key: evidence does not cross tenants either.
        exact: whether they were computed behind nothing that was reused or fused, and stand where they are read.
        moved: whether they hold text that stands at another position where it is read.
    """

    isolation: Hashable
    exact: bool
    moved: bool = False

    @property
    def words(self) -> str:
        """What may be said of the class: nothing of its key."""
        return "moved" if self.moved else "exact" if self.exact else "approximate"


def first_licences(settings: PluginSettings, audits: ReuseEvidence | None) -> FirstLicences:
    """Makes the first licence of a class, by its words: from the profile's `audits`, if there are any for it.

    They were made of pages whose contexts were computed, under the profile's bounds: where they are read, and, if the
    profile was asked for that, at other positions.
    """
    held = {name: one for name, one in _held(settings, audits) if one is not None}
    evidence: dict[Hashable, dict[str, Any]] = {name: one.evidence for name, one in held.items()}
    first = FirstLicences(evidence, settings.reuse_miss_rate, settings.reuse_confidence)
    for name, one in held.items():
        said = first.together[name].describe()
        logger.info("jointkv: by %d audits of the profile, the first %s (%s pages)", one.audits, said, name)
    return first


def _held(settings: PluginSettings, audits: ReuseEvidence | None) -> list[tuple[str, ReuseEvidence | None]]:
    """By class in words, what the profile holds for it."""
    if audits is None:
        return []
    return [("exact", audits), ("moved", audits.moved if settings.moved else None)]


def audits_of_profile(settings: PluginSettings) -> ReuseEvidence | None:
    """What reuse may go by; None, and a line in the log, where a profile has nothing that it may."""
    profile = None if settings.reuse == "off" else settings.load_profile()
    if profile is None:
        return None
    calibrated, lacks = profile.options(), None
    if profile.reuse is None:
        lacks = "has no audits of reuse, which jointkv calibrate makes"
    elif any(np.any(calibrated[name] != np.array(getattr(settings, name))) for name in BOUNDS):
        lacks = "has audits of reuse, but of other bounds"
    if lacks is not None:
        logger.warning("jointkv: the profile %s; the defaults count, and a licence is earned", lacks)
        return None
    return profile.reuse


class Licences:
    """Licences by class.

    Args:
        first: makes the first one of a class.
        statistics: counts audits and moves.
        needed: whether pages may be read only where they are granted.
    """

    def __init__(self, first: FirstLicences, statistics: Statistics, needed: bool = True) -> None:
        self._first, self._statistics, self._needed = first, statistics, needed
        self._licences = Recent[PageClass, Licence](self._new, MOST_CLASSES, self._forget)
        self._numbers: dict[Hashable, int] = {}
        self._changed = True

    def granted(self, page_class: PageClass) -> bool:
        """Whether pages of that class may be read now."""
        return not self._needed or self._licences[page_class].granted

    def observe(self, page_class: PageClass, missed: int, audited: int) -> None:
        """An audit found `missed` of `audited` blocks beyond the bounds."""
        self._statistics.add("reuse_audits")
        self._statistics.add("reuse_audited_blocks", audited)
        self._statistics.add("reuse_missed_blocks", missed)
        licence = self._licences[page_class]
        self._changed = True
        if self._first.observe(page_class.words, licence, missed / audited) is not None:
            self._statistics.add("licences_granted" if licence.granted else "licences_lost")
            logger.info("jointkv: pages of class %s: %s", self._label(page_class) or "unnumbered", licence.describe())

    def gauges(self, allowed: float) -> LicenceGauges:
        """What is shown of them; `allowed` is the share that may be beyond the bounds."""
        shown = ((self._label(page_class), licence) for page_class, licence in self._licences.items())
        return {
            "allowed": allowed,
            "states": dict(Counter(licence.state for licence in self._licences.values())),
            "classes": {label: (licence.state, licence.limit) for label, licence in shown if label is not None},
        }

    def news(self, allowed: float) -> LicenceGauges | None:
        """`gauges`, if any licence has changed since this was asked last."""
        changed, self._changed = self._changed, False
        return self.gauges(allowed) if changed else None

    def check_integrity(self) -> None:
        """Raises IntegrityError when a licence is not what its audits allow."""
        self._first.check_integrity()
        for licence in self._licences.values():
            licence.check_integrity()

    def _new(self, page_class: PageClass) -> Licence:
        self._changed = True
        self._number(page_class.isolation)
        return self._first.new(page_class.words)

    def _forget(self, page_class: PageClass) -> None:
        key = page_class.isolation
        if not any(page_class.isolation == key for page_class in self._licences):
            self._numbers.pop(key, None)

    def _number(self, isolation: Hashable) -> None:
        free = set(range(1, SHOWN_KEYS + 1)) - set(self._numbers.values())
        if free and isolation not in self._numbers:
            self._numbers[isolation] = min(free)

    def _label(self, page_class: PageClass) -> str | None:
        number = self._numbers.get(page_class.isolation)
        return None if number is None else f"{page_class.words} {number}"
