"""What `jointkv bench quick` shows: one line per arm, and the ratios within rounds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from jointkv.bench.quick import ArmSummary

HEADINGS = (
    "arm",
    "pool",
    "tokens/s",
    "max running",
    "steps",
    "preempted",
    "TTFT p50 s",
    "ITL p50 ms",
    "pages freed",
    "same output",
)
NOT_MEASURED = "-"


def cells(summary: ArmSummary) -> tuple[str, ...]:
    """The line of an arm, in the order of `HEADINGS`."""
    medians = summary.medians
    spread = summary.ranges["tokens_per_s"]
    speed = _number(medians["tokens_per_s"], "{:.1f}".format)
    if spread is not None and summary.rounds > 1:
        speed += f" ({spread[0]:.0f}-{spread[1]:.0f})"
    equal = summary.outputs_equal_to_large_pool
    return (
        summary.arm,
        str(summary.pool_blocks),
        speed,
        *(_number(medians[name], "{:g}".format) for name in ("max_running", "steps", "preemptions")),
        _number(medians["ttft_p50"], "{:.2f}".format),
        _number(medians["itl_p50"], lambda seconds: f"{seconds * 1e3:.0f}"),
        _number(medians["pages_freed"], "{:g}".format),
        NOT_MEASURED if equal is None else f"{equal:g} of {summary.requests}",
    )


def ratio_lines(ratios: Mapping[str, Mapping[str, float | None]]) -> list[str]:
    """One line per pair of arms; a ratio that was not measured is left out."""
    lines = []
    for pair, values in ratios.items():
        known = [f"{name} {value:.2f}x" for name, value in values.items() if value is not None]
        if known:
            lines.append(f"{pair.replace('/', ' / ')}: {', '.join(known)}")
    return lines


def markdown(summaries: Sequence[ArmSummary], ratios: Mapping[str, Mapping[str, float | None]]) -> str:
    """Table and ratios as Markdown."""
    lines = ["| " + " | ".join(HEADINGS) + " |", "| --- |" + " ---: |" * (len(HEADINGS) - 1)]
    lines += ["| " + " | ".join(cells(summary)) + " |" for summary in summaries]
    return "\n".join([*lines, "", *(f"- {line}" for line in ratio_lines(ratios))]) + "\n"


def _number(value: float | None, form: Callable[[float], str]) -> str:
    return NOT_MEASURED if value is None else form(value)
