"""Random caches with near-duplicate blocks, and policies to fuse them by."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import strategies as st

from jointkv.core.blocks import PagedKV
from jointkv.core.plan import FusionPlan
from jointkv.core.pool import BlockPool
from jointkv.core.table import BlockTable
from jointkv.fusion.tree import plan_matrix
from jointkv.policy import FusionPolicy

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NOISES = (0.0, 1e-3, 0.03, 0.07, 0.1, 0.2, 0.3, 1.0)
"""Standard deviation of a block around its cluster's centre, whose entries have 1."""
PER_CHUNK = 2
"""Blocks in a chunk, in the chunk scope."""

Block = tuple[np.ndarray, np.ndarray]
"""K and V of one logical block as read, float64 `[layers, r]` each."""


RESIDENT = FusionPolicy(max_relative_error=0.3, max_token_error=None)
UNBOUNDED = {"max_relative_error": None, "max_token_error": None}
KEYS_ONLY = FusionPolicy(similarity="key", key_threshold=0.9, **UNBOUNDED)
DIRECTION = FusionPolicy(representative="direction", similarity="key", key_threshold=0.8, **UNBOUNDED)


@dataclass
class Case:
    """A filled table of `len(lengths)` requests; `place(slot)` says which blocks may be compared."""

    pool: BlockPool
    table: BlockTable
    lengths: list[int]
    policy: FusionPolicy
    generator: torch.Generator = dataclasses.field(repr=False)

    def place(self, row: int, slot: int) -> tuple[int, int]:
        return (-1, slot) if self.policy.scope == "batch" else (row, slot % PER_CHUNK)

    def entries(self) -> list[tuple[int, int]]:
        return [(row, slot) for row, length in enumerate(self.lengths) for slot in range(length)]

    def plans(self) -> list[FusionPlan]:
        """The plans of the policy's scope: one, or one per request."""
        width = -(-max(self.lengths) // PER_CHUNK) * PER_CHUNK
        pages = torch.full((len(self.lengths), width), -1)
        for row, length in enumerate(self.lengths):
            pages[row, :length] = self.table.pages[row, :length]
        rows = torch.arange(len(pages))[:, None].expand_as(pages)
        blocks = (pages, rows, torch.arange(width).expand_as(pages))
        if self.policy.scope == "batch":
            return [plan_matrix(self.pool.kv, *(part.T for part in blocks), self.policy)]
        by_row = zip(*blocks, strict=True)
        return [plan_matrix(self.pool.kv, *(part.view(-1, PER_CHUNK).T for part in one), self.policy) for one in by_row]

    def apply(self) -> list[FusionPlan]:
        plans = self.plans()
        for plan in plans:
            self.table.apply(plan)
        self.table.check_integrity()
        self.pool.check_integrity()
        return plans

    def read(self) -> dict[tuple[int, int], Block]:
        """Every block as attention would read it: the page's content times the scales, rounded to its dtype."""
        return {entry: read_block(self.table, *entry) for entry in self.entries()}

    def page(self, row: int, slot: int) -> int:
        return int(self.table.pages[row, slot])


def plan_position(kv: PagedKV, pages: torch.Tensor, policy: FusionPolicy) -> FusionPlan:
    """The plan for blocks `pages [n]` of one position, a row each."""
    return plan_matrix(kv, pages[None], torch.arange(len(pages))[None], torch.zeros(1, len(pages)).long(), policy)


def read_block(table: BlockTable, row: int, slot: int) -> Block:
    refs = [table.ref(row, slot, layer) for layer in range(table.pool.kv.num_layers)]
    sides = []
    for layers, scales in (
        (table.pool.kv.keys, [ref.k_scale for ref in refs]),
        (table.pool.kv.values, [ref.v_scale for ref in refs]),
    ):
        read = [layer[refs[0].page].float() * scale for layer, scale in zip(layers, scales, strict=True)]
        sides.append(torch.stack(read).to(layers[0].dtype).flatten(1).double().numpy())
    return sides[0], sides[1]


def write_block(pool: BlockPool, page: int, keys: torch.Tensor, values: torch.Tensor) -> None:
    """Write `[layers, r]` contents into a page."""
    for layers, content in ((pool.kv.keys, keys), (pool.kv.values, values)):
        for layer, vector in zip(layers, content, strict=True):
            layer[page] = vector.view(layer.shape[1:]).to(layer.dtype)


@dataclass(frozen=True)
class Texture:
    """How alike the blocks of a place are; `value_noise` is how much more the values differ than the keys."""

    clusters: int = 2
    noise: float = 0.1
    value_noise: float = 1.0
    spread: float = 0.0
    key_mean: float = 0.0
    zeros: float = 0.0


def make_case(
    seed: int,
    policy: FusionPolicy,
    lengths: list[int],
    texture: Texture,
    *,
    layers: int = 2,
    shape: tuple[int, int, int, int] = (2, 2, 4, 6),
    dtype: torch.dtype = torch.float32,
) -> Case:
    """Fill a table; `shape` is tokens, heads, K size, V size. The same arguments give the same case."""
    generator = torch.Generator().manual_seed(seed)
    tokens, heads, key_size, value_size = shape
    pool = BlockPool(layers, tokens, (heads, key_size), (heads, value_size), dtype=dtype)
    table = BlockTable(pool, len(lengths))
    table.extend(torch.tensor(lengths))
    held = table.pages >= 0  # pages in no order
    table.pages[held] = table.pages[held][torch.randperm(int(held.sum()), generator=generator)]
    case = Case(pool, table, lengths, policy, generator)
    sizes = (tokens * heads * key_size, tokens * heads * value_size)
    centres: dict[object, list[torch.Tensor]] = {}
    for row, slot in case.entries():
        cluster = (case.place(row, slot), int(torch.randint(texture.clusters, (), generator=generator)))
        if cluster not in centres:
            centres[cluster] = [torch.randn(layers, size, generator=generator) for size in sizes]
            centres[cluster][0] += texture.key_mean
        magnitude = math.exp(texture.spread * float(torch.randn((), generator=generator)))
        if torch.rand((), generator=generator) < texture.zeros:
            magnitude = 0.0
        noises = [texture.noise * torch.randn(layers, size, generator=generator) for size in sizes]
        noises[1] *= texture.value_noise
        # "+ 0.0" makes -0.0 a 0.0: zero blocks are then equal bit by bit.
        sides = [(c + n) * magnitude + 0.0 for c, n in zip(centres[cluster], noises, strict=True)]
        write_block(pool, case.page(row, slot), *sides)
    return case


BOUNDS = [0.0, 0.02, 0.1, 0.3, 0.5, 1.0]
THRESHOLDS = [0.3, 0.5, 0.8, 0.9, 0.99]


def often_none(values: list[float]) -> st.SearchStrategy[float | None]:
    return st.sampled_from([None] * len(values) + values)


@st.composite
def policies(draw: st.DrawFn, representative: str | None = None, scope: str | None = None) -> FusionPolicy:
    """Policies of one layer group, of every kind that makes sense."""
    representative = representative or draw(st.sampled_from(["resident", "direction"]))
    value = draw(often_none(THRESHOLDS))
    bound = draw(st.sampled_from([None, *BOUNDS]))
    needs_key = representative == "direction" or bound is None
    return FusionPolicy(
        similarity="key" if value is None else "key_value",
        key_threshold=draw(st.sampled_from(THRESHOLDS) if needs_key else often_none(THRESHOLDS)),
        value_threshold=value,
        max_relative_error=bound,
        max_token_error=draw(often_none(BOUNDS)),
        across_layers=draw(st.sampled_from(["rms", "max"])),
        representative=representative,
        scope=scope or draw(st.sampled_from(["batch", "chunk"])),
        chunk_tokens=draw(st.just(PER_CHUNK)),
    )


@st.composite
def textures(draw: st.DrawFn) -> Texture:
    return Texture(
        clusters=draw(st.sampled_from([1, 1, 2, 3])),
        noise=draw(st.sampled_from(NOISES)),
        value_noise=draw(st.sampled_from([1.0, 3.0])),
        spread=draw(st.sampled_from([0.0, 0.05, 0.7])),
        key_mean=draw(st.sampled_from([0.0, 2.0])),
        zeros=draw(st.sampled_from([0.0, 0.0, 0.0, 0.2])),
    )


@st.composite
def cases(draw: st.DrawFn, policy: st.SearchStrategy[FusionPolicy] | None = None) -> Case:
    """Ragged requests of near-duplicate blocks in every supported dtype, and a policy."""
    tokens = draw(st.sampled_from([1, 2, 4]))
    chosen = draw(policies() if policy is None else policy)
    chosen = FusionPolicy.preset("safe", **{**vars(chosen), "chunk_tokens": PER_CHUNK * tokens})
    batch = chosen.scope == "batch"
    lengths = draw(
        st.lists(st.sampled_from([0, 1, 2, 2, 3]), min_size=2, max_size=9)
        if batch
        else st.lists(st.integers(3, 11), min_size=1, max_size=2)
    )
    shape = (tokens, draw(st.integers(1, 2)), draw(st.sampled_from([2, 4, 8])), draw(st.sampled_from([3, 8])))
    return make_case(
        draw(st.integers(0, 2**16)),
        chosen,
        lengths,
        draw(textures()),
        layers=draw(st.integers(1, 4)),
        shape=shape,
        dtype=draw(st.sampled_from(DTYPES)),
    )


def members_of(plan: FusionPlan) -> list[tuple[int, int]]:
    return list(zip(plan.row.tolist(), plan.slot.tolist(), strict=True))


def assert_same_plan(first: FusionPlan, second: FusionPlan) -> None:
    for name in (entry.name for entry in dataclasses.fields(FusionPlan)):
        one, other = getattr(first, name), getattr(second, name)
        assert (one is None) == (other is None), name
        assert one is None or torch.equal(one, other), name
