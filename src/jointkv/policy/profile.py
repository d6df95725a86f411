"""The saved outcome of calibration: thresholds for one model on one kind of traffic, and what they are worth."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from jointkv.core.blocks import LayerAggregate
from jointkv.errors import BadInput
from jointkv.policy.base import FusionPolicy, Scope
from jointkv.policy.identity import ModelIdentity
from jointkv.policy.reuse import ReuseRule
from jointkv.system.files import replace_text

FORMAT: Literal["jointkv.profile/1"] = "jointkv.profile/1"

TargetKind = Literal["kl", "ratio", "relative_error"]

RANGES: dict[str, tuple[float, float]] = {"kl": (0.0, 10.0), "ratio": (1.0, 1000.0), "relative_error": (0.0, 1.0)}
"""Allowed targets, the lower end excluded."""


class _Record(BaseModel):
    # JSON has no infinity: what could be written and not be read again is refused when it is made.
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Target(_Record):
    """What a profile is to reach: KL at most, ratio at least, or a relative error of no served block above `value`."""

    kind: TargetKind
    value: float

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `kind=value`. Raises `BadInput` for an unknown kind or a value outside its range."""
        kind, separator, number = text.partition("=")
        if not separator or kind not in RANGES:
            raise BadInput(f"target {text!r}: expected kl=NUMBER, ratio=NUMBER or relative_error=NUMBER")
        low, high = RANGES[kind]
        try:
            value = float(number)
        except ValueError:
            raise BadInput(f"target {text!r}: {number!r} is not a number") from None
        if not low < value <= high:
            raise BadInput(f"target {text!r}: {kind} must be above {low:g} and at most {high:g}")
        return cls(kind=kind, value=value)  # type: ignore[arg-type]


class Prediction(_Record):
    """A predicted ratio of pages before to pages after, with its 95% interval, for a batch of `requests`."""

    ratio: float
    low: float
    high: float
    requests: int


class Measurement(_Record):
    """What was measured on `requests` requests: pages at the allocator, and fidelity against the model unfused.

    KL in nats, mean over scored tokens; `kl_upper`: what the mean of as many further requests should stay below, see
    `jointkv.theory.calibrate.upper_mean`.
    """

    requests: int
    ratio: float
    kl: float
    kl_upper: float
    kl_worst_request: float
    top1: float
    nll: float
    nll_unfused: float


class GroupThresholds(_Record):
    """Bounds of one layer group, and what serving should show under them on this traffic.

    Attributes:
        max_relative_error, max_token_error: as in `FusionPolicy`.
        acceptance: share of the blocks that were served by another's page.
        distortion: mean squared relative error over all blocks, 0 for those not served by another's page.
    """

    max_relative_error: float = Field(ge=0)
    max_token_error: float = Field(ge=0)
    acceptance: float = Field(ge=0, le=1)
    distortion: float = Field(ge=0)


class ReuseEvidence(_Record):
    """What audits said of reuse under the chosen bounds, of requests that these were not chosen on.

    Attributes:
        audits: requests that could have reused, and were computed and compared.
        blocks, missed_blocks: that they would have reused, and those of them beyond the bounds.
        skipped: share of the tokens of all these requests that would not have been computed.
        limit: upper confidence limit of the share of a request's blocks beyond the bounds, mean over audits.
        evidence: the audits, as `jointkv.theory.confidence.UpperLimit.to_json` says them.
        near, echoes: as in `ReuseRule`, chosen where the thresholds were.
        moved: the same of blocks whose text stands at another position; None where nobody looked for any.
    """

    audits: int = Field(ge=0)
    blocks: int = Field(ge=0)
    missed_blocks: int = Field(ge=0)
    skipped: float = Field(ge=0, le=1)
    limit: float = Field(ge=0, le=1)
    evidence: dict[str, Any]
    near: float = Field(default=ReuseRule.near, ge=0, le=1)
    echoes: bool = ReuseRule.echoes
    moved: ReuseEvidence | None = Field(default=None, exclude_if=lambda audits: audits is None)

    @property
    def rule(self) -> ReuseRule:
        """What counts as evidence, as it did in the audits."""
        return ReuseRule(near=self.near, echoes=self.echoes)


class FrontierPoint(_Record):
    """One of the settings that were considered; `measured` on the calibration half, where it was."""

    max_relative_error: tuple[float, ...]
    predicted: Prediction
    measured: Measurement | None = None


class DataIdentity(_Record):
    """What was calibrated on."""

    source: str
    sha256: str
    requests: int
    tokens: int
    scored_tokens: int
    seed: int


class Profile(_Record):
    """See the module. Thresholds are those of `groups`, one per layer group.

    Attributes:
        predicted: for a batch like the held-out half, before it was looked at.
        predicted_equal_text: the same when only blocks of equal text are compared, as a serving engine does.
        calibrated, held_out: measured on the half that the thresholds were chosen on, and on the other.
        met: whether the held-out half meets the target.
        reuse: what audits said of reuse; None where these bounds allow none.
    """

    format: Literal["jointkv.profile/1"] = FORMAT
    model: ModelIdentity
    block_size: int = Field(ge=1)
    scope: Scope
    chunk_tokens: int = Field(ge=1)
    across_layers: LayerAggregate
    groups: tuple[GroupThresholds, ...] = Field(min_length=1)
    target: Target
    met: bool
    predicted: Prediction
    predicted_equal_text: Prediction
    calibrated: Measurement
    held_out: Measurement
    frontier: tuple[FrontierPoint, ...]
    data: DataIdentity
    versions: dict[str, str]
    reuse: ReuseEvidence | None = None

    @property
    def layer_groups(self) -> int:
        """How many layer groups decide alone."""
        return len(self.groups)

    def options(self) -> dict[str, object]:
        """The fields of `FusionPolicy` that this profile sets."""
        return {
            "max_relative_error": tuple(group.max_relative_error for group in self.groups),
            "max_token_error": tuple(group.max_token_error for group in self.groups),
            "across_layers": self.across_layers,
            "scope": self.scope,
            "chunk_tokens": self.chunk_tokens,
            "layer_groups": self.layer_groups,
        }

    def policy(self) -> FusionPolicy:
        """The policy to fuse with."""
        return FusionPolicy.preset("safe", **self.options())

    def check(self, model: ModelIdentity, block_size: int) -> None:
        """Raises ModelMismatch for another model, and BadInput for blocks of another size."""
        self.model.check(model, "the profile")
        if block_size != self.block_size:
            raise BadInput(
                f"the profile was made with blocks of {self.block_size} tokens, these have {block_size}; "
                f"run jointkv calibrate with --block-size {block_size}"
            )

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Read what `save` wrote. Raises `BadInput` for anything else."""
        try:
            text = Path(path).expanduser().read_bytes()
        except (OSError, ValueError, RuntimeError) as error:  # no such file, no path at all, no such user
            reason = getattr(error, "strerror", None) or error
            raise BadInput(f"cannot read profile {path}: {reason}") from None
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            problem = error.errors()[0]
            where = ".".join(str(part) for part in problem["loc"]) or "file"
            raise BadInput(f"{path} is no profile of jointkv ({FORMAT}): {where}: {problem['msg']}") from None

    def save(self, path: Path | str) -> None:
        """Write the profile in one step: either all of it is there or what was before. Raises `BadInput`."""
        replace_text(path, self.to_json())

    def to_json(self) -> str:
        """The profile as `load` reads it."""
        return self.model_dump_json(indent=2) + "\n"
