"""Plans: their members agree in number, and what they release is counted."""

import dataclasses

import pytest
import torch

from jointkv.core.plan import FusionPlan
from jointkv.errors import LayoutError

PAGE_SHAPE = (2, 1, 3)


def plan_of(members, *, layers=2, groups=0, scales=False, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def pages(*shape):
        return torch.randint(50, shape, generator=generator)

    def numbers(*shape):
        return torch.rand(*shape, generator=generator)

    k_scale, v_scale = (numbers(layers, members) if scales or groups else None for _ in range(2))
    directions = [numbers(layers, groups, *PAGE_SHAPE).to(dtype) if groups else None for _ in range(2)]
    return FusionPlan(
        row=pages(members),
        slot=pages(members),
        old_page=pages(members),
        page=pages(members),
        key_error=numbers(members),
        value_error=numbers(members),
        token_error=numbers(members),
        k_scale=k_scale,
        v_scale=v_scale,
        direction_page=pages(groups) if groups else None,
        key_direction=directions[0],
        value_direction=directions[1],
    )


def fields_of(plan):
    named = {field.name: getattr(plan, field.name) for field in dataclasses.fields(plan)}
    return {name: tensor for name, tensor in named.items() if tensor is not None}


@pytest.mark.parametrize("name", ["slot", "old_page", "page", "key_error", "value_error", "token_error"])
def test_members_must_agree_in_number(name):
    with pytest.raises(LayoutError, match=name):
        FusionPlan(**{**fields_of(plan_of(3)), name: torch.zeros(2)})


def test_released_pages_are_those_left_for_another():
    plan = dataclasses.replace(plan_of(3), old_page=torch.tensor([4, 5, 6]), page=torch.tensor([4, 4, 7]))
    assert plan.pages_released == 2
    assert FusionPlan.empty().pages_released == 0
