"""Errors of all pairs of blocks that may be compared are those of serving one from the other's page."""

import pytest
import torch

from jointkv.core.blocks import PagedKV, served_errors
from jointkv.evaluate.holding.fused import FusedBatch
from jointkv.evaluate.holding.prefilled import prefill
from jointkv.evaluate.predict.block_pairs import lines_of, pair_error_matrices
from jointkv.policy import FusionPolicy
from jointkv.theory.calibrate import cover, effective_error
from tests.evaluate.sharing_requests import BLOCK, requests


def test_errors_of_pairs_are_the_errors_of_serving(model):
    batch = prefill(model, requests(5), block_size=BLOCK)
    lines = lines_of(batch)
    groups = [range(0, 2), range(2, 4)]
    errors = pair_error_matrices(batch, lines, groups)
    for group, layers in enumerate(groups):
        kv = PagedKV(*([batch.state[f"{side}.{layer}"] for layer in layers] for side in ("key", "value")))
        line, i, j = (errors[group].isfinite()).nonzero(as_tuple=True)
        assert len(line) > 100
        found = served_errors(kv, lines.pages[line, i], lines.pages[line, j], "rms")
        torch.testing.assert_close(errors[group, line, i, j], effective_error(*found), atol=1e-5, rtol=1e-4)


def test_a_token_beyond_the_limit_rules_a_pair_out(model):
    batch = prefill(model, requests(4), block_size=BLOCK)
    lines = lines_of(batch)
    free, limited = (pair_error_matrices(batch, lines, [range(4)], token_limit=limit) for limit in (9.0, 0.3))
    assert limited.isinf().sum() > free.isinf().sum()
    assert torch.equal(limited[limited.isfinite()], free[limited.isfinite()])


def test_chunk_lines_hold_equal_places_of_one_request(model):
    batch = prefill(model, requests(2, lengths=(50, 51)), block_size=BLOCK)
    lines = lines_of(batch, chunk_tokens=2 * BLOCK)
    assert lines.pages.shape == (2 * 2, 6) and lines.request[:, 0].tolist() == [0, 0, 1, 1]
    table = batch.state["table.0"]
    assert lines.pages[0].tolist() == table[0, 0:12:2].tolist() and lines.pages[3].tolist() == table[1, 1:12:2].tolist()


@pytest.mark.parametrize("bound", [0.1, 0.3, 0.5])
def test_the_search_on_errors_frees_what_the_cache_frees(model, bound):
    batch = prefill(model, requests(12), block_size=BLOCK)
    lines = lines_of(batch)
    [error] = pair_error_matrices(batch, lines, [range(4)])
    policy = FusionPolicy(max_relative_error=bound, max_token_error=1.5 * bound)
    held = FusedBatch(model, batch, policy)
    own = cover(error, lines.valid, bound) == torch.arange(12)
    partial = held.pages_before - int(lines.valid.sum())
    assert held.pages_after < held.pages_before
    assert int((own & lines.valid).sum()) + partial == pytest.approx(held.pages_after, rel=0.03)
