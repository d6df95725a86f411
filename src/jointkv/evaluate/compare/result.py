"""What comparisons write: methods and tasks side by side, and policies beside the unfused cache."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from jointkv.evaluate.holding.work import Work
from jointkv.evaluate.record import Origin, Record
from jointkv.evaluate.score.summary import RequestSums
from jointkv.evaluate.tasks.result import TaskRow

FORMAT: Literal["jointkv.evaluate/1"] = "jointkv.evaluate/1"

Outputs = tuple[tuple[int, ...], ...]
"""Generated token ids by request."""


class MethodRow(Record):
    """One method at one level on one batch. What was not measured is None, or empty.

    Attributes:
        not_run: why nothing was measured; None if it was.
        environment: versions the numbers come from.
        unfused_nbytes: bytes of K and V of the prompts in the model's dtype.
        nbytes, counted: see `HeldBatch`.
        share, share_16bit: see `ByteCount`. At float32 `share` flatters quantisation; served models have 16 bits.
        work: what the prefill computed, of a method that does not compute everything.
        seconds_hold, seconds_feed: to prefill and compress, and to score; what `Batch` keeps is not prefilled again.
        kl ... positions: see `Fidelity`.
        per_request: the sums behind them, in the order of the requests.
        generated: tokens generated greedily per request.
        common_prefix, common_prefix_worst_request: how many of them agree with the unfused model's before the first
            that differs, mean and least. What follows an end token is no output: requests that agree up to one agree
            in all `generated`.
        outputs: the generated token ids, up to the model's end token.
        diverged: share of the requests whose output is another one than the unfused model's.
    """

    traffic: str
    method: str
    level: float
    level_means: str = ""
    shares_across_requests: bool
    frees_engine_memory: bool
    environment: str = ""
    not_run: str | None = None
    unfused_nbytes: int | None = None
    nbytes: int | None = None
    counted: str | None = None
    share: float | None = None
    share_16bit: float | None = None
    work: Work | None = Field(default=None, exclude_if=lambda work: work is None)
    seconds_hold: float | None = None
    seconds_feed: float | None = None
    kl: float | None = None
    kl_worst_request: float | None = None
    top1: float | None = None
    top1_worst_request: float | None = None
    nll: float | None = None
    nll_reference: float | None = None
    requests: int | None = None
    positions: int | None = None
    per_request: tuple[RequestSums, ...] = ()
    generated: int = 0
    common_prefix: float | None = None
    common_prefix_worst_request: int | None = None
    outputs: Outputs = ()
    diverged: float | None = Field(default=None, exclude_if=lambda share: share is None)


class TrafficSummary(Record):
    """What was asked of the methods; `prompt_tokens` has the least, the mean and the most of a request."""

    requests: int
    prompt_tokens: dict[str, int | float] | None = None
    description: str = ""


class Evaluation(Origin):
    """Methods and tasks side by side on one model: the result of `jointkv evaluate`."""

    format: Literal["jointkv.evaluate/1"] = FORMAT
    model: str
    dtype: str
    settings: dict[str, Any] = Field(default_factory=dict)
    traffics: dict[str, TrafficSummary]
    rows: list[MethodRow]
    tasks: list[TaskRow] = Field(default_factory=list)


class PolicyRow(Record):
    """A traffic under a policy, against the same requests unfused: a row of `jointkv demo`.

    Attributes:
        pages_before, pages_after: in use at the allocator before and after fusion; `ratio` is one over the other.
        ratio_fused_layers: references per page over the layers that take part in fusion.
        bytes_before, bytes_after: of the pages of the unfused batch and of this one.
        tokens_skipped: of the prompts, those that were read from resident pages instead of being computed.
    """

    traffic: str
    policy: str
    ratio: float
    ratio_fused_layers: float
    pages_before: int
    pages_after: int
    bytes_before: int
    bytes_after: int
    kl: float
    kl_worst_request: float
    top1: float
    top1_worst_request: float
    nll: float
    nll_unfused: float
    seconds_fuse: float
    seconds_prefill: float
    requests: int
    prompt_tokens: int
    tokens_skipped: int = 0
    scored_tokens: int


class Demo(Record):
    """What `jointkv demo` writes."""

    format: Literal["jointkv.demo/1"] = "jointkv.demo/1"
    model: str
    settings: dict[str, Any]
    policies: dict[str, Any]
    versions: dict[str, str | None]
    rows: list[PolicyRow]
