"""Methods side by side on the same requests: bytes held, and how far the next tokens moved from the unfused model's."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor

from jointkv.evaluate.compare.result import MethodRow, Outputs
from jointkv.evaluate.holding.batch import Batch
from jointkv.evaluate.holding.held import ByteCount, HeldBatch, end_tokens, greedy, true_logits
from jointkv.evaluate.methods.base import Method
from jointkv.evaluate.methods.unfused import Unfused
from jointkv.evaluate.progress import Report
from jointkv.evaluate.score.fidelity import score
from jointkv.evaluate.score.outputs import common_prefix_length, cut_at_end
from jointkv.evaluate.score.summary import summarize

Wanted = tuple[Method, float]
"""A method and the level to run it at."""


class _NotFinite(Exception):
    """Logits that are NaN or infinite."""


@dataclass(frozen=True)
class Reference:
    """What the unfused model does: logits over the true continuations, and greedy outputs up to the end tokens."""

    logits: Tensor
    outputs: Outputs

    @classmethod
    def of(cls, batch: Batch, generate: int = 0) -> Reference:
        """Run the unfused model on `batch`."""
        held = Unfused().hold(batch, 1.0)
        outputs = _outputs(held, batch, generate)
        return cls(true_logits(held, batch.requests), outputs)


def run_methods(
    batch: Batch, methods: Sequence[Wanted], generate: int = 0, progress: Report | None = None, *, traffic: str = ""
) -> Iterator[MethodRow]:
    """Run each method at its level on `batch` and compare it with the unfused model in this environment.

    `generate` tokens are also generated greedily if it is not 0. `progress` gets one line before each method. A method
    that fails or whose packages are missing has a row that says why.
    """
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
            found = _measured(method.hold, batch, level, reference, generate)
        except Exception as error:  # other people's methods raise anything; a table goes on without one of them
            report(f"{method.name} at {level:g} failed: {_reason(error)}")
            yield not_run(method, level, _reason(error), traffic)
        else:
            yield _row(method, level, traffic, **found)


def not_run(method: Method, level: float, reason: str, traffic: str = "") -> MethodRow:
    """The row of a method that could not be run."""
    return _row(method, level, traffic, not_run=reason)


def equal_bytes(methods: Sequence[Method], share: float) -> list[Wanted]:
    """Each method at the level that keeps `share` of the unfused bytes; at all its levels if that cannot be chosen."""
    wanted: list[Wanted] = []
    for method in methods:
        level = method.level_for_share(share)
        wanted += [(method, each) for each in (method.levels if level is None else (level,))]
    return wanted


def _reason(error: Exception) -> str:
    return f"{'broken' if isinstance(error, _NotFinite) else type(error).__name__}: {error}"


def _row(method: Method, level: float, traffic: str, **found: Any) -> MethodRow:
    return MethodRow(
        traffic=traffic,
        method=method.name,
        level=level,
        level_means=method.level_means,
        shares_across_requests=method.shares_across_requests,
        frees_engine_memory=method.frees_engine_memory,
        environment=f"torch {torch.__version__}, transformers {transformers.__version__}",
        **found,
    )


def _measured(
    hold: Callable[[Batch, float], HeldBatch], batch: Batch, level: float, reference: Reference, generate: int
) -> dict[str, Any]:
    """What a row says of `batch` as `hold` holds it. Raises `_NotFinite`."""
    start = time.perf_counter()
    held = hold(batch, level)
    seconds_hold = time.perf_counter() - start
    count = ByteCount.of(held, batch)
    agreement = _agreement(_outputs(held, batch, generate), reference.outputs, generate) if generate else {}
    start = time.perf_counter()
    logits = true_logits(held, batch.requests)
    seconds_feed = time.perf_counter() - start
    per_request = score(logits, reference.logits, [request.continuation for request in batch.requests])
    fidelity = summarize(per_request)
    if not math.isfinite(fidelity.kl) or not math.isfinite(fidelity.nll):
        whose = "logits" if math.isfinite(fidelity.nll_reference) else "the unfused model's logits"
        raise _NotFinite(f"{whose} are not finite")
    return {
        **{"unfused_nbytes": count.unfused_nbytes, "nbytes": count.nbytes, "counted": held.counted},
        **{"share": count.share, "share_16bit": count.share_16bit, "work": held.work},
        **{"seconds_hold": seconds_hold, "seconds_feed": seconds_feed, "per_request": per_request},
        **agreement,
        **vars(fidelity),
    }


def _outputs(held: HeldBatch, batch: Batch, generate: int) -> Outputs:
    """`greedy` on a fork, cut at the model's end tokens."""
    if not generate:
        return ()
    ends = end_tokens(batch.model)
    return tuple(cut_at_end(output, ends) for output in greedy(held.fork(), batch.requests, generate))


def _agreement(outputs: Outputs, expected: Outputs, generated: int) -> dict[str, Any]:
    pairs = zip(outputs, expected, strict=True)
    lengths = [generated if ours == theirs else common_prefix_length(ours, theirs) for ours, theirs in pairs]
    return {
        "generated": generated,
        "common_prefix": sum(lengths) / len(lengths),
        "common_prefix_worst_request": min(lengths),
        "outputs": outputs,
        "diverged": sum(length < generated for length in lengths) / len(lengths),
    }
