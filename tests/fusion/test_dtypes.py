"""Pages of every dtype, numbers of every size: plans keep their bound as attention reads it, or there is no plan."""

import dataclasses
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jointkv.attention.tokens import read_tokens
from jointkv.core.blocks import SUPPORTED_DTYPES, PagedKV, served_errors
from jointkv.core.packed import PACKED_DTYPES, PackedPages
from jointkv.core.pool import BlockPool
from jointkv.core.table import BlockTable
from jointkv.errors import LayoutError
from jointkv.fusion.fuser import Fuser, NewBlocks
from jointkv.fusion.pair_sums import pair_errors, pair_sums, pair_sums_reference
from jointkv.policy import FusionPolicy
from jointkv.policy.rule import NOT_ASKED
from tests.core.packings import pack, row_major, vnni
from tests.core.shadow import naive_error, naive_token_error
from tests.fusion.strategies import DIRECTION, RESIDENT, Texture, make_case, plan_position, write_block
from tests.fusion.streams import digest_of_a_stream

ROUNDING = 1e-5
EXACT = FusionPolicy(max_relative_error=0.0)
BOUNDED = dataclasses.replace(DIRECTION, max_relative_error=0.3)

extremes = pytest.mark.hazard(
    "Numerics",
    "pages of any dtype hold huge, denormal or zero numbers, or numbers whose squares leave float32",
    "merged is only what is within the bound in exact arithmetic, by the kernel and by its reference",
)
refusal = pytest.mark.hazard(
    "Numerics",
    "pages of a dtype that was never compared (fp8 in transformers, int8, float64, foreign fp8 formats)",
    "refused by name before any number is computed",
)
as_read = pytest.mark.hazard(
    "Numerics",
    "half precision rounds, or overflows, what a shared direction times a norm gives",
    "the bound holds for what attention reads, after rounding",
)
sinks = pytest.mark.hazard(
    "Numerics",
    "an attention sink with a huge norm hides that all other tokens of a block differ",
    "the bound on every single token keeps such blocks apart",
)
repeatable = pytest.mark.hazard(
    "Numerics", "the same requests come again, in another process", "equal plans to the bit"
)


def magnitudes(dtype):
    """Zero, denormal, smallest, ordinary and largest numbers of a type."""
    info = torch.finfo(dtype)
    return [0.0, info.tiny * info.eps, info.tiny, 1e-3, 1.0, 1.0, info.max**0.5, info.max / 8]


def error_of(own, read, tokens, aggregate):
    """Relative errors of block and worst token by definition, of `[layers, r]` float64, larger one of K and V."""
    block = max(naive_error(*pair, aggregate) for pair in zip(own, read, strict=True))
    return block, max(naive_token_error(*pair, tokens, aggregate) for pair in zip(own, read, strict=True))


@extremes
@settings(max_examples=120)
@given(
    dtype=st.sampled_from(PACKED_DTYPES),
    seed=st.integers(0, 2**16),
    noise=st.sampled_from([0.01, 0.1, 0.25]),
    layers=st.integers(1, 2),
    order=st.sampled_from([row_major(4, 6, 5), vnni(1, 32)]),
    aggregate=st.sampled_from(["rms", "max"]),
)
def test_kernel_and_reference_accept_what_is_within_the_bound(dtype, seed, noise, layers, order, aggregate):
    generator = torch.Generator().manual_seed(seed)
    tokens = int(order.max() + 1) // 2
    sizes = [int(((order < tokens) == is_key).sum()) // tokens for is_key in (True, False)]
    sides = []
    for size in sizes:
        scale = torch.tensor(magnitudes(dtype), dtype=torch.float64)
        scale = scale[torch.randint(len(scale), (layers, 1, tokens, 1, 1), generator=generator)]
        centre = torch.rand(layers, 1, tokens, 1, size, generator=generator).double() + 0.5
        apart = torch.randn(layers, 4, tokens, 1, size, generator=generator).double() * noise
        apart[:, 3] = apart[:, 0]
        sides.append(list((scale * (centre + apart)).to(dtype)))
    _, pages = pack(*sides, dtype, order)
    own, other = torch.tensor([0, 1, 2, 0, 3]), torch.tensor([1, 2, 0, 3, 0])
    policy = FusionPolicy(across_layers=aggregate)
    exact = [torch.stack(side).double().flatten(2).numpy() for side in sides]
    for compare in (pair_sums, pair_sums_reference):
        accepted = policy.rule().allows(pair_errors(compare(pages, own, other), aggregate), NOT_ASKED)
        for pair, (mine, served_by) in enumerate(zip(own.tolist(), other.tolist(), strict=True)):
            block, token = error_of(
                *([side[:, page] for side in exact] for page in (mine, served_by)), tokens, aggregate
            )
            if block == token == 0:
                assert accepted[pair], "equal pages"
            if accepted[pair]:
                assert block <= 0.2 + ROUNDING and token <= 0.3 + ROUNDING


@extremes
@pytest.mark.parametrize("dtype", SUPPORTED_DTYPES, ids=str)
@pytest.mark.parametrize("policy", [RESIDENT, BOUNDED], ids=["resident", "direction"])
@pytest.mark.parametrize("online", [False, True], ids=["tree", "resident index"])
def test_plans_keep_the_bound_at_every_magnitude(dtype, policy, online):
    for value in magnitudes(dtype):
        case = make_case(0, policy, [1] * 5, Texture(clusters=1, noise=0.05), dtype=dtype)
        unit = torch.randn(2, 24, generator=case.generator).clamp(-1, 1)
        for row, factor in enumerate([1.0, 1.0, 1.02, -1.0, 0.5]):
            for layers in (case.pool.kv.keys, case.pool.kv.values):
                for layer, content in zip(layers, unit, strict=True):
                    flat = layer[case.page(row, 0)].view(-1)
                    flat.copy_((value * factor * content.double())[: len(flat)])
        before = case.read()
        apply_plan(case, online)
        for entry, block in case.read().items():
            assert error_of(before[entry], block, 2, "rms")[0] <= 0.3 + ROUNDING
        squares = (torch.tensor(value).double() ** 2 * 24).item()
        if policy is RESIDENT and squares < torch.finfo(torch.float32).max:
            assert case.page(1, 0) == case.page(0, 0), "identical requests"


def apply_plan(case, online):
    if not online:
        case.apply()
        return
    fuser = Fuser(case.pool, case.policy)
    for row in range(len(case.lengths)):  # one request after the other
        at = torch.tensor([row]), torch.tensor([0])
        fuser.fuse(case.table, NewBlocks(*at, [("tenant", 0)], torch.tensor([0])))
        fuser.check_integrity()
        case.pool.check_integrity()


@extremes
@pytest.mark.parametrize("small", [1e-23, 1e-30, 1e-44])
def test_blocks_that_differ_in_numbers_too_small_to_square_are_not_called_equal(small):
    """Differences whose squares vanish in float32 counted as none: an approximate page passed for an exact one."""
    keys = torch.ones(2, 2, 1, 16)
    keys[1, 1, 0, 3], keys[0, 1, 0, 3] = small, 3 * small
    kv = PagedKV([keys], [torch.ones(2, 2, 1, 16)])
    assert not len(plan_position(kv, torch.tensor([0, 1]), EXACT))
    errors = [served_errors(kv, torch.tensor([0]), torch.tensor([1]), "rms")]
    slots = row_major(2, 16, 16)
    pages = PackedPages([torch.cat((keys.flatten(1), torch.ones(2, 32)), 1)], slots % 2, slots >= 2)
    for compare in (pair_sums, pair_sums_reference):
        errors.append(pair_errors(compare(pages, torch.tensor([0]), torch.tensor([1])), "rms"))
    for found in errors:
        assert found.key.item() > 0 and found.token.item() > 0 and found.value.item() == 0
        assert not EXACT.rule().allows(found, NOT_ASKED) and FusionPolicy().rule().allows(found, NOT_ASKED)


@refusal
@pytest.mark.parametrize(
    "dtype",
    [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float64, torch.int8, torch.uint8],
    ids=str,
)
def test_pages_of_other_dtypes_are_refused(dtype):
    with pytest.raises(LayoutError, match=str(dtype)):
        BlockPool(1, 2, (1, 4), (1, 4), dtype=dtype)
    layer = torch.zeros(3, 2, 1, 4).to(dtype)
    with pytest.raises(LayoutError, match=str(dtype)):
        PagedKV([layer], [layer])
    if dtype not in PACKED_DTYPES:
        slots = row_major(2, 2, 2)
        with pytest.raises(LayoutError, match=str(dtype)):
            PackedPages([layer.flatten(1)], slots % 2, slots >= 2)


def attention_reads(table, row):
    """K and V of one block as the attention function gets them, `[layers, r]` float64."""
    kv, size = table.pool.kv, table.pool.block_size
    slots = table.pages[row, :1, None] * size + torch.arange(size)
    sides = []
    for layers, scale in ((kv.keys, table.k_scale), (kv.values, table.v_scale)):
        spread = [None if scale is None else scale[i, row, 0].expand(1, size) for i in range(kv.num_layers)]
        read = [read_tokens(layer, slots, factor) for layer, factor in zip(layers, spread, strict=True)]
        sides.append(torch.stack([x.transpose(1, 2).flatten() for x in read]).double().numpy())
    return sides


@as_read
@pytest.mark.parametrize("dtype", SUPPORTED_DTYPES, ids=str)
@pytest.mark.parametrize("online", [False, True], ids=["tree", "resident index"])
def test_errors_of_a_plan_are_those_of_what_attention_reads(dtype, online):
    """They were those before rounding to the pages' dtype: with bf16, members read up to 0.3% beyond their bound."""
    case = make_case(1, DIRECTION, [1] * 6, Texture(clusters=1, noise=0.02, spread=0.7), dtype=dtype)
    written = case.read()
    if online:
        fuser = Fuser(case.pool, case.policy)
        parts = [torch.arange(3), torch.arange(3, 6)]
        plans = [fuser.fuse(case.table, NewBlocks(rows, 0 * rows, ["one"], 0 * rows)) for rows in parts]
    else:
        plans = case.apply()
    assert sum(map(len, plans)) >= 5
    for plan in plans:
        for index, row in enumerate(plan.row.tolist()):
            read = attention_reads(case.table, row)
            errors = [naive_error(*pair, "rms") for pair in zip(written[row, 0], read, strict=True)]
            found = plan.key_error[index].item(), plan.value_error[index].item()
            np.testing.assert_allclose(found, errors, rtol=1e-3, atol=1e-6)


@as_read
@pytest.mark.parametrize("online", [False, True], ids=["tree", "resident index"])
def test_what_overflows_when_it_is_read_is_not_merged(online):
    """A direction times a norm went beyond the largest fp16 number, and attention read infinity."""
    policy = FusionPolicy(
        representative="direction", key_threshold=0.9, value_threshold=0.9, max_relative_error=0.3, max_token_error=None
    )
    case = make_case(0, policy, [1] * 3, Texture(), layers=1, shape=(1, 1, 2, 2), dtype=torch.float16)
    blocks = [[65504.0, 20000.0], [65504.0, 0.0], [65000.0, 19000.0]]
    if online:  # the direction of the first two serves the third
        blocks = [[32752.0, 10000.0], [32752.0, 0.0], [65504.0, 20000.0]]
    for row, block in enumerate(blocks):
        write_block(case.pool, case.page(row, 0), *torch.tensor([[block], [block]]))
    if online:
        fuser = Fuser(case.pool, case.policy)
        for rows in (torch.arange(2), torch.arange(2, 3)):
            fuser.fuse(case.table, NewBlocks(rows, 0 * rows, ["one"], 0 * rows))
        assert case.page(0, 0) == case.page(1, 0) != case.page(2, 0)
    else:
        case.apply()
    for row, block in enumerate(blocks):
        for read in attention_reads(case.table, row):
            assert naive_error(np.array([block]), read, "rms") <= 0.3 + ROUNDING


@sinks
@pytest.mark.parametrize("dtype", SUPPORTED_DTYPES, ids=str)
@pytest.mark.parametrize("alike", [True, False])
def test_a_sink_hides_no_other_token(dtype, alike):
    generator = torch.Generator().manual_seed(0)
    pool = BlockPool(2, 16, (2, 8), (2, 8), dtype=dtype)
    table = BlockTable(pool, 2)
    table.extend(torch.tensor([1, 1]))
    for layer in (*pool.kv.keys, *pool.kv.values):
        layer[table.pages[:, 0]] = torch.randn(2, 16, 2, 8, generator=generator).to(dtype)
        if alike:
            layer[table.pages[1, 0]] = layer[table.pages[0, 0]]
        layer[table.pages[:, 0], 0] = 1000 * torch.ones(2, 8).to(dtype)
    errors = served_errors(pool.kv, table.pages[1], table.pages[0], "rms")
    assert errors.key.item() < 0.01, "the sink makes the blocks look alike"
    assert len(plan_position(pool.kv, table.pages[:, 0], FusionPolicy())) == alike
    plan = Fuser(pool, FusionPolicy()).fuse(
        table, NewBlocks(torch.arange(2), torch.zeros(2).long(), ["one"], torch.zeros(2).long())
    )
    assert len(plan) == alike
    slots = row_major(16, 16, 16)
    packed = PackedPages(
        [torch.cat((k.flatten(1), v.flatten(1)), 1) for k, v in zip(pool.kv.keys, pool.kv.values, strict=True)],
        slots % 16,
        slots >= 16,
    )
    sums = pair_sums(packed, table.pages[0], table.pages[1])
    assert FusionPolicy().rule().allows(pair_errors(sums, "rms"), NOT_ASKED).item() == alike


@repeatable
def test_the_same_stream_gives_the_same_plans():
    kinds = ("resident", "direction")
    code = (
        f"from tests.fusion.streams import digest_of_a_stream; print(*map(digest_of_a_stream, {kinds!r}), sep=chr(10))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    again = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    for other, kind in zip(again.stdout.splitlines(), kinds, strict=True):
        assert other == digest_of_a_stream(kind) == digest_of_a_stream(kind)
