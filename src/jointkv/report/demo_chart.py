"""What `jointkv demo` shows: memory that stays in use beside what it costs, per traffic and policy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jointkv.evaluate.compare.result import PolicyRow
from jointkv.system.files import replacing

COLOURS = {"unfused": "#9aa0a6", "safe": "#1a73e8", "paper": "#d93025"}
NO_CHANGE_KL = 1e-5
"""Where smaller divergences are drawn on the logarithmic axis."""


def markdown(rows: Sequence[PolicyRow]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| traffic | policy | ratio | pages | KV MB | KL | KL, worst request | top-1 equal | NLL (unfused) | fuse s |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        lines.append(
            f"| {row.traffic.replace('_', '-')} | {row.policy} | {row.ratio:.2f} "
            f"| {row.pages_before} → {row.pages_after} "
            f"| {row.bytes_before / 1e6:.0f} → {row.bytes_after / 1e6:.0f} "
            f"| {row.kl:.5f} | {row.kl_worst_request:.5f} "
            f"| {row.top1:.3f} | {row.nll:.4f} ({row.nll_unfused:.4f}) | {row.seconds_fuse:.2f} |"
        )
    return "\n".join(lines) + "\n"


def draw(rows: Sequence[PolicyRow], path: Path) -> None:
    """Write a PNG with KV bytes in use (left) and KL to the unfused model (right). Raises `BadInput`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    traffics = list(dict.fromkeys(row.traffic for row in rows))
    policies = list(dict.fromkeys(row.policy for row in rows))
    width = 0.8 / len(policies)
    figure, (memory, quality) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for number, policy in enumerate(policies):
        chosen = [next(row for row in rows if (row.traffic, row.policy) == (name, policy)) for name in traffics]
        place = [index + (number - (len(policies) - 1) / 2) * width for index in range(len(traffics))]
        colour = COLOURS.get(policy.split()[0])
        bars = memory.bar(place, [row.bytes_after / 1e6 for row in chosen], width * 0.92, label=policy, color=colour)
        memory.bar_label(bars, [f"{row.ratio:.2f}x" for row in chosen], fontsize=8, padding=2)
        if policy == "unfused":
            continue
        heights = [max(row.kl, NO_CHANGE_KL) for row in chosen]
        bars = quality.bar(place, heights, width * 0.92, label=policy, color=colour, bottom=0)
        quality.bar_label(bars, [f"{row.kl:.2g}" for row in chosen], fontsize=8, padding=2)
    memory.set_ylabel("KV bytes in use (MB, at the allocator)")
    memory.set_title("Memory held after prefill")
    quality.set_yscale("log")
    quality.set_ylim(NO_CHANGE_KL / 2, 20)
    quality.axhline(1e-3, color="black", linewidth=0.8, linestyle=":")
    quality.set_ylabel("KL to the unfused model (nats per token)")
    quality.set_title("Cost: next-token distribution")
    for axes in (memory, quality):
        axes.set_xticks(range(len(traffics)), [name.replace("_", "-") for name in traffics])
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(y=0.12)
    memory.legend(frameon=False)
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=140)
    pyplot.close(figure)
