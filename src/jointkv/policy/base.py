"""The user's parameters of fusion: what may be fused, how alike it must be, and what then stands in its place."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from dataclasses import dataclass
from reprlib import repr as shown
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from jointkv.core.blocks import LayerAggregate
from jointkv.errors import InvalidPolicy
from jointkv.policy.paper import Paper
from jointkv.policy.rule import Rule
from jointkv.policy.safe import Safe

METHODS: tuple[type[Rule], ...] = (Safe, Paper)
"""A new method is a file with its rule, and its name here."""

RULES = {method.representative: method for method in METHODS}
PRESETS = {
    **{method.preset: {"representative": method.representative, **method.defaults} for method in METHODS},
    "off": {"enabled": False},
}

PER_LAYER = "per_layer"
THRESHOLDS = ("key_threshold", "value_threshold", "max_relative_error", "max_token_error")
MOST = 2**31 - 1
"""Of anything counted: what is larger is a mistake, and no tensor could hold it."""

# Each type ends with what a value is that it refuses.
Scope = Literal["batch", "chunk", "both"]
Count = Annotated[int, Field(ge=1, le=MOST), f"no whole number from 1 to {MOST}"]
Layers = Annotated[int, Field(ge=0, le=MOST), f"no whole number from 0 to {MOST}"]
Groups = Annotated[
    Annotated[int, Field(ge=1, le=MOST)] | Literal["per_layer"], "neither a whole number of 1 or more nor 'per_layer'"
]
Number = TypeVar("Number")
PerGroup = Annotated[
    Number | Annotated[tuple[Number, ...], Field(min_length=1)] | None,
    BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value),
]
Cosine = Annotated[PerGroup[Annotated[float, Field(ge=-1, le=1)]], "not a number from -1 to 1"]
Bound = Annotated[PerGroup[Annotated[float, Field(ge=0, le=math.inf)]], "not a number from 0 to inf"]


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
            ids, or both.
        max_candidates: resident blocks verified per new block at the most.
    """

    enabled: Annotated[bool, "neither true nor false"] = True
    similarity: Literal["key", "key_value"] = "key_value"
    key_threshold: Cosine = None
    value_threshold: Cosine = None
    max_relative_error: Bound = 0.2
    max_token_error: Bound = 0.3
    across_layers: LayerAggregate = "rms"
    representative: Annotated[str, "no name"] = "resident"
    scope: Scope = "batch"
    chunk_tokens: Count = 512
    layer_groups: Groups = 1
    skip_first_layers: Layers = 0
    skip_last_layers: Layers = 0
    candidates: Literal["signature", "tokens", "both"] = "signature"
    max_candidates: Count = 4

    def __post_init__(self) -> None:
        for name, (adapter, refusal) in _field_checks().items():
            try:
                object.__setattr__(self, name, adapter.validate_python(getattr(self, name)))
            except ValidationError as error:
                value = max(error.errors(include_url=False), key=lambda problem: len(problem["loc"]))["input"]
                raise InvalidPolicy(f"{name}: {shown(value)} is {refusal}") from None
        if self.representative not in RULES:
            raise InvalidPolicy(f"representative: {shown(self.representative)} is none of {', '.join(RULES)}")
        if isinstance(self.layer_groups, int):
            self.check_thresholds(self.layer_groups)
        if self.enabled:
            self._check_combination()

    def check_thresholds(self, groups: int) -> None:
        """Raises InvalidPolicy when a list of thresholds is not one for each of `groups` layer groups."""
        for name in THRESHOLDS:
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != groups:
                raise InvalidPolicy(f"{name}: {len(value)} thresholds for {groups} layer groups")

    def _check_combination(self) -> None:
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
        RULES[self.representative].check(vars(self))
        if self.layer_groups == 1 and (self.skip_first_layers or self.skip_last_layers):
            name = "skip_first_layers" if self.skip_first_layers else "skip_last_layers"
            raise InvalidPolicy(f"{name}: one layer group cannot leave layers out; raise layer_groups")

    @classmethod
    def preset(cls, name: str, **changes: Any) -> FusionPolicy:
        """Return preset `safe` (the default), `paper`, that of another method, or `off`, with fields replaced.

        Raises:
            InvalidPolicy: unknown preset or field, or the fields do not go together.
        """
        return cls._from_fields(name, changes)

    @classmethod
    def _from_fields(cls, name: str, changes: dict[str, Any]) -> FusionPolicy:
        if not isinstance(name, str) or name not in PRESETS:
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

    def rule(self, group: int = 0) -> Rule:
        """What decides on the blocks of layer group `group`."""
        thresholds = {name: self.threshold(name, group) for name in THRESHOLDS}
        return RULES[self.representative](**thresholds, across_layers=self.across_layers)

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


@functools.cache
def _field_checks() -> dict[str, tuple[TypeAdapter[Any], str]]:
    """By field: what checks a value, and what a value is that it refuses."""
    checks = {}
    for name, kind in get_type_hints(FusionPolicy, include_extras=True).items():
        if get_origin(kind) is Literal:
            kind = Annotated[kind, f"none of {', '.join(get_args(kind))}"]
        checks[name] = (TypeAdapter(kind, config=ConfigDict(strict=True)), kind.__metadata__[-1])
    return checks
