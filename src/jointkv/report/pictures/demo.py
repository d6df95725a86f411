"""What `jointkv demo` shows: memory that stays in use beside what it costs, per traffic and policy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jointkv.evaluate.compare.result import PolicyRow
from jointkv.report.figure import grid, grouped_bars, kl_axis, legend_below, png, style
from jointkv.report.markdown import Columns, table, words
from jointkv.system.files import replacing

TARGET_KL = 1e-3

TEXT: Columns[PolicyRow] = {"traffic": lambda row: words(row.traffic), "policy": lambda row: row.policy}
NUMBERS: Columns[PolicyRow] = {
    "ratio": lambda row: f"{row.ratio:.2f}",
    "pages": lambda row: f"{row.pages_before} → {row.pages_after}",
    "KV MB": lambda row: f"{row.bytes_before / 1e6:.0f} → {row.bytes_after / 1e6:.0f}",
    "prompt tokens computed": lambda row: f"{row.prompt_tokens - row.tokens_skipped} of {row.prompt_tokens}",
    "KL": lambda row: f"{row.kl:.5f}",
    "KL, worst request": lambda row: f"{row.kl_worst_request:.5f}",
    "top-1 equal": lambda row: f"{row.top1:.3f}",
    "NLL (unfused)": lambda row: f"{row.nll:.4f} ({row.nll_unfused:.4f})",
    "fuse s": lambda row: f"{row.seconds_fuse:.2f}",
}


def markdown(rows: Sequence[PolicyRow]) -> str:
    """The rows as a Markdown table."""
    return table(TEXT, NUMBERS, rows)


def draw(rows: Sequence[PolicyRow], path: Path) -> None:
    """Write a PNG with KV bytes in use (left) and KL to the unfused model (right). Raises `BadInput`."""
    traffics = list(dict.fromkeys(words(row.traffic) for row in rows))
    policies: dict[str, list[PolicyRow]] = {}
    for row in rows:
        policies.setdefault(row.policy, []).append(row)
    held = {
        policy: [(words(row.traffic), row.bytes_after / 1e6, f"{row.ratio:.2f}x") for row in chosen]
        for policy, chosen in policies.items()
    }
    costs = {
        policy: [(words(row.traffic), row.kl, f"{row.kl:.2g}") for row in chosen] for policy, chosen in policies.items()
    }
    with style():
        figure, (memory, quality) = grid(2, 2, (5.5, 4.2))
        grouped_bars(memory, traffics, held)
        grouped_bars(quality, traffics, costs)
        memory.set_ylabel("KV bytes in use (MB, at the allocator)")
        memory.set_title("Memory held after prefill")
        memory.margins(y=0.12)
        kl_axis(quality, max(row.kl for row in rows))
        quality.axhline(TARGET_KL, color="black", linewidth=0.8, linestyle=":")
        quality.set_ylabel("KL to the unfused model (nats per token)")
        quality.set_title("Cost: next-token distribution")
        legend_below(figure, 4)
        with replacing(path) as file:
            file.write_bytes(png(figure))
