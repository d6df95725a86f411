"""Tree Fast-Fusion (paper, Algorithm 1) over blocks that may be compared, with a bound per member."""

from __future__ import annotations

import torch
from torch import Tensor

from jointkv.core.blocks import PagedKV, served_errors
from jointkv.core.plan import FusionPlan
from jointkv.errors import LayoutError
from jointkv.fusion.direction import shared_directions
from jointkv.fusion.pairs import pair_statistics, position_chunks
from jointkv.policy import FusionPolicy
from jointkv.policy.rule import NOT_ASKED, Rule

ROUNDS = 4
"""Blocks that fail the exact check of one round are grouped again among themselves, this often at the most."""


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
    rule = policy.rule(group)
    if rule.shares_directions:
        return _plan_directions(kv, pages, rows, slots, rule)
    rounds: list[FusionPlan] = []
    left = pages
    while len(rounds) < ROUNDS and len(left):
        plan, left = _plan_resident(kv, left, rows, slots, rule)
        rounds.append(plan)
        several = (left >= 0).sum(1) > 1
        left, rows, slots = left[several], rows[several], slots[several]
    return FusionPlan.join(rounds)


def _leaders(kv: PagedKV, pages: Tensor, rule: Rule) -> Tensor:
    parts = [rule.group(pair_statistics(kv, pages[part], rule)).cpu() for part in position_chunks(*pages.shape)]
    return torch.cat(parts) if parts else pages


def _plan_resident(kv: PagedKV, pages: Tensor, rows: Tensor, slots: Tensor, rule: Rule) -> tuple[FusionPlan, Tensor]:
    """The plan of one round, and the blocks (-1: none) that their leader may not serve but another one still may."""
    leader = _leaders(kv, pages, rule)
    follows = (leader != torch.arange(pages.shape[1])) & (pages >= 0)
    old, new = pages[follows], pages.gather(1, leader)[follows]
    errors = served_errors(kv, old, new, rule.across_layers)
    keep = rule.allows(errors, NOT_ASKED)
    left = torch.full_like(pages, -1)
    left[follows] = old.masked_fill(keep, -1)
    row, slot = rows[follows], slots[follows]
    return FusionPlan(row[keep], slot[keep], old[keep], new[keep], *errors.take(keep)), left


def _plan_directions(kv: PagedKV, pages: Tensor, rows: Tensor, slots: Tensor, rule: Rule) -> FusionPlan:
    count = pages.shape[1]
    group_id = (_leaders(kv, pages, rule) + torch.arange(len(pages))[:, None] * count)[pages >= 0]
    _, group_id, size = group_id.unique(return_inverse=True, return_counts=True)
    shared = size[group_id] > 1
    if not shared.any():
        return FusionPlan.empty()
    old, row, slot = (entry[pages >= 0][shared] for entry in (pages, rows, slots))
    _, group_id = group_id[shared].unique(return_inverse=True)
    num_groups = int(group_id.max()) + 1
    found = shared_directions(kv, old, group_id, num_groups, rule.across_layers)
    keep = rule.allows(found.errors, NOT_ASKED)
    keep &= torch.bincount(group_id[keep], minlength=num_groups)[group_id] > 1
    kept_groups, new_id = group_id[keep].unique(return_inverse=True)
    order = torch.arange(int(keep.sum()))
    first = torch.full((len(kept_groups),), len(order)).scatter_reduce(0, new_id, order, "amin")
    direction_page = old[keep][first]
    return FusionPlan(
        *(row[keep], slot[keep], old[keep], direction_page[new_id], *found.errors.take(keep)),
        k_scale=found.k_scale[:, keep],
        v_scale=found.v_scale[:, keep],
        direction_page=direction_page,
        key_direction=found.keys[:, kept_groups],
        value_direction=found.values[:, kept_groups],
    )
