"""What `jointkv evaluate paper` writes: one kind of row for each experiment."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from jointkv.evaluate.record import Origin, Positive, Record

FORMAT: Literal["jointkv.paper/1"] = "jointkv.paper/1"


class PolicyLabel(Record):
    """A policy and its threshold, the cosine of keys; None for `safe`, which has none."""

    dataset: str
    policy: str
    threshold: float | None

    @property
    def label(self) -> str:
        """Both in one, for tables."""
        return self.policy if self.threshold is None else f"{self.policy} {self.threshold:g}"


class FusedRow(PolicyLabel):
    """Requests of one data set fused under one policy, compared with the unfused model.

    Attributes:
        source, stand_in: where the rows come from, and whether they stand for a data set that could not be had.
        prompt_tokens: tokens of K and V per request.
        ratio: pages before / after, all layers, at the allocator.
        kl, top1, nll, nll_unfused: see `Fidelity`, over the true tokens after the prompts.
    """

    source: str
    stand_in: bool
    prompt_tokens: int
    ratio: Positive
    ratio_fused_layers: Positive
    kl: float | None
    top1: float | None
    nll: float | None
    nll_unfused: float | None


class BatchRow(FusedRow):
    """One batch; `f1` is the mean token F1 of the greedy continuation against the true one."""

    batch: int
    kl_worst_request: float | None
    f1: float
    f1_unfused: float


class ChunkRow(FusedRow):
    """Documents, each fused within itself; the last tokens of a prompt follow unfused.

    Attributes:
        scored_tokens: tokens behind what was fused, over all documents.
        metric: LongBench's own of the data set; `score` is the mean of answers cut to `document_answer_tokens`.
    """

    documents: int
    scored_tokens: int
    metric: str
    score: float
    score_unfused: float


class GrowthRow(PolicyLabel):
    """How the ratio grows with the batch size B, fitted by `a + b ln B` and by `a + b B`.

    Attributes:
        ratio: which one: `ratio`, that levels off where the layers left out outweigh the rest, or `ratio_fused_layers`.
        r2_log, r2_linear: share of the variance explained; None where the ratio does not change.
        slope_log: `b` of the first: added ratio when B grows e-fold.
    """

    ratio: str
    sizes: int
    slope_log: float
    r2_log: float | None
    r2_linear: float | None


class LayerRow(Record):
    """Ratio of one layer at one threshold, measured on one batch and predicted from another of the same size.

    Attributes:
        measured: blocks over distinct blocks after the paper's policy.
        match_probability: share of pairs of requests whose blocks match, mean over positions.
        poisson, poisson_low, poisson_high: online search, pairs independent (Corollary 1), 95% interval.
        tree: the same assumption for the tree of Algorithm 1.
        rarefaction, low, high: online search on the real pairs, 95% interval.
        dispersion: p value of the test that matches per block are Poisson; None without any match.
    """

    dataset: str
    layer: int
    threshold: float
    requests: int
    measured: Positive
    match_probability: float
    poisson: Positive
    poisson_low: Positive
    poisson_high: Positive
    tree: Positive
    rarefaction: Positive
    low: Positive
    high: Positive
    dispersion: float | None


class PaperRows(Record):
    """What the experiments gave; what was not run has no rows. `growth` summarises `batch`."""

    batch: list[BatchRow] = Field(default_factory=list)
    growth: list[GrowthRow] = Field(default_factory=list)
    chunk: list[ChunkRow] = Field(default_factory=list)
    layers: list[LayerRow] = Field(default_factory=list)


class PaperResult(Origin, PaperRows):
    """The paper's experiments on one model."""

    format: Literal["jointkv.paper/1"] = FORMAT
    model: str
    dtype: str
    settings: dict[str, Any] = Field(default_factory=dict)
