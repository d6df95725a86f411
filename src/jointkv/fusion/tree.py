"""Tree Fast-Fusion (paper, Algorithm 1) over a batch or over the chunks of one request, with a bound per member."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import torch
from torch import Tensor

from jointkv.core.blocks import PagedKV, ServedErrors, served_errors
from jointkv.core.plan import FusionPlan
from jointkv.errors import InvalidPolicy, LayoutError
from jointkv.fusion.direction import shared_directions
from jointkv.fusion.merge import merge_directions, merge_resident
from jointkv.fusion.pairs import PairStatistics, pair_statistics, position_chunks
from jointkv.policy import FusionPolicy

GRAM_SLACK = 1e-5
"""Room for float32 rounding when squared errors come from a Gram matrix; the bound itself is checked exactly."""

ROUNDS = 4
"""Blocks that fail the exact check of one round are grouped again among themselves, this often at the most."""


def plan_batch(kv: PagedKV, tables: Mapping[Hashable, Tensor], policy: FusionPolicy, group: int = 0) -> FusionPlan:
    """Fuse the full blocks of several requests at equal positions (batch scope, BFF).

    Args:
        kv: the pages.
        tables: per request the pages of its full blocks, `[blocks]`; lengths may differ.
        policy: what may be fused; `group` selects its thresholds.

    Returns:
        A plan whose rows number the requests in the order of their names (`name_order`): the order of the mapping
        plays no part. Slots are positions in the request's own table.
    """
    names = sorted(tables, key=name_order)
    longest = max((len(tables[name]) for name in names), default=0)
    pages = torch.full((longest, len(names)), -1, dtype=torch.long)
    for column, name in enumerate(names):
        pages[: len(tables[name]), column] = tables[name].cpu()
    rows = torch.arange(len(names)).expand_as(pages)
    slots = torch.arange(longest)[:, None].expand_as(pages)
    return plan_matrix(kv, pages, rows, slots, policy, group)


def name_order(name: Hashable) -> tuple[str, float, str]:
    """Sorts names of any type: by type, then numbers by value and all others by text."""
    return type(name).__name__, name if isinstance(name, int | float) else 0, str(name)


def plan_chunks(kv: PagedKV, pages: Tensor, policy: FusionPolicy, group: int = 0, *, row: int = 0) -> FusionPlan:
    """Fuse the full blocks of one request's chunks at equal places in the chunk (chunk scope, CFF).

    Args:
        pages: the pages of the request's full blocks, `[blocks]`; the last chunk may be shorter.

    Raises:
        InvalidPolicy: `policy.chunk_tokens` is no multiple of the block size.
    """
    per_chunk, remainder = divmod(policy.chunk_tokens, kv.block_size)
    if remainder:
        raise InvalidPolicy(f"chunk_tokens: {policy.chunk_tokens} is no multiple of the block size {kv.block_size}")
    chunks = -(-len(pages) // per_chunk)
    padded = torch.nn.functional.pad(pages.cpu(), (0, chunks * per_chunk - len(pages)), value=-1)
    slots = torch.arange(chunks * per_chunk).view(chunks, per_chunk).T
    rows = torch.full_like(slots, row)
    return plan_matrix(kv, padded.view(chunks, per_chunk).T, rows, slots, policy, group)


def plan_matrix(
    kv: PagedKV, pages: Tensor, rows: Tensor, slots: Tensor, policy: FusionPolicy, group: int = 0
) -> FusionPlan:
    """Fuse, within each line of `pages [P, N]` (-1: no block), the blocks that are alike.

    Args:
        rows, slots: which logical block each entry is, `[P, N]`.

    Raises:
        LayoutError: the shapes differ.
    """
    if not pages.shape == rows.shape == slots.shape or pages.dim() != 2:
        raise LayoutError(f"pages, rows and slots must share one shape [P, N], got {list(pages.shape)}")
    if not policy.enabled or pages.shape[1] < 2:
        return FusionPlan.empty()
    if policy.representative == "direction":
        leader = _leaders(kv, pages, policy, group)
        return _plan_directions(kv, pages, rows, slots, leader, policy, group)
    rounds: list[FusionPlan] = []
    left = pages
    while len(rounds) < ROUNDS and len(left):
        leader = _leaders(kv, left, policy, group)
        plan, left = _plan_resident(kv, left, rows, slots, leader, policy, group)
        rounds.append(plan)
        several = (left >= 0).sum(1) > 1
        left, rows, slots = left[several], rows[several], slots[several]
    return FusionPlan.join(rounds)


def _leaders(kv: PagedKV, pages: Tensor, policy: FusionPolicy, group: int) -> Tensor:
    parts = [
        group_blocks(pair_statistics(kv, pages[part], policy, group), policy, group).cpu()
        for part in position_chunks(*pages.shape)
    ]
    return torch.cat(parts) if parts else pages


def group_blocks(pairs: PairStatistics, policy: FusionPolicy, group: int) -> Tensor:
    """The leader of each block's group, `[P, N]` long; a block that fits nowhere leads itself."""
    allowed = _alike(pairs, policy, group)
    leader = torch.arange(allowed.shape[1], device=allowed.device).expand(allowed.shape[:2]).contiguous()
    # Where no earlier block may serve a later one there is nothing to merge: most positions of unrelated traffic.
    lines = allowed.tril(-1).flatten(1).any(1)
    if not lines.any():
        return leader
    pairs, allowed = pairs.take(lines), allowed[lines]
    if policy.representative == "direction":
        thresholds = [policy.threshold(name, group) or 0.0 for name in ("key_threshold", "value_threshold")]
        assert pairs.key_cosine is not None
        merged = merge_directions(pairs.key_cosine, pairs.value_cosine, pairs.valid, *thresholds)
    else:
        score = pairs.key_cosine if pairs.error is None else -pairs.error
        assert score is not None
        merged = merge_resident(allowed, score, pairs.valid)
    leader[lines] = merged
    return leader


def _alike(pairs: PairStatistics, policy: FusionPolicy, group: int) -> Tensor:
    """Which pairs pass every test of the policy: `[P, N, N]` bool; entry `[i, j]`: block `j` may serve block `i`."""
    alike = pairs.valid[:, :, None] & pairs.valid[:, None, :]
    for cosine, name in ((pairs.key_cosine, "key_threshold"), (pairs.value_cosine, "value_threshold")):
        threshold = policy.threshold(name, group)
        if cosine is not None and threshold is not None:
            alike &= cosine >= threshold
    bound = policy.threshold("max_relative_error", group)
    if pairs.error is not None and bound is not None:
        alike &= pairs.error <= bound**2 + GRAM_SLACK
    return alike


def _plan_resident(
    kv: PagedKV, pages: Tensor, rows: Tensor, slots: Tensor, leader: Tensor, policy: FusionPolicy, group: int
) -> tuple[FusionPlan, Tensor]:
    """The plan of one round, and the blocks (-1: none) that their leader may not serve but another one still may."""
    follows = (leader != torch.arange(pages.shape[1])) & (pages >= 0)
    old, new = pages[follows], pages.gather(1, leader)[follows]
    errors = served_errors(kv, old, new, policy.across_layers)
    keep = within_bound(errors, policy, group)
    key_error, value_error, token_error = errors.take(keep)
    left = torch.full_like(pages, -1)
    left[follows] = old.masked_fill(keep, -1)
    plan = FusionPlan(
        row=rows[follows][keep],
        slot=slots[follows][keep],
        old_page=old[keep],
        page=new[keep],
        key_error=key_error,
        value_error=value_error,
        token_error=token_error,
    )
    return plan, left


def _plan_directions(
    kv: PagedKV, pages: Tensor, rows: Tensor, slots: Tensor, leader: Tensor, policy: FusionPolicy, group: int
) -> FusionPlan:
    count = pages.shape[1]
    group_id = (leader + torch.arange(len(pages))[:, None] * count)[pages >= 0]
    _, group_id, size = group_id.unique(return_inverse=True, return_counts=True)
    shared = size[group_id] > 1
    if not shared.any():
        return FusionPlan.empty()
    old, row, slot = (entry[pages >= 0][shared] for entry in (pages, rows, slots))
    _, group_id = group_id[shared].unique(return_inverse=True)
    num_groups = int(group_id.max()) + 1
    found = shared_directions(kv, old, group_id, num_groups, policy.across_layers)
    keep = within_bound(found.errors, policy, group)
    keep &= torch.bincount(group_id[keep], minlength=num_groups)[group_id] > 1
    kept_groups, new_id = group_id[keep].unique(return_inverse=True)
    order = torch.arange(int(keep.sum()))
    first = torch.full((len(kept_groups),), len(order)).scatter_reduce(0, new_id, order, "amin")
    direction_page = old[keep][first]
    key_error, value_error, token_error = found.errors.take(keep)
    return FusionPlan(
        row=row[keep],
        slot=slot[keep],
        old_page=old[keep],
        page=direction_page[new_id],
        key_error=key_error,
        value_error=value_error,
        token_error=token_error,
        k_scale=found.k_scale[:, keep],
        v_scale=found.v_scale[:, keep],
        direction_page=direction_page,
        key_direction=found.keys[:, kept_groups],
        value_direction=found.values[:, kept_groups],
    )


def within_bound(errors: ServedErrors, policy: FusionPolicy, group: int) -> Tensor:
    """Which members meet the policy's bounds on K, on V and on every token; a NaN never does."""
    keep = errors.key.isfinite() & errors.value.isfinite()
    bound = policy.threshold("max_relative_error", group)
    if bound is not None:
        keep &= (errors.key <= bound) & (errors.value <= bound)
    token_bound = policy.threshold("max_token_error", group)
    return keep if token_bound is None else keep & (errors.token <= token_bound)
