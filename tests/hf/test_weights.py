"""Pages that other weights have computed serve no request that begins after a change, however it was made."""

import gc

import pytest
import torch

from jointkv.errors import ModelMismatch
from jointkv.hf.cache import JointCache
from jointkv.policy import FusionPolicy
from tests.hf.reusing import reusing
from tests.hf.test_pool import pool_of
from tests.hf.tiny_models import BLOCK, build_model, duplicates, joint, step

ANYTHING = FusionPolicy(max_relative_error=1e6, max_token_error=1e6)
PROMPT = duplicates(1, 4 * BLOCK)


@torch.no_grad()
def scale(model):
    for parameter in model.parameters():
        parameter.mul_(0.97)


def scale_behind_autograd(model):
    for parameter in model.parameters():
        parameter.data.mul_(0.97)


def replace_storage(model):
    for parameter in model.parameters():
        parameter.data = parameter.data * 0.97


def one_step_of_training(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    model(input_ids=PROMPT[0], labels=PROMPT[0]).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def load_others(model):
    model.load_state_dict(build_model("llama", seed=1).state_dict())


def replace_a_parameter(model):
    weight = model.model.layers[0].self_attn.k_proj.weight
    model.model.layers[0].self_attn.k_proj.weight = torch.nn.Parameter(weight.detach() * 0.97)


CHANGES = [scale, scale_behind_autograd, replace_storage, one_step_of_training, load_others, replace_a_parameter]


@pytest.mark.parametrize("candidates", ["signature", "tokens"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_request_after_a_change_reads_no_earlier_page(change, candidates, caplog):
    caplog.set_level("INFO", logger="jointkv")
    model, pool = joint("llama", FusionPolicy(max_relative_error=1e6, max_token_error=1e6, candidates=candidates))
    before = JointCache(pool)
    step(model, before, *PROMPT)
    fingerprint = pool.fingerprint
    change(model)
    after, again = JointCache(pool), JointCache(pool)
    step(model, after, *PROMPT)
    assert after.pages == after.references == 4 and pool.stats()["pages_used"] == 8
    step(model, again, *PROMPT)
    assert pool.stats()["pages_used"] == 8, "those of the same weights are shared"
    assert pool.fingerprint != fingerprint
    assert [record.message for record in caplog.records].count(
        "the model's weights have changed: resident pages are forgotten"
    ) == 1
    assert pool.faults == 0


class Quantised(torch.Tensor):
    """A parameter that is told apart by its id alone."""


def test_a_parameter_is_another_one_though_it_has_the_id_of_one_that_is_gone():
    model, pool = joint("llama", ANYTHING)
    layer = model.model.layers[0].self_attn.k_proj
    plain = layer.weight.detach().clone()
    for number in range(100):
        before = pool.weights
        layer.weight = None
        layer.weight = torch.nn.Parameter((plain * (2 + number)).as_subclass(Quantised), requires_grad=False)
        pool.notice_weights()
        assert pool.weights is not before
    before = pool.weights
    pool.notice_weights()
    assert pool.weights is before


def test_without_a_change_nothing_is_forgotten(caplog):
    caplog.set_level("INFO", logger="jointkv")
    model, pool = joint("llama", ANYTHING)
    model.train().eval().requires_grad_(False)
    caches = [JointCache(pool) for _ in range(3)]
    for cache in caches:
        step(model, cache, *PROMPT)
    assert pool.stats()["pages_used"] == 4 and not caplog.records


def test_a_cache_that_began_before_goes_on_without_taking_part():
    model, pool = joint("llama", ANYTHING)
    before, after = JointCache(pool), JointCache(pool)
    step(model, before, *PROMPT)
    scale(model)
    step(model, after, *PROMPT)
    for cache in (before, after):
        step(model, cache, PROMPT[0])
    assert before.pages == before.references == after.pages == after.references == 8
    assert pool.stats()["pages_used"] == 16
    before.reset()
    step(model, before, *PROMPT)
    assert pool.stats()["pages_used"] == 8, "from its next beginning on it does"


def test_what_is_no_parameter_is_told_by_the_user():
    """Such as an adapter that is switched off."""
    model, pool = joint("llama", ANYTHING)
    caches = [JointCache(pool) for _ in range(2)]
    step(model, caches[0], *PROMPT)
    pool.weights_changed()
    step(model, caches[1], *PROMPT)
    assert pool.stats()["pages_used"] == 8
    pool.check_integrity()


def test_reuse_reads_nothing_of_other_weights():
    model, pool = reusing()
    caches = [JointCache(pool) for _ in range(3)]
    computed = []
    for cache in caches:
        computed.append(cache.prefill(model, *PROMPT).computed)
        if cache is caches[1]:
            scale(model)
    assert computed[1] < computed[0] == computed[2]
    assert not pool.reuse.licences
    pool.check_integrity()


def test_licences_must_be_earned_again_under_other_weights():
    """Those that a profile has granted, too: it was made with the weights that are gone."""
    _, pool = reusing(mode="licensed")
    reuse = pool.reuse
    assert reuse is not None
    earned = reuse.licence("tenant")
    while not earned.granted:
        earned.observe(0.0)
    reuse._first = reuse._first_by({False: earned.to_json()["evidence"]})
    assert reuse.licence("another tenant").granted
    pool.weights_changed()
    assert not reuse.licence("tenant").granted and not reuse.licence("another tenant").granted


def test_a_saved_cache_belongs_to_the_weights_it_began_with(tmp_path):
    model, pool = joint("llama", "safe")
    cache = JointCache(pool)
    step(model, cache, *PROMPT)
    scale(model)
    step(model, JointCache(pool), *PROMPT)
    cache.save(tmp_path / "cache")
    with pytest.raises(ModelMismatch, match="model"):
        JointCache.load(tmp_path / "cache", pool)


def test_a_cache_that_was_cropped_to_nothing_begins_with_the_weights_of_now(tmp_path):
    """What the new weights computed was saved, and offered to others, as if the old ones had."""
    model, pool = joint("llama", ANYTHING)
    before, cache = JointCache(pool), JointCache(pool)
    for each in (before, cache):
        step(model, each, *PROMPT)
    scale(model)
    cache.crop(-cache.length)
    step(model, cache, *PROMPT)
    assert not set(cache.tables[0].held().tolist()) & set(before.tables[0].held().tolist())
    cache.save(tmp_path / "cache")
    assert JointCache.load(tmp_path / "cache", pool).length == cache.length


def test_a_change_is_noticed_before_a_file_is_read(tmp_path):
    model, pool = joint("llama", "safe")
    cache = JointCache(pool)
    step(model, cache, *PROMPT)
    cache.save(tmp_path / "cache")
    scale(model)
    with pytest.raises(ModelMismatch, match="model"):
        JointCache.load(tmp_path / "cache", pool)


def test_a_profile_of_other_weights_is_named(caplog):
    model = build_model("llama")
    pool = pool_of(model, bounds=(0.4,))
    scale(model)
    step(model, JointCache(pool), *PROMPT)
    assert [record.message for record in caplog.records if "calibrate anew" in record.message]


def test_a_pool_does_not_keep_its_model_alive():
    model, pool = joint("llama")
    cache = JointCache(pool)
    del model
    gc.collect()
    pool.notice_weights()
    pool.weights_changed()
    cache.check_integrity()
