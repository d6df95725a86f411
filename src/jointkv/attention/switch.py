"""When reading shared pages once is faster than the engine's own attention: measured on the machine, then applied."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from jointkv.attention.grouping import group_pages
from jointkv.attention.work import WorkList

ROWS, SHARERS, REPEATS = 8, 4, 5
DECODE_TOKENS, PROMPT_TOKENS = 512, 128

Prepare = Callable[[Tensor, Tensor, Tensor], Callable[[], object]]
"""Gets attention ready for (block tables `[rows, slots]`, lengths `[rows]`, query lengths `[rows]`), all int32."""


@dataclass(frozen=True)
class Switch:
    """What a block of a sequence costs in decode, in seconds, and whether prompts are read faster as well.

    Attributes:
        engine: by the engine's attention, which reads the page for every sequence.
        per_page, per_block: by shared-page attention, for reading a page and for each sequence that uses it.
        prompts: whether shared-page attention reads prompts at least as fast as the engine does.
    """

    engine: float
    per_page: float
    per_block: float
    prompts: bool

    def pays(self, work: WorkList) -> bool:
        """Whether shared-page attention is expected to do `work` faster."""
        blocks, pages = len(work.entries.number), len(work.pages.page)
        decode_pays = self.per_page * pages + self.per_block * blocks < self.engine * blocks
        return decode_pays and (self.prompts or bool((work.query_lengths == 1).all()))

    def __str__(self) -> str:
        engine, page, block = (f"{1e6 * seconds:.2f}" for seconds in (self.engine, self.per_page, self.per_block))
        return (
            f"a block costs the engine's attention {engine} us, shared-page attention {page} us a page and {block} us "
            f"a block; prompts are read {'faster' if self.prompts else 'slower'}"
        )


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
        longest: tokens of a sequence at the most.
        engine, shared: the two.
    """
    slots = max(1, min(num_pages // ROWS, DECODE_TOKENS // block_size, longest // block_size))
    apart = torch.arange(ROWS * slots, dtype=torch.int32).remainder(num_pages).view(ROWS, slots)
    alike = apart[torch.arange(ROWS) // SHARERS]
    lengths = torch.full((ROWS,), slots * block_size, dtype=torch.int32)
    decode, prompt = torch.ones_like(lengths), lengths[:1].clamp(max=PROMPT_TOKENS)

    def ours(tables: Tensor, asked: Tensor, share: bool = True) -> Callable[[], object]:
        work = group_pages(
            tables,
            lengths[: len(tables)],
            block_size,
            query_lengths=asked,
            heads_per_kv_head=heads_per_kv_head,
            share=share,
        )
        return lambda: shared(work)

    stock, alone, together, prompt_stock, prompt_ours = _seconds(
        engine(apart, lengths, decode),
        ours(apart, decode, share=False),
        ours(alike, decode),
        engine(apart[:1], lengths[:1], prompt),
        ours(apart[:1], prompt),
    )
    blocks = ROWS * slots
    per_page = max(0.0, (alone - together) / (1 - 1 / SHARERS)) / blocks
    return Switch(stock / blocks, per_page, alone / blocks - per_page, prompt_ours <= prompt_stock)


def _seconds(*calls: Callable[[], object]) -> list[float]:
    """The median time of each, all taken in turn, after one run of each that does not count."""
    taken: list[list[float]] = [[] for _ in calls]
    for _ in range(REPEATS + 1):
        for call, times in zip(calls, taken, strict=True):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
    return [median(times[1:]) for times in taken]
