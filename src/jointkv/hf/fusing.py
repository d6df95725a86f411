"""Fusing the blocks of a batch that a forward pass has filled."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from jointkv.fusion.fuser import NewBlocks
from jointkv.fusion.signature import token_hashes
from jointkv.hf.batch import Batch


def fuse_filled(batch: Batch, observe: bool) -> None:
    """Fuse the blocks of `batch` that became full since the last call, in every scope; changes its tables.

    Args:
        observe: compare what was fused with the pool's profile, which stands for prompts.
    """
    pool = batch.pool
    row, slot = batch.newly_full()
    if not pool.fusers or not len(row):
        return
    tokens = _hashes(batch, row, slot)
    for scope, fuser in pool.fusers.items():
        for group, table in enumerate(batch.tables):
            if pool.groups.fused[group]:
                keys, which = _buckets(batch, scope, group, row, slot)
                plan = fuser.fuse(table, NewBlocks(row, slot, keys, which, tokens), group)
                if observe:
                    pool.observe(group, len(row), plan)


def _buckets(batch: Batch, scope: str, group: int, row: Tensor, slot: Tensor) -> tuple[list[Hashable], Tensor]:
    """Buckets of blocks: equal positions of one tenant, or equal places in the chunks of one request."""
    names: list[tuple[Hashable, ...]]
    if scope == "chunk":
        owner, slot = row, slot % (batch.pool.policy.chunk_tokens // batch.pool.block_size)
        names = [("chunk", *request) for request in zip(batch.tenants, batch.sequence.tolist(), strict=True)]
    else:
        number = {tenant: index for index, tenant in enumerate(dict.fromkeys(batch.tenants))}
        owner, names = torch.tensor([number[tenant] for tenant in batch.tenants])[row], [("batch", t) for t in number]
    pairs, which = torch.stack((owner, slot), 1).unique(dim=0, return_inverse=True)
    return [(*names[index], group, place) for index, place in pairs.tolist()], which


def _hashes(batch: Batch, row: Tensor, slot: Tensor) -> Tensor | None:
    """Of the tokens of each block, where they are known."""
    if batch.tokens is None:
        return None
    size = batch.pool.block_size
    column = batch.padding[row, None] + slot[:, None] * size + torch.arange(size)
    return token_hashes(batch.tokens[row[:, None], column], size).squeeze(-1)
