"""The JSON results that pictures are drawn from: one record per format, and how a file is read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError

from jointkv.bench.result import ServingResult
from jointkv.errors import BadInput
from jointkv.report.isolation_results import Influence, SideChannel
from jointkv.report.record import Record, Result
from jointkv.report.serving.reading import conflict as serving_conflict
from jointkv.report.serving.reading import contradiction

# Drawn on a logarithmic axis.
Positive = Annotated[float, Field(gt=0)]


class Ratio(Record):
    """A predicted ratio of blocks before to blocks after; the ends of its interval are None where not known."""

    ratio: Positive
    low: Positive | None = None
    high: Positive | None = None


class Difference(Record):
    """A mean difference paired by request, with the ends of its interval."""

    mean: float
    low: float
    high: float


class Traffic(Record):
    """What was asked of the methods."""

    requests: int
    prompt_tokens: Any = None
    description: str = ""


class MethodResult(Record):
    """One method at one level on one traffic, see `jointkv.evaluate.compare.comparison.MethodRow`."""

    traffic: str
    method: str
    level: float
    level_means: str = ""
    shares_across_requests: bool
    frees_engine_memory: bool
    not_run: str | None = None
    counted: str | None = None
    share_16bit: float | None = None
    kl: float | None = None
    kl_worst_request: float | None = None
    top1: float | None = None
    nll: float | None = None
    nll_reference: float | None = None
    generated: int = 0
    common_prefix: float | None = None

    @property
    def saved(self) -> float | None:
        """Share of the unfused KV bytes that are not held, at 16 bits per number."""
        return None if self.share_16bit is None else 1 - self.share_16bit


class TaskScore(Record):
    """A task under one method, see `jointkv.evaluate.tasks.run.TaskResult`; `difference` is to the unfused model."""

    task: str
    metric: str
    method: str
    level: float
    mean: float
    scores: list[float] = Field(default_factory=list)
    source: str
    stand_in: bool
    difference: Difference | None = None


class Evaluation(Result):
    """Methods side by side on the same requests."""

    FORMAT = "jointkv.evaluate/1"
    model: str
    dtype: str
    traffics: dict[str, Traffic]
    rows: list[MethodResult]
    tasks: list[TaskScore] = Field(default_factory=list)

    def conflict(self, other: Result) -> str | None:
        """Another model, dtype or set of requests: the numbers cannot be compared."""
        assert isinstance(other, Evaluation)
        for field in ("model", "dtype"):
            if getattr(self, field) != getattr(other, field):
                return f"{field} {getattr(self, field)} and {getattr(other, field)}"
        for name in self.traffics.keys() & other.traffics.keys():
            mine, theirs = self.traffics[name], other.traffics[name]
            if (mine.requests, mine.prompt_tokens) != (theirs.requests, theirs.prompt_tokens):
                return f"traffic {name} of other requests"
        return None


class Point(Record):
    """One bound of a rate-distortion curve, see `jointkv.theory.curve.CurvePoint`."""

    bound: float
    rate: Ratio
    poisson: Ratio
    distortion: float
    measured_ratio: Positive | None = None
    measured_distortion: float | None = None


class Curve(Record):
    """The curve of one layer, or of all (group None)."""

    group: int | None
    points: list[Point]


class Curves(Result):
    """Rate-distortion curves of one traffic."""

    FORMAT = "jointkv.curves/1"
    traffic: str
    requests: int
    held_out: int
    curves: list[Curve]

    @property
    def overall(self) -> Curve | None:
        """The curve of all layers together."""
        return next((curve for curve in self.curves if curve.group is None and curve.points), None)

    @property
    def layers(self) -> list[Curve]:
        """The curves of single layers, lowest first."""
        found = [(curve.group, curve) for curve in self.curves if curve.group is not None and curve.points]
        return [curve for _, curve in sorted(found, key=lambda pair: pair[0])]

    @property
    def heading(self) -> str:
        """Traffic and requests, for titles."""
        return f"{self.traffic.replace('_', '-')}, {self.requests} requests, {self.held_out} held out"


class HeldOut(Record):
    """What a calibration measured on requests it had not seen."""

    ratio: Positive
    kl: float | None = None
    kl_worst_request: float | None = None


class Split(Record):
    """One calibration on one random split; `unmet` says why the target cannot be met, and then nothing was measured."""

    traffic: str
    target: str
    seed: int
    max_relative_error: list[float] = Field(default_factory=list)
    predicted: Ratio | None = None
    held_out: HeldOut | None = None
    met: bool
    unmet: str | None = None
    seconds: float | None = None

    @field_validator("target", mode="before")
    @classmethod
    def _written_out(cls, value: Any) -> Any:
        if isinstance(value, dict) and {"kind", "value"} <= value.keys():
            return f"{value['kind']}={value['value']}"
        return value

    @property
    def deviation(self) -> float | None:
        """Predicted over measured ratio, less 1."""
        if self.predicted is None or self.held_out is None:
            return None
        return self.predicted.ratio / self.held_out.ratio - 1

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.unmet is None and (self.predicted is None or self.held_out is None):
            raise PydanticCustomError("incomplete", "neither predicted and held_out nor unmet")
        return self


class Sample(Record):
    """Of how many requests one half chose the bound and the other half was measured."""

    requests: int | None = None


class Calibrations(Result):
    """Calibrations on random splits."""

    FORMAT = "jointkv.calibration/1"
    settings: Sample = Sample()
    rows: list[Split]

    def sample(self, split: Split) -> str:
        """The traffic, and how much of it: what splits must have in common to be summed up together."""
        traffic = split.traffic.replace("_", "-")
        return traffic if self.settings.requests is None else f"{traffic}, {self.settings.requests} requests"


class BatchRow(Record):
    """Batch scope at one batch size."""

    dataset: str
    policy: str
    batch: int
    threshold: float | None = None
    ratio: Positive
    ratio_fused_layers: Positive | None = None
    kl: float | None = None
    top1: float | None = None
    f1: float | None = None
    f1_unfused: float | None = None
    stand_in: bool = False
    source: str = ""


class ChunkRow(Record):
    """Chunk scope on one data set."""

    dataset: str
    policy: str
    threshold: float | None = None
    ratio_fused_layers: Positive
    kl: float | None = None
    top1: float | None = None
    score: float | None = None
    score_unfused: float | None = None
    metric: str | None = None
    stand_in: bool = False
    source: str = ""


class LayerRow(Record):
    """One layer at one threshold; `low` and `high` belong to `rarefaction`."""

    layer: int
    threshold: float
    dataset: str | None = None
    measured: Positive
    poisson: Positive | None = None
    poisson_low: Positive | None = None
    poisson_high: Positive | None = None
    tree: Positive | None = None
    rarefaction: Positive | None = None
    low: Positive | None = None
    high: Positive | None = None


class PaperResult(Result):
    """The paper's experiments on this model."""

    FORMAT = "jointkv.paper/1"
    batch: list[BatchRow] = Field(default_factory=list)
    chunk: list[ChunkRow] = Field(default_factory=list)
    layers: list[LayerRow] = Field(default_factory=list)


class Serving(ServingResult, Result):
    """An A/B of served engines; its fields are those of `jointkv bench serve`."""

    FORMAT = "jointkv.bench.serving/1"

    def conflict(self, other: Result) -> str | None:
        """Another model, dtype or machine."""
        assert isinstance(other, Serving)
        return serving_conflict(self, other)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        problem = contradiction(self)
        if problem is not None:
            raise PydanticCustomError("contradiction", "{problem}", {"problem": problem})
        return self


_KINDS: tuple[type[Result], ...] = (
    Evaluation,
    Curves,
    Calibrations,
    PaperResult,
    Serving,
    SideChannel,
    Influence,
)
_FORMATS = {kind.FORMAT: kind for kind in _KINDS}


def read_result(path: Path) -> Result:
    """The result in `path`. Raises `BadInput`, which starts with the path, for a file that is none or is damaged."""
    try:
        text = path.read_text(encoding="utf-8")
        named = json.loads(text)
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path}: not JSON: {error}") from error
    kind = named.get("format") if isinstance(named, dict) else None
    known = _FORMATS.get(kind) if isinstance(kind, str) else None
    if known is None:
        raise BadInput(f'{path}: "format" is {json.dumps(kind)[:60]}, expected one of {", ".join(_FORMATS)}')
    try:
        return known.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise BadInput(f"{path}: {where + ': ' if where else ''}{first['msg']}") from error


def read_results(paths: Sequence[Path]) -> list[Result]:
    """The results in `paths`, in this order.

    Raises `BadInput` as `read_result`, and for files of one format that must not be put into one picture.
    """
    results = [read_result(path) for path in paths]
    for last, (path, result) in enumerate(zip(paths, results, strict=True)):
        for before, other in zip(paths[:last], results[:last], strict=True):
            reason = other.conflict(result) if type(other) is type(result) else None
            if reason is not None:
                raise BadInput(f"{before} and {path} cannot be put into one picture: {reason}")
    return results
