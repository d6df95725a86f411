"""Methods side by side on the same requests: bytes held, and how far the next tokens moved from the unfused model's."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from jointkv.evaluate.fidelity import RequestSums, Scorer, common_prefix_length
from jointkv.evaluate.methods.base import Batch, Counted, HeldBatch, Method, scored_tokens
from jointkv.evaluate.methods.unfused import Unfused

Progress = Callable[[str], None]
Wanted = tuple[Method, float]
"""A method and the level to run it at."""
Outputs = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class MethodRow:
    """One method at one level on one batch. What was not measured is None, or empty.

    Attributes:
        not_run: why nothing was measured; None if it was.
        environment: versions the numbers come from.
        unfused_nbytes: bytes of K and V of the prompts in the model's dtype.
        nbytes, counted: see `HeldBatch`.
        share: `nbytes / unfused_nbytes`.
        share_16bit: the same if the model's dtype had 16 bits, as served models have: packed codes stay, the rest
            shrinks. At float32 `share` flatters quantisation.
        seconds_hold, seconds_feed: to prefill and compress, and to score; what `Batch` keeps is not prefilled again.
        kl ... positions: see `Fidelity`.
        per_request: the sums behind them, in the order of the requests.
        generated: tokens generated greedily per request.
        common_prefix, common_prefix_worst_request: how many of them agree with the unfused model's before the first
            that differs, mean and least.
        outputs: the generated token ids.
    """

    traffic: str
    method: str
    level: float
    level_means: str
    shares_across_requests: bool
    frees_engine_memory: bool
    environment: str
    not_run: str | None = None
    unfused_nbytes: int | None = None
    nbytes: int | None = None
    counted: Counted | None = None
    share: float | None = None
    share_16bit: float | None = None
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

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> MethodRow:
        """Read back `dataclasses.asdict`, also after a way through JSON."""
        sums = tuple(RequestSums(**row) for row in fields["per_request"])
        outputs = tuple(tuple(output) for output in fields["outputs"])
        return cls(**{**fields, "per_request": sums, "outputs": outputs})


@dataclass(frozen=True)
class Reference:
    """What the unfused model does: logits of `score`, and outputs of `greedy`."""

    logits: Tensor
    outputs: Outputs

    @classmethod
    def of(cls, batch: Batch, generate: int = 0) -> Reference:
        """Run the unfused model on `batch`."""
        held = Unfused().hold(batch, 1.0)
        outputs = greedy(held.fork(), batch, generate) if generate else ()
        return cls(score(held, batch), outputs)


def score(held: HeldBatch, batch: Batch) -> Tensor:
    """Logits `[requests, n, vocab]` over the true continuations; `held` has them appended afterwards."""
    return held.feed(scored_tokens(batch.requests))


def greedy(held: HeldBatch, batch: Batch, tokens: int) -> Outputs:
    """The next `tokens` most likely token ids of each request; `held` has them appended afterwards."""
    fed = torch.tensor([request.prompt[-1:] for request in batch.requests])
    outputs = []
    for _ in range(tokens):
        fed = held.feed(fed)[:, -1].argmax(-1, keepdim=True).cpu()
        outputs.append(fed)
    return tuple(tuple(row) for row in torch.cat(outputs, 1).tolist())


def run_methods(
    batch: Batch, methods: Sequence[Wanted], generate: int = 0, progress: Progress | None = None, *, traffic: str = ""
) -> list[MethodRow]:
    """Run each method at its level on `batch` and compare it with the unfused model in this environment.

    `generate` tokens are also generated greedily if it is not 0. `progress` gets one line before each method. A method
    that fails or whose packages are missing has a row that says why.
    """
    return list(iter_methods(batch, methods, generate, progress, traffic=traffic))


def iter_methods(
    batch: Batch, methods: Sequence[Wanted], generate: int = 0, progress: Progress | None = None, *, traffic: str = ""
) -> Iterator[MethodRow]:
    """`run_methods`, one row at a time."""
    report = progress or (lambda line: None)
    report("unfused reference")
    reference = Reference.of(batch, generate)
    for method, level in methods:
        missing = method.missing_packages()
        if missing:
            yield not_run(method, level, f"needs {', '.join(missing)}", traffic)
            continue
        report(f"{method.name} at {level:g}")
        try:
            row = _run(batch, method, level, reference, generate, traffic)
        except Exception as error:  # other people's methods raise anything; a table goes on without one of them
            row = not_run(method, level, f"{type(error).__name__}: {error}", traffic)
            report(f"{method.name} at {level:g} failed: {row.not_run}")
        yield row


def not_run(method: Method, level: float, reason: str, traffic: str = "") -> MethodRow:
    """The row of a method that could not be run."""
    return MethodRow(**_identity(method, level, traffic), not_run=reason)


def equal_bytes(methods: Sequence[Method], share: float) -> list[Wanted]:
    """Each method at the level that keeps `share` of the unfused bytes; at all its levels if that cannot be chosen."""
    wanted: list[Wanted] = []
    for method in methods:
        level = method.level_for_share(share)
        wanted += [(method, each) for each in (method.levels if level is None else (level,))]
    return wanted


def environment() -> str:
    """The versions that matter to a comparison."""
    import transformers

    return f"torch {torch.__version__}, transformers {transformers.__version__}"


def _run(batch: Batch, method: Method, level: float, reference: Reference, generate: int, traffic: str) -> MethodRow:
    start = time.perf_counter()
    held = method.hold(batch, level)
    held_at = time.perf_counter()
    row = MethodRow(
        **_identity(method, level, traffic),
        **_bytes(held, batch),
        seconds_hold=held_at - start,
        **(_agreement(greedy(held.fork(), batch, generate), reference.outputs) if generate else {}),
    )
    fed_at = time.perf_counter()
    logits = score(held, batch)
    seconds = time.perf_counter() - fed_at
    scorer = Scorer()
    for given, expected, request in zip(logits, reference.logits, batch.requests, strict=True):
        scorer.add(given, expected, torch.tensor(request.continuation))
    fidelity = dataclasses.asdict(scorer.result())
    return dataclasses.replace(row, seconds_feed=seconds, per_request=scorer.requests, **fidelity)


def _identity(method: Method, level: float, traffic: str) -> dict[str, Any]:
    return {
        "traffic": traffic,
        "method": method.name,
        "level": level,
        "level_means": method.level_means,
        "shares_across_requests": method.shares_across_requests,
        "frees_engine_memory": method.frees_engine_memory,
        "environment": environment(),
    }


def _bytes(held: HeldBatch, batch: Batch) -> dict[str, Any]:
    unfused = batch.unfused_nbytes
    narrower = 2 / batch.model.dtype.itemsize
    at_16bit = held.nbytes_packed + (held.nbytes - held.nbytes_packed) * narrower
    return {
        "unfused_nbytes": unfused,
        "nbytes": held.nbytes,
        "counted": held.counted,
        "share": held.nbytes / unfused,
        "share_16bit": at_16bit / (unfused * narrower),
    }


def _agreement(outputs: Outputs, expected: Outputs) -> dict[str, Any]:
    lengths = [common_prefix_length(a, b) for a, b in zip(outputs, expected, strict=True)]
    return {
        "generated": len(outputs[0]),
        "common_prefix": sum(lengths) / len(lengths),
        "common_prefix_worst_request": min(lengths),
        "outputs": outputs,
    }
