"""Compute reuse: the text of a prompt that is resident is read instead of being computed, by evidence."""

from __future__ import annotations

import math

from jointkv.evaluate.holding.batch import Batch
from jointkv.evaluate.holding.held import HeldBatch
from jointkv.evaluate.methods.base import Method
from jointkv.policy import FusionPolicy
from jointkv.policy.profile import Profile
from jointkv.policy.reuse import ReuseRule
from jointkv.theory.calibrate import TOKEN_SLACK

SEED = 0
"""Of the choice of audits, so that a run can be repeated."""


class Reuse(Method):
    """Requests are prefilled one after another and reuse those before them, where entry blocks and witnesses allow it.

    Without a licence, which takes more audits than a batch has requests.

    Args:
        profile: with audits of reuse, whose bounds and rule count, and which says whether text at other positions is
            read; None for the preset `safe` at a bound given by the level.
    """

    name = "reuse"
    description = "prompts read resident pages before they are computed, under the preset `safe`, without a licence"
    levels: tuple[float, ...] = (0.1, 0.2, 0.3)
    level_means = "max_relative_error"
    allowed = "a finite number from 0"
    shares_across_requests = True
    frees_engine_memory = True
    moved = False

    def __init__(self, profile: Profile | None = None) -> None:
        self._policy: FusionPolicy | None = None
        self._rule: ReuseRule | None = None
        if profile is not None and profile.reuse is not None:
            self._policy, self._rule = profile.policy(), profile.reuse.rule
            self.name, self.moved = "profile_reuse", profile.reuse.moved is not None
            self.frees_engine_memory = not self.moved
            self.description = "prompts read resident pages before they are computed, by the rule of a profile"
            self.levels = (profile.groups[0].max_relative_error,)
            self.allowed = f"that of the profile, {self.levels[0]:g}"

    def allows(self, level: float) -> bool:
        return 0 <= level < math.inf if self._policy is None else level == self.levels[0]

    def compress(self, batch: Batch, level: float) -> HeldBatch:
        from jointkv.evaluate.holding.reused import ReusedBatch, work_of
        from jointkv.hf.reuse import ReuseOptions

        at_level = {"max_relative_error": level, "max_token_error": TOKEN_SLACK * level}
        policy = self._policy or FusionPolicy.preset("safe", **at_level)
        options = ReuseOptions("probed", seed=SEED, moved=self.moved, rule=self._rule)
        held = ReusedBatch(batch.model, batch.requests, policy, options, batch.block_size)
        held.work = work_of(batch, held)
        return held


class ReuseMoved(Reuse):
    """Text that is resident at another position as well: its pages are copied, their keys turned."""

    name = "reuse_moved"
    description = "the same, and also from pages at other positions, their keys turned"
    frees_engine_memory = False
    moved = True
