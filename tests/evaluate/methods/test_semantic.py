"""Reuse of another request's cache."""

import torch

from jointkv.evaluate.compare.comparison import run_methods
from jointkv.evaluate.holding.held import true_logits
from jointkv.evaluate.methods import get_method
from jointkv.evaluate.methods.semantic import donors, prompt_embeddings
from tests.evaluate.methods.tiny_batches import PER_TOKEN, batch_of, different, random_tokens, requests_of


def test_the_nearest_earlier_request_with_a_cache_of_its_own_gives_it():
    angles = torch.tensor([0.0, 90.0, 5.0, 88.0, 8.0]).deg2rad()
    embeddings = torch.stack((angles.cos(), angles.sin()), 1)
    assert donors(embeddings, 0.99) == [0, 1, 0, 1, 0]
    assert donors(embeddings, 0.998) == [0, 1, 2, 1, 2]
    assert donors(embeddings, 1.1) == [0, 1, 2, 3, 4]


def test_embeddings_are_units_and_ignore_the_order_of_tokens():
    prompt = random_tokens(20, 1)
    batch = batch_of(requests_of(prompt, prompt[::-1], random_tokens(20, 2)))
    embeddings = prompt_embeddings(batch)
    cosine = embeddings @ embeddings.T
    torch.testing.assert_close(cosine.diagonal(), torch.ones(3))
    assert cosine[0, 1] > 0.9999 > cosine[0, 2]


def test_equal_prompts_share_a_cache_at_no_cost():
    prompt = random_tokens(30, 1)
    batch = batch_of(requests_of(prompt, prompt, random_tokens(30, 2)))
    (row,) = run_methods(batch, [(get_method("semantic"), 0.9999)], generate=3)
    assert row.nbytes == 2 * 29 * PER_TOKEN * 4
    assert row.kl_worst_request < 1e-9 and row.common_prefix == 3


def test_a_reused_cache_answers_the_other_request():
    batch = batch_of(different(rows=2))
    held = get_method("semantic").hold(batch, -1.0)
    assert held.nbytes == batch.lengths[0] * PER_TOKEN * 4
    swapped = batch_of([batch.requests[0], batch.requests[0]])
    swapped.requests[1] = type(batch.requests[0])(
        (*batch.requests[0].prompt[:-1], batch.requests[1].prompt[-1]), batch.requests[1].continuation, ""
    )
    expected = true_logits(get_method("unfused").hold(swapped, 1.0), swapped.requests)
    torch.testing.assert_close(true_logits(held, batch.requests), expected)
    (row,) = run_methods(batch, [(get_method("semantic"), -1.0)])
    assert row.kl_worst_request > 0.1
