"""Which measured pairs may be served: the thresholds of the settings, and what adaptation has left of the bounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from vllm.logger import init_logger

from jointkv.policy.rule import NOT_ASKED, PairStatistics, Rule
from jointkv.theory.adapt import Adaptation
from jointkv.theory.calibrate import TOKEN_SLACK
from jointkv.vllm_plugin.messages import Verdict
from jointkv.vllm_plugin.metrics import Statistics
from jointkv.vllm_plugin.settings import PluginSettings

logger = init_logger(f"vllm.{__name__}")


SIGNATURE_SLACK = 2.0
"""A signature's squared distance may exceed the true one by this factor and still be looked at: four standard
deviations at 32 numbers. A candidate missed costs a page, never correctness."""

SIGNATURE_ROUNDING = 1e-5
"""Of squared distances between numbers sent in half precision."""


class Bounds:
    """The one place where it is decided whether a block may be served by another's page.

    Args:
        settings: thresholds, and a profile whose bounds follow the live errors.
        groups: KV-cache groups that take part, by number; thresholds of several layer groups are in their order.
        statistics: counts moves.
        first: layer groups that are left out before the first one that takes part.

    Attributes:
        adaptation: None where bounds stay as they are.
    """

    def __init__(self, settings: PluginSettings, groups: Sequence[int], statistics: Statistics, first: int = 0) -> None:
        self.adaptation: Adaptation | None = None
        profile = settings.load_profile()
        if profile is not None and settings.adapts:
            self.adaptation = Adaptation(profile, settings.max_relative_error, settings.max_token_error)
        policy = settings.fusion_policy()
        self._keys_alone = policy.similarity == "key"
        self._place = {number: place for place, number in enumerate(groups, first)}
        self._rules = {place: policy.rule(place) for place in self._place.values()}
        self._statistics = statistics

    def allowed(self, groups: np.ndarray, verdict: Verdict) -> np.ndarray:
        """Which pairs, of the KV-cache groups `groups [n]`, are within all thresholds now: bool `[n]`."""
        return self._allowed(groups, verdict, True)

    def within(self, groups: np.ndarray, verdict: Verdict) -> np.ndarray:
        """Which pairs are within the bounds on errors now, whatever their cosines: bool `[n]`."""
        return self._allowed(groups, verdict, False)

    def _allowed(self, groups: np.ndarray, verdict: Verdict, with_cosines: bool) -> np.ndarray:
        allowed = np.zeros(len(groups), bool)
        for number in np.unique(groups):
            pairs = groups == number
            errors = verdict.key_error[pairs], verdict.value_error[pairs], verdict.token_error[pairs]
            cosines = (verdict.key_cosine[pairs], verdict.value_cosine[pairs]) if with_cosines else NOT_ASKED
            allowed[pairs] = self._rule(self._place[int(number)]).allows(errors, cosines)
        return allowed

    def leaders(self, group: int, cosines: np.ndarray) -> list[int]:
        """Of blocks of KV-cache group `group`, the first of the group that shares a direction with each.

        Args:
            cosines: of K and of V, float32 `[2, n, n]`; a block whose own is not a number is alone.
        """
        key, value = (torch.from_numpy(side.copy())[None] for side in cosines)
        valid = (key + value).diagonal(dim1=1, dim2=2).isfinite()
        pairs = PairStatistics(valid, key.nan_to_num(), None if self._keys_alone else value.nan_to_num())
        found: list[int] = self._rule(self._place[group]).group(pairs)[0].tolist()
        return found

    def ratio(self, groups: np.ndarray, verdict: Verdict) -> np.ndarray:
        """Error over bound of pairs of `groups [n]`, the larger one of block and token: float32 `[n]`.

        At most 1 is within the bounds; infinite where an error cannot be told or a bound is 0 and missed.
        """
        ratio = np.zeros(len(groups), np.float32)
        for number in np.unique(groups):
            pairs = groups == number
            errors = verdict.key_error[pairs], verdict.value_error[pairs], verdict.token_error[pairs]
            ratio[pairs] = self._rule(self._place[int(number)]).ratio(errors)
        return ratio

    def cost(self, groups: np.ndarray, verdict: Verdict) -> np.ndarray:
        """By which the best of the allowed pairs, of `groups [n]`, is chosen: float32 `[n]`, the least is best.

        The larger error of the block; where no error is bounded, what K lacks of a cosine of 1.
        """
        cost: np.ndarray = np.maximum(verdict.key_error, verdict.value_error)
        for number in np.unique(groups):
            if not self._rule(self._place[int(number)]).compares_errors:
                pairs = groups == number
                cost[pairs] = 1 - verdict.key_cosine[pairs]
        return cost

    def signature_limit(self, group: int) -> float:
        """The largest squared distance of signatures at which a pair of KV-cache group `group` is compared now."""
        rule = self._rule(self._place[group])
        return SIGNATURE_SLACK * (rule.key_limit if self._keys_alone else rule.signature_limit) + SIGNATURE_ROUNDING

    def served(self, group: int, block: float, token: float) -> None:
        """A block of a prompt is read from another's page with these relative errors."""
        self._observe(group, [max(block, token / TOKEN_SLACK)])

    def kept(self, group: int) -> None:
        """A block of a prompt keeps its own page."""
        self._observe(group, [])

    def check_integrity(self) -> None:
        """Raises IntegrityError when a bound left its range."""
        if self.adaptation is not None:
            self.adaptation.check_integrity()

    def _rule(self, place: int) -> Rule:
        if self.adaptation is None:
            return self._rules[place]
        block, token = self.adaptation.bounds(place)
        return replace(self._rules[place], max_relative_error=block, max_token_error=token)

    def _observe(self, group: int, errors: list[float]) -> None:
        if self.adaptation is None:
            return
        place = self._place[group]
        move = self.adaptation.observe(place, 1, errors)
        if move is not None:
            logger.info(self.adaptation.describe(place, move))
            self._statistics.add("bounds_tightened" if move.direction == "tighten" else "bounds_loosened")
