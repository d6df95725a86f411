"""This project's own method: fusion in a `JointCache`."""

from __future__ import annotations

import copy
import dataclasses
import math

from jointkv.evaluate.holding.batch import Batch
from jointkv.evaluate.holding.held import HeldBatch
from jointkv.evaluate.methods.base import Method
from jointkv.policy import FusionPolicy, Scope
from jointkv.theory.calibrate import TOKEN_SLACK


class Fused(Method):
    """Joint encoding of the batch under a policy.

    Args:
        name: name in tables.
        policy: a policy to take as it is, at the one level that it states; None for the preset `safe` at error bounds
            given by the level.
        scope: of the presets at a level.
        follows_traffic: whether the scope may be that of the traffic; a profile keeps its own.
    """

    description = "joint encoding, preset `safe` at a bound on the relative error"
    levels: tuple[float, ...] = (0.05, 0.1, 0.2, 0.3, 0.5)
    level_means = "max_relative_error"
    allowed = "a finite number from 0"
    shares_across_requests = True
    frees_engine_memory = True

    def __init__(
        self,
        name: str = "fused",
        policy: FusionPolicy | None = None,
        scope: Scope = "batch",
        follows_traffic: bool = True,
    ) -> None:
        self.name, self._policy, self._scope, self._follows_traffic = name, policy, scope, follows_traffic
        if policy is not None:
            self.description = f"joint encoding under the policy {name!r}"
            self.level_means = "key_threshold" if policy.max_relative_error is None else "max_relative_error"
            number = policy.threshold(self.level_means, 0)
            self.levels = (0.0 if number is None or not policy.enabled else number,)
            self.allowed = f"that of the policy, {self.levels[0]:g}"

    def policy_at(self, level: float) -> FusionPolicy:
        """The policy that `level` stands for."""
        if self._policy is not None:
            return self._policy
        return FusionPolicy.preset(
            "safe", max_relative_error=level, max_token_error=TOKEN_SLACK * level, scope=self._scope
        )

    def in_scope(self, scope: Scope) -> Fused:
        if not self._follows_traffic:
            return self
        twin = copy.copy(self)
        twin._scope = scope
        if twin._policy is not None:
            twin._policy = dataclasses.replace(twin._policy, scope=scope)
        return twin

    def allows(self, level: float) -> bool:
        return 0 <= level < math.inf if self._policy is None else level == self.levels[0]

    def compress(self, batch: Batch, level: float) -> HeldBatch:
        from jointkv.evaluate.holding.fused import FusedBatch

        return FusedBatch(batch.model, batch.prefilled, self.policy_at(level))


class Paper(Fused):
    """Joint encoding as in arXiv 2601.03067: keys decide, mean directions, no error bound."""

    description = "joint encoding, preset `paper` at a threshold on the cosine of keys"
    levels = (0.9, 0.8, 0.7)
    level_means = "key_threshold"
    allowed = "-1 to 1"

    def __init__(self) -> None:
        super().__init__("paper")

    def allows(self, level: float) -> bool:
        return -1 <= level <= 1

    def policy_at(self, level: float) -> FusionPolicy:
        return FusionPolicy.preset("paper", key_threshold=level, scope=self._scope)
