"""When reading shared pages once is faster than the engine's own attention: measured on the machine, then applied."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from jointkv.attention.grouping import group_pages
from jointkv.attention.work import WorkList

ROWS, SHARERS, REPEATS = 8, 4, 5
DECODE_TOKENS, PROMPT_TOKENS = 512, 128

Prepare = Callable[[Tensor, Tensor, Tensor], Callable[[], object]]
"""Gets attention ready for (block tables `[rows, slots]`, lengths `[rows]`, query lengths `[rows]`), all int32."""


class Cost(NamedTuple):
    """Seconds that decode takes: for each page that is read, and for each block of a sequence that one serves."""

    per_page: float
    per_block: float

    def of(self, pages: int, blocks: int) -> float:
        """Seconds for `blocks` in `pages`."""
        return self.per_page * pages + self.per_block * blocks

    def __str__(self) -> str:
        return f"{1e6 * self.per_page:.2f} us a page and {1e6 * self.per_block:.2f} us a block"


@dataclass(frozen=True)
class Switch:
    """Which attention is faster for a step.

    Attributes:
        engine: what the engine's attention costs, which reads a page for every sequence; shared ones cost it less as
            well, because they stay in a cache.
        shared: what shared-page attention costs.
        prompts: whether it reads prompts at least as fast.
    """

    engine: Cost
    shared: Cost
    prompts: bool

    def pays(self, work: WorkList) -> bool:
        """Whether shared-page attention is expected to do `work` faster."""
        size = len(work.pages.page), len(work.entries.number)
        return self.shared.of(*size) < self.engine.of(*size) and (self.prompts or bool((work.query_lengths == 1).all()))

    def __str__(self) -> str:
        prompts = "faster" if self.prompts else "slower"
        return f"{self.shared}, against {self.engine} of the engine's attention; prompts are read {prompts}"


def measure(
    num_pages: int,
    block_size: int,
    longest: int,
    engine: Prepare,
    shared: Callable[[WorkList], object],
    heads_per_kv_head: int,
) -> Switch:
    """Time both attentions on pages of this pool, in turn: decode with and without sharing, and reading a prompt.

    Args:
        num_pages: of the pool. What they hold does not matter, and nothing is written.
        block_size: tokens per page.
        longest: tokens of a sequence at the most.
        engine: gets the engine's attention ready; what it returns is timed.
        shared: shared-page attention of a work list; timed.
        heads_per_kv_head: query heads that share a KV head.
    """
    slots = max(2, min(DECODE_TOKENS, longest) // block_size)
    apart = torch.arange(ROWS * slots, dtype=torch.int32).remainder(num_pages).view(ROWS, slots)
    alike = apart[torch.arange(ROWS) // SHARERS]
    lengths = torch.full((ROWS,), slots * block_size, dtype=torch.int32)
    decode, prompt = torch.ones_like(lengths), lengths[:1].clamp(max=PROMPT_TOKENS)

    def ours(tables: Tensor, asked: Tensor) -> Callable[[], object]:
        work = group_pages(
            tables,
            lengths[: len(tables)],
            block_size,
            query_lengths=asked,
            heads_per_kv_head=heads_per_kv_head,
        )
        return lambda: shared(work)

    alone, together, own_alone, own_together, prompt_taken, own_prompt_taken = _seconds(
        engine(apart, lengths, decode),
        engine(alike, lengths, decode),
        ours(apart, decode),
        ours(alike, decode),
        engine(apart[:1], lengths[:1], prompt),
        ours(apart[:1], prompt),
    )
    blocks = ROWS * slots
    return Switch(
        _cost(alone, together, blocks), _cost(own_alone, own_together, blocks), own_prompt_taken <= prompt_taken
    )


def _cost(alone: float, together: float, blocks: int) -> Cost:
    """From the time for `blocks` in as many pages, and for as many that `SHARERS` share each."""
    per_page = max(0.0, (alone - together) / (1 - 1 / SHARERS)) / blocks
    return Cost(per_page, max(0.0, alone / blocks - per_page))


def _seconds(*calls: Callable[[], object]) -> list[float]:
    """The median time of each, all taken in turn, after one run of each that does not count."""
    taken: list[list[float]] = [[] for _ in calls]
    for _ in range(REPEATS + 1):
        for call, times in zip(calls, taken, strict=True):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
    return [median(times[1:]) for times in taken]
