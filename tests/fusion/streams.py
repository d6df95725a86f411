"""A stream of near-duplicate requests through a `Fuser`, and a digest of everything that was decided."""

from __future__ import annotations

import dataclasses
import hashlib

import torch

from jointkv.core.pool import BlockPool
from jointkv.core.table import BlockTable
from jointkv.fusion.fuser import Fuser, NewBlocks
from jointkv.policy import FusionPolicy
from tests.fusion.strategies import write_block

LAYERS, TOKENS, SHAPE, BLOCKS = 2, 4, (1, 8), 3


def digest_of_a_stream(kind: str) -> str:
    """The same in every process, whatever the order of its sets."""
    generator = torch.Generator().manual_seed(0)
    thresholds = {"key_threshold": 0.9, "value_threshold": 0.9} if kind == "direction" else {}
    pool = BlockPool(LAYERS, TOKENS, SHAPE, SHAPE)
    fuser = Fuser(pool, FusionPolicy(representative=kind, candidates="both", **thresholds))  # type: ignore[arg-type]
    centres = torch.randn(BLOCKS, 2, LAYERS, TOKENS * SHAPE[1], generator=generator)
    tables, digest = [], hashlib.sha256()
    for number in range(12):
        table = BlockTable(pool, 2)
        table.extend(torch.tensor([BLOCKS, BLOCKS]))
        tables.append(table)
        row, slot = (table.pages >= 0).nonzero(as_tuple=True)
        for entry in zip(row.tolist(), slot.tolist(), strict=True):
            noise = 0.08 * torch.randn(2, LAYERS, TOKENS * SHAPE[1], generator=generator)
            write_block(pool, int(table.pages[entry]), *(centres[entry[1]] + noise))
        keys = [(tenant, place) for tenant in ("alice", "bob") for place in range(BLOCKS)]
        plan = fuser.fuse(table, NewBlocks(row, slot, keys, row * BLOCKS + slot, slot))
        for field in dataclasses.fields(plan):
            part = getattr(plan, field.name)
            digest.update(b"none" if part is None else part.numpy().tobytes())
        digest.update(table.pages.numpy().tobytes())
        if number % 4 == 3:
            tables.pop(0)
    return f"{sum(fuser.counters.values())} {digest.hexdigest()}"
