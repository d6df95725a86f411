"""The JSON of `jointkv bench serve`: what was run, every sample, and what follows from them. Reports read only this.

Times are seconds, rates per second, memory bytes, unless a name says otherwise. None stands for "not measured".
"""

from __future__ import annotations

from pathlib import Path
from string import Formatter
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from jointkv.bench.record import Record
from jointkv.bench.reuse import Reuse, Warmup
from jointkv.bench.scores import Scored, TrueAnswers
from jointkv.bench.stored import Stored
from jointkv.errors import BadInput

LoadKind = Literal["closed", "one_first", "poisson", "bursty", "replay"]
LABELS: dict[LoadKind, str] = {
    "closed": "closed {concurrency}",
    "one_first": "one first then all",
    "poisson": "poisson {rate:g}/s",
    "bursty": "bursty {rate:g}/s x{burstiness:g}",
    "replay": "replay x{speed:g}",
}
"""Of each kind, with the fields that it needs."""

Key = tuple[str, str, int]
"""Arm, label of the load, round: what there is one run of."""


class Load(Record):
    """How requests arrive.

    Attributes:
        kind: `closed`: `concurrency` requests are under way, the next one starts when one ends. `one_first`: the first
            request alone until its first token, then all others at once. `poisson`: `rate` requests a second.
            `bursty`: the same with gamma-distributed gaps of shape `burstiness` below 1. `replay`: at the times of a
            log, `speed` times as fast.
    """

    kind: LoadKind
    concurrency: int | None = None
    rate: float | None = None
    burstiness: float | None = None
    speed: float | None = None

    @model_validator(mode="after")
    def _complete(self) -> Self:
        for _, name, _, _ in Formatter().parse(LABELS[self.kind]):
            if name and getattr(self, name) is None:
                raise PydanticCustomError("incomplete", "{kind} without {name}", {"kind": self.kind, "name": name})
        return self

    @property
    def label(self) -> str:
        """Short and unique: `closed 16`, `poisson 0.5/s`, `bursty 0.5/s x0.3`, `replay x2`."""
        return LABELS[self.kind].format_map(vars(self))


class Arm(Record):
    """One way to serve.

    Attributes:
        title: a few words for tables.
        pool_blocks: blocks of the KV pool as vLLM counts them.
        fusion: options of `PluginSettings`; None is an engine without the plugin.
        flags: further flags of `vllm serve`, only of this arm.
    """

    name: str
    title: str
    pool_blocks: int
    fusion: dict[str, Any] | None = None
    flags: list[str] = Field(default_factory=list)

    @property
    def reuses(self) -> bool:
        """Whether it may skip the computing of resident text."""
        return (self.fusion or {}).get("reuse", "off") != "off"


class Latency(Record):
    """Over the requests of one run (`itl`: over all gaps between tokens)."""

    mean: float
    p50: float
    p95: float
    p99: float


class RequestSample(Record):
    """One request: when it was sent after the start of the run, and how it went. `itl` is the mean gap."""

    start: float
    prompt_tokens: int
    output_tokens: int
    ttft: float
    itl: float | None
    e2el: float


class Timeline(Record):
    """The server's own metrics, read about once a second while the load ran; lists of one length.

    Attributes:
        seconds: since the start of the run.
        pool_usage: part of the pool in use, 0 to 1, shared pages counted once.
        pages_freed: given back by merging since the start of the run; None without the plugin.
        prompt_tokens_skipped: likewise; None without compute reuse.
    """

    seconds: list[float]
    running: list[float]
    waiting: list[float]
    pool_usage: list[float]
    preemptions: list[float]
    pages_freed: list[float] | None = None
    prompt_tokens_skipped: list[float] | None = None


class Run(Record):
    """One arm under one load, once.

    Attributes:
        round: from 1; runs of one round are compared with each other.
        position: place in the order of execution, from 0.
        failed: requests without a complete answer.
        prompt_tokens_computed: by all steps, those computed again after preemption too.
        recomputed_tokens: computed again after preemption.
        kv_bytes_per_running_token: bytes of the pages in use over the tokens of running requests, mean over time.
        plugin_seconds: spent by fusion, all its parts; None without the plugin.
        server_cpu_seconds: CPU time of the server's processes during the run.
        foreign_cpu: part of the cores' time that went to processes that are neither server nor load generator.
        fusion: the plugin's counters over the run.
        reuse: what compute reuse did; None where nothing counts that.
        warmup: what was served just before; None for nothing.
        stored: what was read from a store and written to it; None without one.
        outputs_file: texts of the answers, beside the result file; not needed to report.
    """

    arm: str
    load: str
    round: int
    position: int
    seconds: float
    completed: int
    failed: int
    prompt_tokens: int
    output_tokens: int
    output_tokens_per_s: float
    total_tokens_per_s: float
    requests_per_s: float
    ttft: Latency
    tpot: Latency | None
    itl: Latency | None
    e2el: Latency
    running_peak: float
    running_mean: float
    waiting_peak: float
    waiting_mean: float
    preemptions: int
    recomputed_tokens: int | None
    pool_usage_peak: float
    pool_usage_mean: float
    pages_freed: int | None
    kv_bytes_per_running_token: float | None
    plugin_seconds: float | None
    server_cpu_seconds: float | None
    foreign_cpu: float | None
    fusion: dict[str, float] | None
    timeline: Timeline
    requests: list[RequestSample]
    outputs_file: str | None = None
    prompt_tokens_computed: int | None = None
    reuse: Reuse | None = None
    warmup: Warmup | None = None
    stored: Stored | None = None

    @property
    def key(self) -> Key:
        """See `Key`."""
        return self.arm, self.load, self.round

    @property
    def skipped_share(self) -> float | None:
        """Part of the prompt tokens that compute reuse skipped; None where nothing counts that.

        Not more than was not computed: prompts of preempted requests are skipped, and in part computed, once more.
        """
        if self.reuse is None:
            return None
        skipped = self.reuse.skipped_tokens / self.prompt_tokens
        computed = self.prompt_tokens_computed
        return skipped if computed is None else max(0.0, min(skipped, 1 - computed / self.prompt_tokens))


class Fidelity(Record):
    """Greedy outputs of two arms (or of one arm in two rounds: its own noise) on the same requests.

    Attributes:
        against: the arm compared with.
        equal: part of the requests with the same text.
        common_prefix: mean part of the text, from its beginning, that is the same.
        pairs: compared outputs.
    """

    arm: str
    against: str
    load: str
    equal: float
    common_prefix: float
    pairs: int


NEAR_TIE = 0.1
"""Nats: the reference held one token for 1.1 times as likely as the other, at the most."""


class Divergence(Record):
    """One answer that differs from the reference arm's, at its first different token.

    Attributes:
        against: the reference arm.
        request: number of the request, from 0.
        token: number of the first different token of the answer, from 0.
        gap: difference of the log-probabilities that the reference gives the two tokens there, in nats.
        least: one of the two is not among the likeliest that it tells of: the gap is that or more.
    """

    arm: str
    against: str
    load: str
    round: int
    request: int
    token: int
    gap: float
    least: bool = False

    @property
    def near_tie(self) -> bool:
        """Whether rounding may have decided: the reference itself was of two minds."""
        return not self.least and self.gap <= NEAR_TIE


class Comparison(Record):
    """One metric of two arms under one load, paired by round.

    Attributes:
        ratios: upper over lower, round by round.
        p: two-sided, of an exact permutation test that exchanges the arms within rounds.
        smallest_p: what that test gives at best with so many rounds.
    """

    upper: str
    lower: str
    load: str
    metric: str
    ratios: list[float]
    median_ratio: float
    p: float
    smallest_p: float


class ServingResult(Record):
    """Everything.

    Attributes:
        command: what was typed.
        complete: False for the partial result of a run that was interrupted or failed.
        traffic: name and description of the requests, and what stands in for what.
        block_bytes: bytes of one block of the pool, K and V of all layers that share it.
        warmup: requests served before every run.
        divergences: of all answers that differ; None where the reference was not asked.
        scores: of all arms but the reference; None where that was not asked for.
        true_answers: where requests have them.
    """

    format: Literal["jointkv.bench.serving/1"] = "jointkv.bench.serving/1"
    command: str
    complete: bool
    model: str
    traffic: str
    traffic_description: str
    requests: int
    output_tokens: int
    block_size: int = Field(ge=1)
    block_bytes: int = Field(ge=1)
    dtype: str
    seed: int
    rounds: int
    common_flags: list[str]
    cores: dict[str, str]
    machine: dict[str, str | int]
    versions: dict[str, str]
    arms: list[Arm]
    loads: list[Load]
    runs: list[Run]
    fidelity: list[Fidelity]
    comparisons: list[Comparison]
    warmup: int = 0
    divergences: list[Divergence] | None = None
    scores: list[Scored] | None = None
    true_answers: list[TrueAnswers] = Field(default_factory=list)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a result.

        Raises:
            BadInput: no such file, no JSON, or not a result of this format.
        """
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:  # not there, no name of a file, not UTF-8
            raise BadInput(f"{path}: {error}") from None
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            problem = error.errors()[0]
            where = ".".join(str(part) for part in problem["loc"]) or "file"
            raise BadInput(f"{path}: no result of `jointkv bench serve` ({where}: {problem['msg']})") from None

    def arm(self, name: str) -> Arm:
        """The arm of that name. Raises `KeyError`."""
        return {arm.name: arm for arm in self.arms}[name]

    def of(self, arm: str, load: str) -> list[Run]:
        """The runs of one arm under one load, by round."""
        return sorted((run for run in self.runs if (run.arm, run.load) == (arm, load)), key=lambda run: run.round)
