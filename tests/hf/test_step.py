"""Where a forward pass writes, and what each layer hands to attention."""

from typing import Any

import pytest
import torch

from jointkv.errors import PoolFull
from jointkv.hf.batch import Batch
from jointkv.hf.cache import JointCache
from jointkv.hf.step import Step
from tests.hf.tiny_models import BLOCK, build_model, joint, prompts, step, stock_cache

HEADS, SIZE = 2, 8


def begun(tenants=("a", "b"), max_pages=None):
    """A pool whose model reads pages, and a batch on it without tokens."""
    _, pool = joint("llama", max_pages=max_pages)
    pool.prepare(*states(1, 0))
    pool.attention.on()
    return pool, Batch(pool, tenants)


def states(rows, tokens, seed=0):
    return torch.randn(2, rows, HEADS, tokens, SIZE, generator=torch.Generator().manual_seed(seed))


def test_padding_is_not_written():
    pool, batch = begun()
    mask = torch.tensor([[1, 1, 1], [0, 0, 1]])
    step = Step(mask=mask)
    step.advance(batch, 3)
    assert step.fresh and step.prompt and step.written.tolist() == [0, 1, 2, 5]
    step.write(batch, 1, *states(2, 3))
    keys = pool.blocks.kv.keys[1]
    assert not keys[0].any(), "the null page"
    first, second = (int(pages[0]) for pages in batch.tables[0].pages)
    torch.testing.assert_close(keys[first, :3].transpose(0, 1), states(2, 3)[0, 0])
    torch.testing.assert_close(keys[second, 0], states(2, 3)[0, 1, :, 2])


def test_a_layer_that_hands_its_states_on_is_given_pages_from_then_on():
    _, batch = begun()
    step = Step()
    step.advance(batch, BLOCK)
    whole = states(2, BLOCK)
    key: Any = step.write(batch, 0, *whole)[0]
    assert torch.equal(key, whole[0]) and not hasattr(key, "jointkv_pages")
    later = Step(BLOCK)
    later.advance(batch, 1)
    dense, _ = later.write(batch, 0, *states(2, 1, seed=1))
    assert torch.equal(dense, torch.cat((whole[0], states(2, 1, seed=1)[0]), 2))
    key.jointkv_arrived()
    paged: Any = later.write(batch, 0, *states(2, 1, seed=1))[0]
    assert paged.shape[2] == 1 and torch.equal(paged.jointkv_pages.read()[0], dense)


def test_a_full_pool_leaves_the_step_as_it_was():
    _, batch = begun(max_pages=1)
    step = Step()
    with pytest.raises(PoolFull):
        step.advance(batch, 1)
    assert batch.length == 0 and step.layers == [] and step.fresh


def test_a_forward_pass_inside_another_may_make_the_pool_grow(monkeypatch):
    """What the outer one computed behind it was written to the tensors that had been given up."""
    monkeypatch.setattr("jointkv.core.pool.FIRST_PAGES", 4)
    stock = build_model("llama")
    model, pool = joint("llama")
    outer, theirs, ids = JointCache(pool), stock_cache(stock), prompts(5 * BLOCK)[0]
    step(model, outer, ids[:, :6])
    step(stock, theirs, ids[:, :6])
    inside = []

    def nested(*_):
        if not inside:
            inside.append(JointCache(pool))
            step(model, inside[0], ids)

    hook = model.model.layers[1].register_forward_pre_hook(nested)
    for part in (ids[:, 6:7], ids[:, 7:10]):
        assert torch.equal(step(model, outer, part), step(stock, theirs, part))
    hook.remove()
    assert pool.blocks.num_pages > 4
    for ours, reference in zip(outer.layers, theirs.layers, strict=True):
        assert torch.equal(ours.keys, reference.keys) and torch.equal(ours.values, reference.values)
