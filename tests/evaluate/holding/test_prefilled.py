"""Prefilled batches: padded, joined, cut down, from dense caches, in files."""

import torch

from jointkv.evaluate.holding import prefilled
from jointkv.evaluate.holding.batch import Batch
from jointkv.evaluate.holding.fused import OFF, fused_logits
from jointkv.evaluate.holding.prefilled import left_padded, prefill
from jointkv.policy import FusionPolicy
from tests.evaluate.sharing_requests import BLOCK, requests


def test_left_padding():
    ids, mask = left_padded([(5, 6, 7), (8,)], pad=9)
    assert ids.tolist() == [[5, 6, 7], [9, 9, 8]] and mask.tolist() == [[1, 1, 1], [0, 0, 1]]


def test_joined_and_taken_batches_are_what_one_prefill_gives(model):
    made = requests(7)
    joined = prefilled.join([prefill(model, made[:3], block_size=BLOCK), prefill(model, made[3:], block_size=BLOCK)])
    rows = [5, 0, 3]
    part = prefilled.take(joined, rows)
    direct = prefill(model, [made[row] for row in rows], block_size=BLOCK)
    assert part.length == direct.length and torch.equal(part.mask, direct.mask)
    logits = [fused_logits(model, batch, OFF)[1] for batch in (part, direct)]
    torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)


def test_dense_caches_on_pages_are_what_a_prefill_gives(model):
    made = requests(5)
    batch = Batch(model, made, BLOCK)
    paged = prefilled.from_dense(model, made, batch.dense, BLOCK)
    direct = prefill(model, made, block_size=BLOCK)
    assert paged.length == direct.length and torch.equal(paged.mask, direct.mask)
    for name, tensor in direct.state.items():
        assert paged.state[name].shape == tensor.shape and paged.state[name].dtype == tensor.dtype
    for policy in (OFF, FusionPolicy(max_relative_error=0.3)):
        (first, logits), (second, expected) = (fused_logits(model, each, policy) for each in (paged, direct))
        assert first.pages_after == second.pages_after
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_a_saved_batch_comes_back(model, tmp_path):
    made = requests(3)
    batch = prefill(model, made, block_size=BLOCK)
    prefilled.save(batch, tmp_path / "b.safetensors")
    again = prefilled.load(tmp_path / "b.safetensors", made)
    assert again.length == batch.length and torch.equal(again.mask, batch.mask)
    for name, tensor in batch.state.items():  # a page that is not full ends in whatever the memory held
        torch.testing.assert_close(again.state[name], tensor, rtol=0, atol=0, equal_nan=True)
    assert prefilled.load(tmp_path / "none", made) is None
    (tmp_path / "b.safetensors").write_bytes(b"broken")
    assert prefilled.load(tmp_path / "b.safetensors", made) is None
