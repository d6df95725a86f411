"""Batches that read pages in every way: shared by the tests of grouping and of the kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from jointkv.attention.grouping import group_pages
from jointkv.attention.layouts import PAIRS, LayerPages, Order
from jointkv.attention.reference import paged_attention as by_definition
from jointkv.attention.work import WorkList
from jointkv.core.plan import BlockRef
from tests.attention.rotary import rotary_turn

TOLERANCE = {torch.float32: 3e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}
"""Relative error against float64. Logits here reach 100: rounded to float32 that is 1e-5 in a probability."""

FREQUENCIES = 100.0 ** (-torch.arange(8, dtype=torch.float64) / 8)


def turn(query: Tensor, positions: Tensor) -> Tensor:
    """Partial rotary embedding of any head size."""
    return rotary_turn(query, positions, FREQUENCIES)


@dataclass
class Batch:
    """Block tables, and which tokens they read."""

    tables: Tensor
    lengths: Tensor
    query_lengths: Tensor
    block_size: int
    first: Tensor | None
    count: Tensor | None
    shift: Tensor | None
    k_scale: Tensor | None
    v_scale: Tensor | None

    def group(self, **options: Any) -> WorkList:
        parts = {name: getattr(self, name) for name in ("query_lengths", "first", "count", "shift")}
        return group_pages(self.tables, self.lengths, self.block_size, **parts, **options)

    def references(self) -> list[list[BlockRef]]:
        """What the definition of attention takes."""
        tables = []
        for row, length in enumerate(self.lengths.tolist()):
            refs: list[BlockRef] = []
            left = length
            for slot in range(self.tables.shape[1]):
                if not left:
                    break
                at = (row, slot)
                first = 0 if self.first is None else int(self.first[at])
                held = self.block_size - first if self.count is None else int(self.count[at])
                held = min(held, left)
                left -= held
                refs.append(
                    BlockRef(
                        int(self.tables[at]),
                        1.0 if self.k_scale is None else float(self.k_scale[at]),
                        1.0 if self.v_scale is None else float(self.v_scale[at]),
                        0 if self.shift is None else int(self.shift[at]),
                        first,
                        held,
                    )
                )
            tables.append(refs)
        return tables


def sharing(draw: Any, rows: int, slots: int, generator: torch.Generator) -> tuple[Tensor, int]:
    """Block tables `[rows, slots]` in which pages are shared in some way, and how many pages there are."""
    kind = draw(st.sampled_from(["nothing", "prefix", "groups", "anything", "one page"]), label="sharing")
    own = torch.arange(rows * slots).view(rows, slots)
    pages = rows * slots
    if kind == "prefix":
        own[:, : slots // 2 + 1] = own[0, : slots // 2 + 1].clone()
    elif kind == "groups":
        size = draw(st.integers(2, 4))
        own = own[torch.arange(rows) // size * size]
    elif kind == "anything":
        pages = draw(st.integers(1, max(1, pages // 2)))
        own = torch.randint(pages, (rows, slots), generator=generator)
    elif kind == "one page":
        own = torch.zeros_like(own)
    return torch.randperm(pages, generator=generator)[own], pages


@st.composite
def batches(draw: Any, most_rows: int = 6, most_slots: int = 6, plain: bool = False) -> tuple[Batch, int]:
    """A batch, and how many pages its pool has; `plain` ones have no ranges, shifts or scales."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    rows, slots = draw(st.integers(1, most_rows)), draw(st.integers(1, most_slots))
    block_size = draw(st.sampled_from([1, 4, 5, 8, 16, 32]), label="block size")
    tables, pages = sharing(draw, rows, slots, generator)
    ranged, shifted, scaled = (not plain and draw(st.booleans()) for _ in range(3))
    first = count = shift = k_scale = v_scale = None
    held = torch.full((rows, slots), block_size)
    if ranged:
        partly = torch.rand(rows, slots, generator=generator) < 0.4
        first = torch.randint(block_size, (rows, slots), generator=generator) * partly
        count = block_size - first
        count -= (torch.rand(rows, slots, generator=generator) * count).long() * partly
        held = count
    if shifted:
        shift = torch.tensor([0, 0, 3, -40])[torch.randint(4, (rows, slots), generator=generator)]
    if scaled:
        k_scale, v_scale = torch.rand(2, rows, slots, generator=generator) * 2 + 0.25
    most = held.sum(1)
    lengths = (torch.rand(rows, generator=generator) * most).long() + 1
    query_lengths = torch.ones_like(lengths)
    if draw(st.booleans(), label="prefill"):
        query_lengths = (torch.rand(rows, generator=generator) * lengths).long() + 1
    return Batch(tables, lengths, query_lengths, block_size, first, count, shift, k_scale, v_scale), pages


def stored(dense: Tensor, order: Order) -> tuple[Tensor, ...]:
    """K or V `[pages, t, h, d]` in memory as `order` wants it: as keys, and as values."""
    if order == "rows":
        return dense, dense
    if order == "columns":
        return dense.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2), dense.transpose(1, 2).contiguous().transpose(
            1, 2
        )
    by_head = dense.transpose(1, 2)
    keys = by_head.unflatten(3, (-1, 2)).unflatten(2, (-1, PAIRS)).transpose(3, 4).contiguous()
    values = by_head.unflatten(3, (-1, PAIRS)).unflatten(2, (-1, 2)).permute(0, 1, 4, 2, 5, 3).contiguous()
    return keys, values


def fill(batch: Batch, pages: int, heads: int, sizes: tuple[int, int], dtype: torch.dtype, order: Order, seed: int):
    """A layer's pages in which only the tokens that are read are numbers."""
    generator = torch.Generator().manual_seed(seed)
    read = torch.zeros(pages, batch.block_size, dtype=torch.bool)
    for ref in (ref for table in batch.references() for ref in table):
        read[ref.page, ref.first : ref.first + ref.count] = True
    parts = []
    for side, size in enumerate(sizes):
        dense = torch.randn(pages, batch.block_size, heads, size, generator=generator)
        dense[~read] = torch.nan
        parts.append(stored(dense.to(dtype), order)[side])
    return LayerPages(*parts, order)


def expected(query: Tensor, pages: LayerPages, batch: Batch, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """By definition, in float64."""
    keys, values = (part.double() for part in pages.read())
    lengths = batch.query_lengths.tolist()
    return by_definition(query.double(), lengths, keys, values, batch.references(), scale=scale, turn=turn)


def relative_error(found: Tensor, truth: Tensor) -> float:
    """The largest over queries and heads."""
    apart = torch.linalg.vector_norm(found.double() - truth, dim=-1)
    return float((apart / torch.linalg.vector_norm(truth, dim=-1)).max())


def compare(found: tuple[Tensor, Tensor], truth: tuple[Tensor, Tensor], dtype: torch.dtype) -> None:
    assert relative_error(found[0], truth[0]) < TOLERANCE[dtype]
    torch.testing.assert_close(found[1].double(), truth[1].double(), rtol=1e-4, atol=1e-4)


def long_batch(rows: int = 24, slots: int = 40, shared: int = 30, queries: int = 1) -> tuple[Batch, int]:
    """Contexts of which `shared` pages are the same, and how many pages there are."""
    tables = torch.arange(rows * slots).view(rows, slots)
    tables[:, :shared] = torch.arange(shared)
    lengths = torch.randint((slots - 2) * 16, slots * 16, (rows,), generator=torch.Generator().manual_seed(0))
    asked = torch.full((rows,), queries)
    return Batch(tables, lengths, asked, 16, None, None, None, None, None), rows * slots


def repeating_batch(scaled: bool, shifted: bool) -> Batch:
    """Two sequences that read pages several times each, of 10 pages."""
    tables = torch.tensor([[7, 7, 3, 7, 9], [7, 3, 3, 9, 8]])
    ones = torch.ones(2, dtype=torch.long)
    batch = Batch(tables, torch.tensor([70, 80]), ones, 16, None, None, None, None, None)
    if scaled:
        batch.k_scale, batch.v_scale = torch.rand(2, 2, 5) + 0.5
    if shifted:
        batch.shift = torch.tensor([[0, 5, 5, 0, 0], [5, 0, 5, 0, 0]])
    return batch


def small_case(order: Order = "rows", dtype: torch.dtype = torch.float32) -> tuple[Batch, LayerPages]:
    """Two sequences that share a page, and their pages of two heads."""
    tables = torch.tensor([[0, 1, 2], [0, 3, 4]])
    batch = Batch(tables, torch.tensor([40, 48]), torch.ones(2, dtype=torch.long), 16, None, None, None, None, None)
    return batch, fill(batch, 5, 2, (16, 32), dtype, order, 0)


SCALES = torch.ones(2, 3)

REFUSED: dict[str, dict[str, Tensor]] = {
    "queries without heads": {"query": torch.zeros(2, 16)},
    "queries in float64": {"query": torch.zeros(2, 4, 16, dtype=torch.float64)},
    "queries of another size": {"query": torch.zeros(2, 4, 32)},
    "too few queries": {"query": torch.zeros(1, 4, 16)},
    "query heads no multiple": {"query": torch.zeros(2, 3, 16)},
    "more query heads than the work was cut for": {"query": torch.zeros(2, 8, 16)},
    "K scales of another shape": {"k_scale": torch.ones(2, 2)},
    "V scales of another shape": {"v_scale": torch.ones(6)},
    "a scale of zero": {"k_scale": SCALES * torch.tensor([1.0, 0.0, 1.0])},
    "a negative scale": {"v_scale": SCALES * torch.tensor([1.0, -1.0, 1.0])},
    "a scale that is infinite": {"k_scale": SCALES * torch.inf},
    "a scale that is no number": {"v_scale": SCALES * torch.nan},
    "scales that are integers": {"k_scale": torch.ones(2, 3, dtype=torch.long)},
}
"""Changes to a call with `small_case`, `SCALES` and queries `[2, 4, 16]`."""
