"""What may be fused, how alike it must be, and what then stands in its place."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from reprlib import repr as shown
from typing import Any, Literal, get_args

from jointkv.errors import InvalidPolicy

SimilarityRule = Literal["key", "key_value"]
RepresentativeKind = Literal["resident", "direction"]
Scope = Literal["batch", "chunk", "both"]
LayerAggregate = Literal["rms", "max"]
CandidateSource = Literal["signature", "tokens", "either"]
Threshold = float | tuple[float, ...] | None

PER_LAYER = "per_layer"
THRESHOLDS = ("key_threshold", "value_threshold", "max_relative_error", "max_token_error")
MOST = 2**31 - 1
"""Of anything counted: what is larger is a mistake, and no tensor could hold it."""


@dataclass(frozen=True)
class FusionPolicy:
    """How blocks are compared and served. Immutable; validated on construction.

    Thresholds are one number, or one per layer group. `None` switches that test off.

    Attributes:
        enabled: False leaves the cache exactly as the unfused one.
        similarity: `"key"`: keys decide and values follow (the paper). `"key_value"`: both must agree.
        key_threshold: least cosine of two K blocks, in [-1, 1] (mean over the layers of a group).
        value_threshold: least cosine of two V blocks; only with `similarity="key_value"`.
        max_relative_error: bound on `|x - x_hat| / |x|` of every member, for K and for V.
        max_token_error: bound on the same ratio of every single token of a member. A block of 16 tokens in which one
            differs can be within 0.15 as a whole while that token's V is off by half: the bound that keeps one
            changed word or digit from being read as another.
        across_layers: how the errors of a group's layers become one number: root mean square, or worst layer.
        representative: `"resident"`: an existing page as it stands. `"direction"`: the normalised mean of the
            unit vectors of all matched blocks, each member keeping its own norms (paper, Algorithm 1). A block that
            misses the error bound keeps its page, but has had its share in the mean.
        scope: `"batch"` compares requests at equal positions, `"chunk"` the chunks of one request.
        chunk_tokens: length of a chunk in tokens, for the chunk scope.
        layer_groups: number of groups of consecutive layers that share one decision and one block table, or
            `"per_layer"`.
        skip_first_layers, skip_last_layers: layers left out of fusion; they must fill whole groups.
        candidates: how resident blocks are proposed for verification: random-projection signatures, equal token
            ids, or either.
        max_candidates: resident blocks verified per new block at the most.
    """

    enabled: bool = True
    similarity: SimilarityRule = "key_value"
    key_threshold: Threshold = None
    value_threshold: Threshold = None
    max_relative_error: Threshold = 0.2
    max_token_error: Threshold = 0.3
    across_layers: LayerAggregate = "rms"
    representative: RepresentativeKind = "resident"
    scope: Scope = "batch"
    chunk_tokens: int = 512
    layer_groups: int | Literal["per_layer"] = 1
    skip_first_layers: int = 0
    skip_last_layers: int = 0
    candidates: CandidateSource = "signature"
    max_candidates: int = 4

    def __post_init__(self) -> None:
        if not isinstance(self.enabled, bool):
            raise InvalidPolicy(f"enabled: {shown(self.enabled)} is neither true nor false")
        self._check_choices()
        for name in THRESHOLDS:
            self._check_threshold(name)
        self._check_counts()
        self._check_combination()

    def _check_choices(self) -> None:
        choices = {
            "similarity": SimilarityRule,
            "representative": RepresentativeKind,
            "scope": Scope,
            "across_layers": LayerAggregate,
            "candidates": CandidateSource,
        }
        for name, kind in choices.items():
            allowed = get_args(kind)
            if getattr(self, name) not in allowed:
                raise InvalidPolicy(f"{name}: {shown(getattr(self, name))} is none of {', '.join(allowed)}")

    def _check_threshold(self, name: str) -> None:
        value = getattr(self, name)
        if value is None:
            return
        if isinstance(value, list):
            value = tuple(value)
            object.__setattr__(self, name, value)
        numbers = value if isinstance(value, tuple) else (value,)
        if not numbers:
            raise InvalidPolicy(f"{name}: an empty list of thresholds")
        low, high = (0.0, math.inf) if name.endswith("_error") else (-1.0, 1.0)
        for number in numbers:
            if not _is_number(number) or not low <= number <= high:
                raise InvalidPolicy(f"{name}: {shown(number)} is not a number from {low:g} to {high:g}")
        groups = self.layer_groups
        if isinstance(value, tuple) and isinstance(groups, int) and len(value) != groups:
            raise InvalidPolicy(f"{name}: {len(value)} thresholds for {groups} layer groups")

    def _check_counts(self) -> None:
        least = {"chunk_tokens": 1, "skip_first_layers": 0, "skip_last_layers": 0, "max_candidates": 1}
        for name, minimum in least.items():
            value = getattr(self, name)
            if not _is_count(value, minimum):
                raise InvalidPolicy(f"{name}: {shown(value)} is no whole number from {minimum} to {MOST}")
        groups = self.layer_groups
        if groups != PER_LAYER and not _is_count(groups, 1):
            raise InvalidPolicy(f"layer_groups: {shown(groups)} is neither a whole number of 1 or more nor 'per_layer'")

    def _check_combination(self) -> None:
        if not self.enabled:
            return
        if self.value_threshold is not None and self.similarity == "key":
            raise InvalidPolicy("value_threshold: has no effect with similarity='key'; use 'key_value'")
        if (
            self.similarity == "key_value"
            and self.key_threshold is not None
            and (self.value_threshold, self.max_relative_error, self.max_token_error) == (None, None, None)
        ):
            raise InvalidPolicy(
                "value_threshold: nothing tests the values; give it, an error bound, or similarity='key'"
            )
        if self.key_threshold is None and self.max_relative_error is None:
            raise InvalidPolicy("key_threshold: give it or max_relative_error, else every pair would match")
        if self.representative == "direction" and self.key_threshold is None:
            raise InvalidPolicy("key_threshold: representative='direction' groups by cosine and needs it")
        if self.similarity == "key_value" and self.representative == "direction" and self.value_threshold is None:
            raise InvalidPolicy("value_threshold: similarity='key_value' with directions needs it")
        if self.scope == "both" and self.representative == "direction":
            raise InvalidPolicy("scope: 'both' needs representative='resident'; a direction overwrites its page")
        if self.layer_groups == 1 and (self.skip_first_layers or self.skip_last_layers):
            name = "skip_first_layers" if self.skip_first_layers else "skip_last_layers"
            raise InvalidPolicy(f"{name}: one layer group cannot leave layers out; raise layer_groups")

    @classmethod
    def preset(cls, name: str, **changes: Any) -> FusionPolicy:
        """Return preset `safe` (the default), `paper` or `off`, with fields replaced by `changes`.

        Raises:
            InvalidPolicy: unknown preset or field, or the fields do not go together.
        """
        return cls._from_fields(name, changes)

    @classmethod
    def _from_fields(cls, name: str, changes: dict[str, Any]) -> FusionPolicy:
        if name not in PRESETS:
            raise InvalidPolicy(f"preset: {shown(name)} is none of {', '.join(PRESETS)}")
        known = {field.name for field in dataclasses.fields(cls)}
        for field_name in changes:
            if field_name not in known:
                raise InvalidPolicy(f"{field_name[:40]}: no such field; there are {', '.join(sorted(known))}")
        return cls(**{**PRESETS[name], **changes})

    def threshold(self, name: str, group: int) -> float | None:
        """The threshold `name` that layer group `group` uses."""
        value = getattr(self, name)
        return value[group] if isinstance(value, tuple) else value

    def to_json(self) -> str:
        """The policy as one line of JSON; `from_json` reads it back."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> FusionPolicy:
        """Read what `to_json` wrote.

        Raises:
            InvalidPolicy: not JSON, not an object, an unknown field, or an invalid value.
        """
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InvalidPolicy(f"policy: not JSON ({error})") from None
        if not isinstance(fields, dict):
            raise InvalidPolicy("policy: not a JSON object")
        return cls._from_fields("safe", fields)


def _is_number(value: object) -> bool:
    """Whether a tensor can be compared with `value`; infinity is a number here, and NaN is sorted out by its range."""
    return isinstance(value, float) or _is_count(value, -MOST)


def _is_count(value: object, minimum: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and minimum <= value <= MOST


PRESETS: dict[str, dict[str, Any]] = {
    "safe": {},
    "paper": {
        "similarity": "key",
        "key_threshold": 0.75,
        "max_relative_error": None,
        "max_token_error": None,
        "representative": "direction",
        "layer_groups": PER_LAYER,
        "skip_first_layers": 2,
        "skip_last_layers": 2,
    },
    "off": {"enabled": False},
}


@dataclass(frozen=True)
class LayerGroups:
    """How the layers of a model split into groups of consecutive layers, and which groups take part.

    Attributes:
        layers: layers per group; layer `i` is layer `i % layers` of group `i // layers`.
        count: number of groups.
        fused: one flag per group.
    """

    layers: int
    count: int
    fused: tuple[bool, ...]

    @classmethod
    def of(cls, policy: FusionPolicy, num_layers: int) -> LayerGroups:
        """Split `num_layers` layers as `policy` asks.

        Raises:
            InvalidPolicy: the groups do not divide the layers, skipped layers cut a group, or thresholds are
                fewer or more than groups.
        """
        count = num_layers if policy.layer_groups == PER_LAYER else int(policy.layer_groups)
        if num_layers % count:
            raise InvalidPolicy(f"layer_groups: {count} does not divide the model's {num_layers} layers")
        layers = num_layers // count
        for name in ("skip_first_layers", "skip_last_layers"):
            if getattr(policy, name) % layers:
                raise InvalidPolicy(f"{name}: {getattr(policy, name)} cuts a group of {layers} layers")
        for name in THRESHOLDS:
            value = getattr(policy, name)
            if isinstance(value, tuple) and len(value) != count:
                raise InvalidPolicy(f"{name}: {len(value)} thresholds for {count} layer groups")
        first, last = policy.skip_first_layers // layers, policy.skip_last_layers // layers
        fused = tuple(policy.enabled and first <= group < count - last for group in range(count))
        return cls(layers, count, fused)
