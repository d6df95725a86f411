"""Compute reuse of a pool: the user's options, the licence, and which slots of a prompt read which resident page."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from jointkv.attention.rotary import Rotary
from jointkv.core.moved_text import MovedText, unwritten
from jointkv.core.reuse import Integers
from jointkv.errors import InvalidPolicy
from jointkv.hf.residents import Residents
from jointkv.policy import FusionPolicy
from jointkv.policy.profile import ReuseEvidence
from jointkv.policy.reuse import ReuseRule
from jointkv.system.recent import Recent
from jointkv.system.values import check_whole, is_number
from jointkv.theory.licence import FirstLicences, Licence

COUNTERS = (
    *(
        "prompt_tokens_skipped",
        "moved_tokens_skipped",
        "reuse_runs",
        "reuse_gaps",
        "reuse_audits",
        "reuse_audited_blocks",
    ),
    *("reuse_missed_blocks", "licences_granted", "licences_lost"),
)

MOST_LICENCES = 4096
"""Isolation keys may be as many as users; the licence that was not asked for the longest is forgotten first."""

ReuseMode = Literal["off", "licensed", "probed"]


@dataclass(frozen=True)
class ReuseOptions:
    """What may be read before it is computed.

    Attributes:
        mode: `"off"`; `"probed"`: where entry block and witnesses allow it; `"licensed"`: where, besides, audits have
            shown that of a prompt's blocks on average few enough are beyond the bounds.
        miss_rate: that share at the most, in (0, 1).
        confidence: with which the licence must show it, in (0, 1).
        audit_rate: share of the prompts that are computed and compared, chosen at random, in (0, 1].
        rule: what counts as evidence; None: as in the profile's audits, and without a profile the defaults.
        seed: of the choice; None for one that nobody can foresee.
        moved: whether text is also read that is resident at another position, its keys turned; under a licence of its
            own.

    Raises:
        InvalidPolicy: a value outside its range.
    """

    mode: ReuseMode = "licensed"
    miss_rate: float = 0.02
    confidence: float = 0.95
    audit_rate: float = 0.02
    rule: ReuseRule | None = None
    seed: int | None = None
    moved: bool = False

    def __post_init__(self) -> None:
        if self.mode not in get_args(ReuseMode):
            raise InvalidPolicy(f"reuse: {self.mode!r} is none of {', '.join(get_args(ReuseMode))}")
        for name in ("miss_rate", "confidence", "audit_rate"):
            value = getattr(self, name)
            if not is_number(value) or not (0 < value < 1 or (name == "audit_rate" and value == 1)):
                raise InvalidPolicy(f"reuse_{name}: {value!r} is not between 0 and 1")
        if self.rule is not None and not isinstance(self.rule, ReuseRule):
            raise InvalidPolicy(f"reuse_rule: {self.rule!r} is no ReuseRule")
        if self.seed is not None:
            check_whole("reuse_seed", self.seed, 0, InvalidPolicy)
        if not isinstance(self.moved, bool):
            raise InvalidPolicy(f"moved: {self.moved!r} is neither true nor false")

    @classmethod
    def of(cls, given: ReuseOptions | str) -> ReuseOptions:
        """`given`, or the defaults of the mode of that name."""
        return given if isinstance(given, ReuseOptions) else cls(mode=given)  # type: ignore[arg-type]

    def check(self, policy: FusionPolicy) -> None:
        """Raises InvalidPolicy where `policy` does not say how far from its own K and V a block may be read."""
        rule = policy.rule(0) if policy.enabled else None
        if rule is None or rule.max_relative_error is None or rule.shares_directions or rule.compares_cosines:
            raise InvalidPolicy("reuse: needs a policy with error bounds alone, such as safe")
        if policy.scope == "chunk":
            raise InvalidPolicy("reuse: works between requests, and scope='chunk' compares none")
        if policy.layer_groups != 1:
            raise InvalidPolicy("reuse: needs layer_groups=1, because a token is skipped in all layers")


class TextClass(NamedTuple):
    """What blocks must have in common for the audits of some to speak for others.

    Attributes:
        tenant: isolation key.
        moved: whether they are resident at another position.
    """

    tenant: Hashable
    moved: bool = False


class Reuse:
    """What a pool knows for reuse.

    Args:
        audits: of a profile, which may grant the first licences; see `FirstLicences`.

    Attributes:
        rotary: how each layer turns its keys, where text that has moved is read.
        residents: which pages hold which text, and their witnesses.
        licences: by class of text.
        counters: those of `COUNTERS`.
        seconds_planning: time for finding, comparing and deciding.
    """

    def __init__(
        self,
        options: ReuseOptions,
        block_size: int,
        audits: ReuseEvidence | None = None,
        rotary: Sequence[Rotary] | None = None,
    ) -> None:
        self.options, self.rotary = options, rotary
        evidence: dict[Hashable, Mapping[str, Any]] = {} if audits is None else {False: audits.evidence}
        if audits is not None and audits.moved is not None:
            evidence[True] = audits.moved.evidence
        self._first = self._first_by(evidence)
        self.rule = options.rule or (ReuseRule() if audits is None else audits.rule)
        self.residents = Residents(block_size, moved=rotary is not None)
        self.licences = Recent[TextClass, Licence](lambda text: self._first.new(text.moved), MOST_LICENCES)
        self.counters: Counter[str] = Counter()
        self.seconds_planning = 0.0
        self._random = random.Random(options.seed)
        self._bounds: tuple[object, object] | None = None

    def moved_text(self, tenant: Hashable, tokens: Integers, start: int, end: int) -> MovedText | None:
        """What of the blocks `start` to `end` of a prompt is resident elsewhere; None where nobody asked for it."""
        if self.rotary is None:
            return None
        runs = self.residents.find_moved(tenant, tokens, self.rule.least)
        return MovedText.of([run for run in runs if run.shift], start, end, self.residents.block_size)

    def draws_audit(self) -> bool:
        """Whether chance has it that the next prompt with anything to reuse is computed and compared."""
        return self._random.random() < self.options.audit_rate

    def permitted(self, tenant: Hashable, pages: Integers) -> NDArray[np.bool_]:
        """Which of `pages [n]` a licence allows to read, bool `[n]`."""
        if self.options.mode == "probed":
            return np.ones(len(pages), bool)
        moved = unwritten(pages)
        still, elsewhere = (bool(self._granted(TextClass(tenant, value), moved == value)) for value in (False, True))
        return np.where(moved, elsewhere, still)

    def _granted(self, text: TextClass, those: NDArray[np.bool_]) -> bool:
        return bool(those.any()) and self.licence(*text).granted

    def licence(self, tenant: Hashable, moved: bool = False) -> Licence:
        """That of a class of text."""
        return self.licences[TextClass(tenant, moved)]

    def _first_by(self, evidence: Mapping[Hashable, Mapping[str, Any]]) -> FirstLicences:
        return FirstLicences(evidence, self.options.miss_rate, self.options.confidence)

    def observe(self, tenant: Hashable, share: float, moved: bool = False) -> None:
        """Take into account that `share` of the blocks that an audited run would have reused is beyond the bounds."""
        licence = self.licence(tenant, moved)
        before = licence.granted
        self._first.observe(moved, licence, share)
        self.counters["licences_granted"] += licence.granted and not before
        self.counters["licences_lost"] += before and not licence.granted

    def forget_licences(self) -> None:
        """Begin anew, also where a profile has granted them: other weights move K and V by other amounts."""
        self.licences.clear()
        self._first = self._first_by({})

    def under(self, policy: FusionPolicy) -> None:
        """Ratios are those of the bounds of `policy` from now on; witnesses under other bounds are forgotten."""
        bounds = policy.max_relative_error, policy.max_token_error
        if bounds != self._bounds:
            self.residents.forget_witnesses()
            self._bounds = bounds

    def stats(self) -> dict[str, float | str]:
        """Counters, seconds and the licences of all isolation keys."""
        return {
            "reuse": self.options.mode,
            **{name: self.counters[name] for name in COUNTERS},
            "licensed_keys": sum(licence.granted for text, licence in self.licences.items() if not text.moved),
            "licensed_keys_moved": sum(licence.granted for text, licence in self.licences.items() if text.moved),
            "reuse_plan_seconds": self.seconds_planning,
        }

    def check_integrity(self) -> None:
        """Raises IntegrityError when the residents or a licence are inconsistent."""
        self.residents.check_integrity()
        self._first.check_integrity()
        for licence in self.licences.values():
            licence.check_integrity()
