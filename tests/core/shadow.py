"""What blocks read, for comparison with what was written, and how far it may be off: shared by the tests."""

from collections.abc import Iterable

import numpy as np
import torch

from jointkv.core.plan import BlockRef
from jointkv.core.pool import BlockPool
from jointkv.core.table import BlockTable

Content = tuple[torch.Tensor, torch.Tensor]
State = list[tuple[tuple[int, int], list[BlockRef]]]


def read_block(pool: BlockPool, table: BlockTable, row: int, slot: int) -> Content:
    """K and V `[layers, t, h, d]` that a logical block reads: its page's content times its scales."""
    sides = []
    for side, layers in enumerate((pool.kv.keys, pool.kv.values)):
        refs = [table.ref(row, slot, layer) for layer in range(table.pool.kv.num_layers)]
        scales = [(ref.k_scale, ref.v_scale)[side] for ref in refs]
        pages = zip(layers, refs, scales, strict=True)
        sides.append(torch.stack([layer[ref.page] * scale for layer, ref, scale in pages]))
    return sides[0], sides[1]


def same(first: Content, second: Content) -> bool:
    return all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def entries_of(table: BlockTable) -> list[tuple[int, int]]:
    return [(row, slot) for row, slot in (table.pages >= 0).nonzero().tolist()]


def state_of(table: BlockTable) -> State:
    """Every block of the table with its references, one per layer."""
    layers = range(table.pool.kv.num_layers)
    return [(entry, [table.ref(*entry, layer) for layer in layers]) for entry in entries_of(table)]


def naive_error(block: Iterable[np.ndarray], served: Iterable[np.ndarray], aggregate: str) -> float:
    """Relative error of one side over the layers, by definition, on float64 vectors."""
    squares = []
    for own, read in zip(block, served, strict=True):
        difference, norm = ((own - read) ** 2).sum(), (own**2).sum()
        squares.append(0.0 if difference == 0 else np.inf if norm == 0 else difference / norm)
    return float(np.sqrt(np.mean(squares) if aggregate == "rms" else np.max(squares)))


def naive_token_error(block: np.ndarray, served: np.ndarray, tokens: int, aggregate: str) -> float:
    """The worst relative error of a single token, of `[layers, r]` whose `r` numbers are `tokens` tokens."""
    blocks, reads = (side.reshape(len(side), tokens, -1) for side in (block, served))
    return max(naive_error(blocks[:, token], reads[:, token], aggregate) for token in range(tokens))
