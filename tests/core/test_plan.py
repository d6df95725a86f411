"""Plans: saved and read back unchanged, refused when they are damaged."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from jointkv.core.plan import FORMAT, FusionPlan
from jointkv.errors import BadInput, LayoutError

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


def assert_same(first, second):
    for field in dataclasses.fields(FusionPlan):
        one, other = getattr(first, field.name), getattr(second, field.name)
        if one is None:
            assert other is None, field.name
        else:
            assert one.dtype == other.dtype and torch.equal(one, other), field.name


@settings(deadline=None, max_examples=40)
@given(
    members=st.integers(0, 6),
    layers=st.integers(1, 3),
    groups=st.integers(0, 3),
    scales=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 999),
)
def test_every_kind_of_plan_is_read_back_as_saved(tmp_path_factory, members, layers, groups, scales, dtype, seed):
    plan = plan_of(members, layers=layers, groups=groups, scales=scales, dtype=dtype, seed=seed)
    path = tmp_path_factory.mktemp("plans") / "plan.safetensors"
    plan.save(path)
    assert_same(FusionPlan.load(str(path)), plan)


def test_views_and_the_empty_plan_can_be_saved(tmp_path):
    FusionPlan.empty().save(tmp_path / "empty")
    assert len(FusionPlan.load(tmp_path / "empty")) == 0
    numbers, errors = torch.arange(12).view(3, 4).T, torch.rand(3, 3)
    plan = FusionPlan(*numbers, *errors)
    plan.save(tmp_path / "views")
    assert_same(FusionPlan.load(tmp_path / "views"), plan)


def fields_of(plan):
    named = {field.name: getattr(plan, field.name) for field in dataclasses.fields(plan)}
    return {name: tensor for name, tensor in named.items() if tensor is not None}


BAD_FIELDS = {
    "a field is missing": lambda fields: fields.pop("page"),
    "an unknown field": lambda fields: fields.update(extra=torch.zeros(1)),
    "members differ in length": lambda fields: fields.update(page=torch.zeros(1, dtype=torch.long)),
}


@pytest.mark.parametrize("damage", BAD_FIELDS.values(), ids=BAD_FIELDS)
def test_a_file_with_other_fields_is_bad_input(tmp_path, damage):
    fields = fields_of(plan_of(3))
    damage(fields)
    save_file(fields, tmp_path / "plan", metadata={"format": FORMAT})
    with pytest.raises(BadInput, match="not a fusion plan"):
        FusionPlan.load(tmp_path / "plan")


@pytest.mark.parametrize("metadata", [None, {"format": "jointkv.plan/0"}, {"other": FORMAT}])
def test_another_format_is_bad_input(tmp_path, metadata):
    save_file(fields_of(plan_of(2)), tmp_path / "plan", metadata=metadata)
    with pytest.raises(BadInput, match=FORMAT):
        FusionPlan.load(tmp_path / "plan")


def test_what_is_no_safetensors_file_is_bad_input(tmp_path):
    (tmp_path / "text").write_text("a fusion plan")
    (tmp_path / "empty").write_bytes(b"")
    plan_of(3).save(tmp_path / "whole")
    (tmp_path / "cut").write_bytes((tmp_path / "whole").read_bytes()[:-9])
    for name in ("text", "empty", "cut", "missing", "."):
        with pytest.raises(BadInput, match="not a fusion plan"):
            FusionPlan.load(tmp_path / name)


@pytest.mark.parametrize("name", ["slot", "old_page", "page", "key_error", "value_error", "token_error"])
def test_members_must_agree_in_number(name):
    with pytest.raises(LayoutError, match=name):
        FusionPlan(**{**fields_of(plan_of(3)), name: torch.zeros(2)})


def test_released_pages_are_those_left_for_another():
    plan = dataclasses.replace(plan_of(3), old_page=torch.tensor([4, 5, 6]), page=torch.tensor([4, 4, 7]))
    assert plan.pages_released == 2
    assert FusionPlan.empty().pages_released == 0
