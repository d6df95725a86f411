"""Compute reuse of a pool: the user's options, the licence, and which slots of a prompt read which resident page."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Literal, get_args

from jointkv.errors import InvalidPolicy
from jointkv.hf.residents import Residents
from jointkv.policy import FusionPolicy
from jointkv.policy.profile import ReuseEvidence
from jointkv.policy.reuse import ReuseRule
from jointkv.theory.licence import Licence

COUNTERS = (
    *("prompt_tokens_skipped", "reuse_runs", "reuse_gaps", "reuse_audits", "reuse_audited_blocks"),
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
            shown that the share of blocks beyond the bounds is small.
        miss_rate: that share at the most, in (0, 1).
        confidence: with which the licence must show it, in (0, 1).
        audit_rate: share of the prompts that are computed and compared, chosen at random, in (0, 1].
        rule: what counts as evidence; None: as in the profile's audits, and without a profile the defaults.
        seed: of the choice; None for one that nobody can foresee.

    Raises:
        InvalidPolicy: a value outside its range.
    """

    mode: ReuseMode = "licensed"
    miss_rate: float = 0.02
    confidence: float = 0.95
    audit_rate: float = 0.02
    rule: ReuseRule | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.mode not in get_args(ReuseMode):
            raise InvalidPolicy(f"reuse: {self.mode!r} is none of {', '.join(get_args(ReuseMode))}")
        for name in ("miss_rate", "confidence", "audit_rate"):
            value = getattr(self, name)
            if not (0 < value < 1 or (name == "audit_rate" and value == 1)):
                raise InvalidPolicy(f"reuse_{name}: {value!r} is not between 0 and 1")

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


class Reuse:
    """What a pool knows for reuse.

    Args:
        audits: of a profile, which may grant the first licences; see `Licence.from_profile`.

    Attributes:
        residents: which pages hold which text, and their witnesses.
        licences: by isolation key.
        counters: those of `COUNTERS`.
        seconds_planning: time for finding, comparing and deciding.
    """

    def __init__(self, options: ReuseOptions, block_size: int, audits: ReuseEvidence | None = None) -> None:
        self.options, self._audits = options, audits
        self.rule = options.rule or (ReuseRule() if audits is None else audits.rule)
        self.residents = Residents(block_size)
        self.licences: dict[Hashable, Licence] = {}
        self.counters: Counter[str] = Counter()
        self.seconds_planning = 0.0
        self._random = random.Random(options.seed)
        self._bounds: tuple[object, object] | None = None

    def audits_next(self, tenant: Hashable) -> bool:
        """Whether the next prompt with something to reuse is to be computed and compared: chance, or no licence."""
        chosen = self._random.random() < self.options.audit_rate
        return chosen or (self.options.mode == "licensed" and not self.licence(tenant).granted)

    def licence(self, tenant: Hashable) -> Licence:
        """That of an isolation key."""
        licence = self.licences.pop(tenant, None) or self._first()
        self.licences[tenant] = licence
        if len(self.licences) > MOST_LICENCES:
            del self.licences[next(iter(self.licences))]
        return licence

    def _first(self) -> Licence:
        terms = self.options.miss_rate, self.options.confidence
        return Licence(*terms) if self._audits is None else Licence.from_profile(self._audits.evidence, *terms)

    def observe(self, tenant: Hashable, share: float) -> None:
        """Take into account that `share` of the blocks that an audited run would have reused is beyond the bounds."""
        licence = self.licence(tenant)
        before = licence.granted
        licence.observe(share)
        self.counters["licences_granted"] += licence.granted and not before
        self.counters["licences_lost"] += before and not licence.granted

    def forget_licences(self) -> None:
        """Begin anew, also where a profile has granted them: other weights move K and V by other amounts."""
        self.licences.clear()
        self._audits = None

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
            "licensed_keys": sum(licence.granted for licence in self.licences.values()),
            "reuse_plan_seconds": self.seconds_planning,
        }

    def check_integrity(self) -> None:
        """Raises IntegrityError when the residents or a licence are inconsistent."""
        self.residents.check_integrity()
        for licence in self.licences.values():
            licence.check_integrity()
