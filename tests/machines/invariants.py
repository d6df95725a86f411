"""What must hold after every step, computed from the tables, the pages and what was written, and from nothing else."""

from __future__ import annotations

import torch
from torch import Tensor

from jointkv.core.pool import NULL_PAGE
from jointkv.policy import FusionPolicy
from tests.machines.contexts import ROOT
from tests.machines.serving import BLOCK, ROUNDING, Server


def check_counts(server: Server) -> None:
    """References are table entries, free and used pages add up, and no page is both."""
    pool = server.blocks
    server.pool.check_integrity()
    pool.collect_dropped()
    server.pool.check_integrity()
    held = torch.cat([torch.zeros(0, dtype=torch.long), *(t.held() for b in server.holders for t in b.cache.tables)])
    assert torch.equal(pool.references, held.bincount(minlength=pool.num_pages + 1))
    free, used = pool._free[: pool.num_free].tolist(), held.unique().tolist()
    assert len(free) + len(used) == pool.num_pages and not set(free) & set(used) and NULL_PAGE not in free + used
    assert pool.max_pages is None or pool.num_pages <= pool.max_pages
    for batch in server.holders:
        blocks = torch.tensor([-(-len(row) // pool.block_size) for row in batch.contexts])
        for table in batch.cache.tables:
            table.check_integrity()
            assert torch.equal(table.num_blocks(), blocks)
    for layer in (*pool.kv.keys, *pool.kv.values):
        assert not layer[NULL_PAGE].any()


def check_isolation(server: Server) -> dict[int, tuple[str, int]]:
    """No page is read by two tenants, in two layer groups, or in batch scope at two positions; who holds which."""
    owner: dict[int, tuple[str, int]] = {}
    position: dict[int, int] = {}
    for batch in server.holders:
        for group, table in enumerate(batch.cache.tables):
            for row, pages in enumerate(table.pages.tolist()):
                for slot, page in enumerate(pages):
                    if page >= 0:
                        assert owner.setdefault(page, (batch.tenants[row], group)) == (batch.tenants[row], group)
                        if server.pool.policy.scope == "batch":
                            assert position.setdefault(page, slot) == slot
    return owner


def check_indices(server: Server, owner: dict[int, tuple[str, int]]) -> None:
    """What an index says of a page is true of what the page holds now, and of who holds it."""
    kv = server.blocks.kv
    for fuser in server.pool.fusers.values():
        entries = (fuser.index._page >= 0).nonzero()[:, 0]
        pages = fuser.index._page[entries]
        assert torch.allclose(fuser.signature(kv, pages), fuser.index._signature[entries], atol=1e-4)
        for entry, page in zip(entries.tolist(), pages.tolist(), strict=True):
            _, tenant, *_, group, _ = fuser.index._bucket_of[entry]  # type: ignore[misc]
            assert owner[page] == (tenant, group)
    server.prefixes.check_integrity()
    layers = server.pool.groups.layers
    for page, (((tenant, group), _),) in server.prefixes._buckets.items():  # type: ignore[misc]
        assert owner[page] == (tenant, group)
    for group in range(server.pool.groups.count):
        known = [page for page in server.exact if page in server.prefixes and owner[page][1] == group]
        written = torch.tensor([server.exact[page] for page in known], dtype=torch.long).view(-1, BLOCK)
        for side, paged in zip(server.contexts.sides, (kv.keys, kv.values), strict=True):
            expected = side[written][:, :, group * layers : (group + 1) * layers].unbind(2)
            for layer, own in zip(paged, expected, strict=True):
                read = layer[torch.tensor(known, dtype=torch.long)]
                assert ((read == own) | (read.isnan() & own.isnan())).all(), "an approximate page for an exact hash"


def check_contents(server: Server, policy: FusionPolicy) -> None:
    """Every block reads what was written: to the bit, or, where its table says that it is served, within the bounds."""
    kv, layers = server.blocks.kv, server.pool.groups.layers
    for group in range(server.pool.groups.count):
        parts = [_entries(server, number, group) for number in range(len(server.holders))]
        pages, contexts, whole, flagged, scales = (torch.cat(part, part[0].dim() - 1) for part in _columns(parts))
        present = (contexts != ROOT).T
        for side, (written, paged) in enumerate(zip(server.contexts.sides, (kv.keys, kv.values), strict=True)):
            own = written[:, group * layers : (group + 1) * layers][contexts.T.clamp(min=0)]
            read = torch.stack([layer[pages] for layer in paged])
            read = torch.where(
                (scales[side] == 1)[..., None, None, None],
                read,
                (read.float() * scales[side][..., None, None, None]).to(read.dtype),
            )
            own = own.permute(2, 0, 1, 3, 4)
            same = (own == read) | (own.isnan() & read.isnan())
            assert (same.flatten(3).all(-1).all(0) | ~present)[~flagged].all(), "a block of its own has changed"
            _check_bounds(own[:, flagged], read[:, flagged], present[flagged], whole[flagged], policy, group)


def _columns(parts: list[tuple[Tensor, ...]]) -> list[tuple[Tensor, ...]]:
    return [tuple(column) for column in zip(*parts, strict=True)]


def _entries(server: Server, number: int, group: int) -> tuple[Tensor, ...]:
    """Of each block of a batch: page `[n]`, contexts `[t, n]`, whether whole and whether served `[n]`, scales."""
    batch = server.holders[number]
    contexts, layers = batch.blocks(), server.pool.groups.layers
    if not batch.cache.tables:
        none = torch.zeros(0, dtype=torch.bool)
        return none.long(), torch.zeros(contexts.shape[2], 0).long(), none, none, torch.ones(2, layers, 0)
    table = batch.cache.tables[group]
    row, slot = (contexts != ROOT).any(2).nonzero(as_tuple=True)
    whole = torch.tensor([entry not in batch.cut for entry in zip(row.tolist(), slot.tolist(), strict=True)]).bool()
    scales = torch.ones(2, layers, len(row))
    if table.k_scale is not None and table.v_scale is not None:
        scales = torch.stack((table.k_scale[:, row, slot], table.v_scale[:, row, slot]))
    flagged = table.served[row, slot] | table.scaled(row, slot)
    return table.pages[row, slot], contexts[row, slot].T, whole, flagged, scales


def _check_bounds(own: Tensor, read: Tensor, present: Tensor, whole: Tensor, policy: FusionPolicy, group: int) -> None:
    """Relative errors over the layers, by definition, in float64; a NaN is outside every bound."""
    squares = (x.double().square().flatten(3).sum(-1) for x in (own, read.double() - own.double()))
    norm, apart = (torch.where(present, x, 0.0) for x in squares)

    def error(difference: Tensor, size: Tensor) -> Tensor:
        ratio = torch.where(difference == 0, 0.0, difference / size)
        return (ratio.mean(0) if policy.across_layers == "rms" else ratio.amax(0)).sqrt()

    block, token = error(apart.sum(-1), norm.sum(-1)), error(apart, norm)
    bound, token_bound = (policy.threshold(name, group) for name in ("max_relative_error", "max_token_error"))
    if bound is not None:
        assert (block[whole] <= bound + ROUNDING).all(), "a block is outside its bound"
    if token_bound is not None:
        assert (token <= token_bound + ROUNDING).all(), "a token is outside its bound"
