"""What is calibrated, and the policy that one setting of its bounds stands for."""

from __future__ import annotations

from dataclasses import dataclass

from jointkv.policy import FusionPolicy, LayerAggregate, Scope
from jointkv.policy.profile import Target
from jointkv.theory.calibrate import TOKEN_SLACK, Setting


@dataclass(frozen=True)
class CalibrationSettings:
    """What is calibrated.

    Attributes:
        token_limit: no single token of a served block may be off by more, whatever the target. One changed word is off
            by 0.48 or more in V, where equal text in another context stays below 0.2: above this limit a mean KL can be
            small while single answers are another request's.
        moved: whether reuse of text at other positions is audited as well.
        seed: splits the requests into halves.
    """

    target: Target
    scope: Scope = "batch"
    chunk_tokens: int = 512
    layer_groups: int = 1
    block_size: int = 16
    across_layers: LayerAggregate = "rms"
    token_limit: float = 0.45
    moved: bool = False
    seed: int = 0

    def token_bound(self, bound: float) -> float:
        """The bound on tokens that goes with the `bound` on blocks."""
        return min(TOKEN_SLACK * bound, self.token_limit)

    def policy(self, setting: Setting) -> FusionPolicy:
        """The policy that a setting stands for. Raises `InvalidPolicy`."""
        return FusionPolicy.preset(
            "safe",
            max_relative_error=setting,
            max_token_error=tuple(self.token_bound(bound) for bound in setting),
            across_layers=self.across_layers,
            scope=self.scope,
            chunk_tokens=self.chunk_tokens,
            layer_groups=self.layer_groups,
        )
