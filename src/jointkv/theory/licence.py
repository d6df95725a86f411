"""The right to reuse pages that were never compared: earned by audits, kept by audits, lost by audits.

An audit computes a request that could have reused and compares; its share is that of its blocks beyond the bounds, and
it counts once, however many they are. As requests are audited by random choice, the mean of an audit's share, given all
that came before, is the mean of what a request that reuses instead would have got.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any, Literal, get_args

from jointkv.errors import BadInput, IntegrityError
from jointkv.theory.confidence import RiseDetector, UpperLimit, check_probability, least_audits

State = Literal["earning", "granted", "lost"]
Change = Literal["granted", "lost"]
Cause = Literal["limit", "rise"]

FIRST_ATTEMPT = 0.9
"""Of the chance to be wrong, what the first attempt may use up; all later ones share the rest."""


def error_chance(attempt: int, confidence: float) -> float:
    """Chance to be wrong that the attempt (1, 2, ..) may use up; over all attempts it adds up to `1 - confidence`.

    As `1 / (k (k - 1))` over k from 2 on adds up to 1. The first attempt gets nearly all, since a smaller chance costs
    audits: half of it would cost a quarter more of them at a confidence of 0.95.
    """
    share = FIRST_ATTEMPT if attempt == 1 else (1 - FIRST_ATTEMPT) / (attempt * (attempt - 1))
    return share * (1 - confidence)


class Licence:
    """Says whether runs may be reused, audit after audit.

    Granted while the upper confidence limit of that share is at most `miss_rate` on average over requests, and lost
    when it is above again; the limit may be read at any time, so neither needs a new start. But many good audits would
    hide for long that traffic has become bad: when a `RiseDetector` finds the share above `miss_rate`, the licence is
    lost, and what was seen so far counts no more. Then a new attempt begins, with a smaller chance to be wrong
    (`error_chance`), so that all attempts together are wrong at most as often as one. While there is no licence the
    detector does the same: an hour of bad traffic need not be outweighed before what follows it can earn.

    What is promised, whatever the traffic: with chance `confidence`, there is no moment at which the licence is
    granted although the average of the audits' means since the attempt began is `miss_rate` or more
    (`jointkv.theory.confidence.UpperLimit`). In particular traffic whose mean is never below `miss_rate` is ever
    granted one with chance at most `1 - confidence`. After a change for the worse some runs are reused before it is
    found: how many, simulation tells and no promise.

    Args:
        miss_rate, confidence: in (0, 1).

    Attributes:
        attempts: how many confidence sequences were begun.
        state: "lost" is earning again.
        cause: of the last loss: the limit came above `miss_rate`, or a rise was found. None before one.

    Raises:
        InvalidPolicy: a rate or confidence outside (0, 1).
    """

    def __init__(self, miss_rate: float = 0.02, confidence: float = 0.95) -> None:
        check_probability("reuse_miss_rate", miss_rate)
        check_probability("reuse_confidence", confidence)
        self.miss_rate, self.confidence = miss_rate, confidence
        self.state: State = "earning"
        self.cause: Cause | None = None
        self.attempts = 0
        self._begin()

    @classmethod
    def from_profile(cls, evidence: Mapping[str, Any], miss_rate: float = 0.02, confidence: float = 0.95) -> Licence:
        """A licence that audits of calibration grant from the first run on.

        If they do not suffice for this rate and confidence, it is earned from the start and they count for nothing:
        whether the traffic served is that of the profile is not known yet. If it is another, the first audits are what
        takes the licence away.

        Args:
            evidence: `UpperLimit.to_json` of any confidence.

        Raises:
            InvalidPolicy: a rate or confidence outside (0, 1).
            BadInput: evidence that is none.
        """
        licence = cls(miss_rate, confidence)
        sequence = UpperLimit.from_json(evidence).at(licence.sequence.confidence)
        if sequence.excludes(miss_rate):
            licence.sequence, licence.state = sequence, "granted"
        return licence

    def observe(self, share: float) -> Change | None:
        """Take the share of an audited run's blocks that are beyond the bounds.

        Returns:
            What became of the licence, if anything.

        Raises:
            BadInput: the share is not in [0, 1].
        """
        self.sequence.observe(share)
        had = self.granted
        if self.detector.observe(share):
            self._begin()
            return self._lose("rise") if had else None
        holds = self.sequence.excludes(self.miss_rate)
        if holds == had:
            return None
        if had:
            return self._lose("limit")
        self.state = "granted"
        return "granted"

    def _begin(self) -> None:
        self.attempts += 1
        self.sequence = UpperLimit(1 - error_chance(self.attempts, self.confidence))
        # A false alarm then takes at least as long on average as earning does, also right at the rate.
        threshold = max(1 / (1 - self.confidence), least_audits(self.miss_rate, self.confidence))
        self.detector = RiseDetector(self.miss_rate, threshold)

    def _lose(self, cause: Cause) -> Change:
        self.state, self.cause = "lost", cause
        return "lost"

    @property
    def granted(self) -> bool:
        """Whether runs may be reused."""
        return self.state == "granted"

    @property
    def limit(self) -> float:
        """Upper confidence limit of the share of blocks beyond the bounds, in this attempt; 1 where none is known."""
        return self.sequence.limit

    @property
    def mean(self) -> float:
        """Average share of blocks beyond the bounds in the audits of this attempt; 0 of none."""
        return self.sequence.mean

    @property
    def audits(self) -> int:
        """Audits of this attempt, those of a profile that granted it included."""
        return self.sequence.count

    def describe(self) -> str:
        """A line for the log."""
        said = {"earning": "not earned yet: ", "granted": "granted: ", "lost": "lost, the limit is too high: "}
        start = said[self.state]
        if self.state == "lost" and self.cause == "rise":
            start = "lost, the share of blocks beyond the bounds has risen; since then "
        seen = f"{self.mean:.2%} of blocks beyond the bounds in {self.audits} audits, at most {self.limit:.2%}"
        return f"licence {start}{seen}; allowed {self.miss_rate:.2%} (confidence {self.confidence:.0%})"

    def to_json(self) -> dict[str, Any]:
        """All of it, for `from_json`; its `evidence` is what `from_profile` takes."""
        return {
            "miss_rate": self.miss_rate,
            "confidence": self.confidence,
            "state": self.state,
            "cause": self.cause,
            "attempts": self.attempts,
            "evidence": self.sequence.to_json(),
            "detector": self.detector.to_json(),
        }

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> Licence:
        """The licence that `to_json` saved.

        Raises:
            BadInput: it is no such thing.
        """
        try:
            licence = cls(float(saved["miss_rate"]), float(saved["confidence"]))
            licence.state, licence.cause, licence.attempts = saved["state"], saved["cause"], int(saved["attempts"])
            licence.sequence = UpperLimit.from_json(saved["evidence"])
            licence.detector = RiseDetector.from_json(saved["detector"])
            licence.check_integrity()
        except (KeyError, TypeError, ValueError, IntegrityError) as error:
            raise BadInput(f"no saved licence: {error!r}") from error
        return licence

    def check_integrity(self) -> None:
        """Raises IntegrityError when state, cause, limit and detector contradict each other."""
        self.sequence.check_integrity()
        self.detector.check_integrity()
        if self.state not in get_args(State) or self.cause not in (None, *get_args(Cause)):
            raise IntegrityError(f"a licence that is {self.state!r} by {self.cause!r}")
        if self.granted != self.sequence.excludes(self.miss_rate) or (self.state == "lost" and self.cause is None):
            raise IntegrityError(f"a licence that is {self.state} at a limit of {self.limit}")
        if self.attempts < 1 or self.sequence.confidence != 1 - error_chance(self.attempts, self.confidence):
            raise IntegrityError(f"attempt {self.attempts} at a confidence of {self.sequence.confidence}")
        if self.detector.rate != self.miss_rate or self.detector.evidence >= self.detector.threshold:
            raise IntegrityError("the detector of a rise has given its alarm, or is set to another rate")


class FirstLicences:
    """Those that the audits of a profile grant to keys of which nothing is known, while the keys' own bear them out.

    A key with few requests has hardly an audit, and would keep to the end what a profile of other traffic has granted.
    So the audits of all keys that have a licence also count together, as those of one licence that the profile has
    granted: they are a sample of what is reused by any key. Where that one is lost, keys that come then earn theirs,
    and their audits count together with the others, until it is granted again.

    Args:
        evidence: by class of pages, what `Licence.from_profile` takes. Without it every key earns its own.
        miss_rate, confidence: in (0, 1).

    Attributes:
        together: that one, by class of pages.
    """

    def __init__(self, evidence: Mapping[Hashable, Mapping[str, Any]], miss_rate: float, confidence: float) -> None:
        self._evidence, self._terms = evidence, (miss_rate, confidence)
        self.together = {of: Licence.from_profile(one, *self._terms) for of, one in evidence.items()}

    def new(self, of: Hashable) -> Licence:
        """The first licence of a key for pages of the class `of`."""
        if of in self.together and self.together[of].granted:
            return Licence.from_profile(self._evidence[of], *self._terms)
        return Licence(*self._terms)

    def observe(self, of: Hashable, licence: Licence, share: float) -> Change | None:
        """Tell `licence`, a key's for pages of the class `of`, what an audit has found; see `Licence.observe`."""
        together = self.together.get(of)
        if together is not None:
            unknown = licence.state == "earning" and licence.attempts == 1
            if licence.granted or (unknown and not together.granted):
                together.observe(share)
        return licence.observe(share)

    def check_integrity(self) -> None:
        """Raises IntegrityError when one of those together is not what its audits allow."""
        for licence in self.together.values():
            licence.check_integrity()
