"""Methods side by side on the same requests: bytes held, and how far the next tokens moved from the unfused model's."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from jointkv.evaluate.methods.base import Batch, Counted, HeldBatch, Method, scored_tokens
from jointkv.evaluate.methods.unfused import Unfused
from jointkv.evaluate.score.fidelity import RequestSums, Scorer, common_prefix_length, cut_at_end

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Progress = Callable[[str], None]
Wanted = tuple[Method, float]
"""A method and the level to run it at."""
Outputs = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class ByteCount:
    """Bytes of K and V of batches on one model; sums over batches with `+`.

    Attributes:
        unfused_nbytes, nbytes, nbytes_packed: see `Batch` and `HeldBatch`.
        itemsize: bytes per number in the model's dtype.
    """

    unfused_nbytes: int
    nbytes: int
    nbytes_packed: int
    itemsize: int

    @classmethod
    def of(cls, held: HeldBatch, batch: Batch) -> ByteCount:
        """What is counted of `batch` as it is held."""
        return cls(batch.unfused_nbytes, held.nbytes, held.nbytes_packed, batch.model.dtype.itemsize)

    def __add__(self, other: ByteCount) -> ByteCount:
        return ByteCount(
            self.unfused_nbytes + other.unfused_nbytes,
            self.nbytes + other.nbytes,
            self.nbytes_packed + other.nbytes_packed,
            self.itemsize,
        )

    @property
    def share(self) -> float:
        """`nbytes / unfused_nbytes`."""
        return self.nbytes / self.unfused_nbytes

    @property
    def share_16bit(self) -> float:
        """`share` if the model's dtype had 16 bits: packed codes stay, the rest shrinks."""
        narrower = 2 / self.itemsize
        at_16bit = self.nbytes_packed + (self.nbytes - self.nbytes_packed) * narrower
        return at_16bit / (self.unfused_nbytes * narrower)


@dataclass(frozen=True)
class MethodRow:
    """One method at one level on one batch. What was not measured is None, or empty.

    Attributes:
        not_run: why nothing was measured; None if it was.
        environment: versions the numbers come from.
        unfused_nbytes: bytes of K and V of the prompts in the model's dtype.
        nbytes, counted: see `HeldBatch`.
        share, share_16bit: see `ByteCount`. At float32 `share` flatters quantisation; served models have 16 bits.
        seconds_hold, seconds_feed: to prefill and compress, and to score; what `Batch` keeps is not prefilled again.
        kl ... positions: see `Fidelity`.
        per_request: the sums behind them, in the order of the requests.
        generated: tokens generated greedily per request.
        common_prefix, common_prefix_worst_request: how many of them agree with the unfused model's before the first
            that differs, mean and least. What follows an end token is no output: requests that agree up to one agree
            in all `generated`.
        outputs: the generated token ids, up to the model's end token.
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
    """What the unfused model does: logits of `score`, and outputs of `greedy` up to the end tokens."""

    logits: Tensor
    outputs: Outputs

    @classmethod
    def of(cls, batch: Batch, generate: int = 0) -> Reference:
        """Run the unfused model on `batch`."""
        held = Unfused().hold(batch, 1.0)
        outputs = _outputs(held, batch, generate) if generate else ()
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


def end_tokens(model: PreTrainedModel) -> frozenset[int]:
    """Ids that end an answer, by the model's generation config."""
    configured = model.generation_config.eos_token_id if model.generation_config is not None else None
    ids = configured if isinstance(configured, list) else [configured]
    return frozenset(token for token in ids if token is not None)


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
    try:
        reference = Reference.of(batch, generate)
    except Exception as error:  # without it nothing can be compared, but other batches can
        report(f"unfused reference failed: {_reason(error)}")
        yield from (not_run(*wanted, f"unfused reference: {_reason(error)}", traffic) for wanted in methods)
        return
    for method, level in methods:
        missing = method.missing_packages()
        if missing:
            yield not_run(method, level, f"needs {', '.join(missing)}", traffic)
            continue
        report(f"{method.name} at {level:g}")
        try:
            row = _run(batch, method, level, reference, generate, traffic)
        except Exception as error:  # other people's methods raise anything; a table goes on without one of them
            row = not_run(method, level, _reason(error), traffic)
            report(f"{method.name} at {level:g} failed: {row.not_run}")
        yield row


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


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
        **(_agreement(_outputs(held, batch, generate), reference.outputs, generate) if generate else {}),
    )
    fed_at = time.perf_counter()
    logits = score(held, batch)
    seconds = time.perf_counter() - fed_at
    scorer = Scorer()
    for given, expected, request in zip(logits, reference.logits, batch.requests, strict=True):
        scorer.add(given, expected, torch.tensor(request.continuation))
    fidelity = scorer.result()
    if not math.isfinite(fidelity.kl) or not math.isfinite(fidelity.nll):
        whose = "logits" if math.isfinite(fidelity.nll_reference) else "the unfused model's logits"
        return not_run(method, level, f"broken: {whose} are not finite", traffic)
    return dataclasses.replace(row, seconds_feed=seconds, per_request=scorer.requests, **dataclasses.asdict(fidelity))


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
    count = ByteCount.of(held, batch)
    return {
        "unfused_nbytes": count.unfused_nbytes,
        "nbytes": count.nbytes,
        "counted": held.counted,
        "share": count.share,
        "share_16bit": count.share_16bit,
    }


def _outputs(held: HeldBatch, batch: Batch, generate: int) -> Outputs:
    """`greedy` on a fork, cut at the model's end tokens."""
    ends = end_tokens(batch.model)
    return tuple(cut_at_end(output, ends) for output in greedy(held.fork(), batch, generate))


def _agreement(outputs: Outputs, expected: Outputs, generated: int) -> dict[str, Any]:
    pairs = zip(outputs, expected, strict=True)
    lengths = [generated if ours == theirs else common_prefix_length(ours, theirs) for ours, theirs in pairs]
    return {
        "generated": generated,
        "common_prefix": sum(lengths) / len(lengths),
        "common_prefix_worst_request": min(lengths),
        "outputs": outputs,
    }
