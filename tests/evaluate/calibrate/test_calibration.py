"""Calibration: predictions that come true, targets that are met or refused, results in between that are used again."""

import random

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from jointkv.core.blocks import PagedKV, served_errors
from jointkv.errors import BadInput, InvalidPolicy
from jointkv.evaluate.calibrate.run import Calibration, TargetUnmet
from jointkv.evaluate.calibrate.settings import CalibrationSettings
from jointkv.evaluate.holding import prefilled
from jointkv.evaluate.holding.batch import Batch
from jointkv.evaluate.holding.fused import OFF, FusedBatch, fused_logits
from jointkv.evaluate.holding.prefilled import prefill
from jointkv.evaluate.predict.block_pairs import lines_of, pair_error_matrices
from jointkv.evaluate.traffic.base import Request
from jointkv.hf.pool import model_identity
from jointkv.policy import FusionPolicy
from jointkv.policy.profile import Target
from jointkv.theory.calibrate import cover, effective_error

VOCABULARY, BLOCK = 97, 4


@pytest.fixture(scope="module")
def model():
    """A random Llama in which what was read before changes K and V a little."""
    torch.manual_seed(0)
    config = LlamaConfig(
        **{"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256},
    )
    built = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in built.named_parameters():
            if weight.dim() == 2:
                weight.normal_(std=1.0 if "embed" in name else weight.shape[1] ** -0.5)
            if "o_proj" in name or "down_proj" in name:
                weight.mul_(0.1)
    return built


def requests(count, seed=0, shared=40, lengths=(50, 60)):
    """Requests with a head of their own, shared text at equal positions, and a tail of their own."""
    rng = random.Random(seed)
    draw = lambda n: [rng.randrange(2, VOCABULARY) for _ in range(n)]  # noqa: E731
    middle = [random.Random(99).randrange(2, VOCABULARY) for _ in range(shared)]
    made = []
    for _ in range(count):
        prompt = draw(4) + middle
        prompt += draw(rng.randrange(*lengths) - len(prompt))
        made.append(Request(tuple(prompt), tuple(draw(6)), ""))
    return made


def settings(target, **changes):
    return CalibrationSettings(Target.parse(target), **{"block_size": BLOCK, **changes})


def calibrated(model, target, made=None, work=None, **changes):
    calibration = Calibration(model, made or requests(24), settings(target, **changes), work=work)
    return calibration.run(model_identity(model), "test", {})


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


def test_a_kl_target_is_met_and_the_ratio_predicted(model):
    profile = calibrated(model, "kl=0.01")
    assert profile.met and profile.held_out.kl <= 0.01 and profile.calibrated.kl_upper <= 0.01
    assert profile.predicted.ratio > 1.5 and profile.held_out.ratio == pytest.approx(profile.predicted.ratio, rel=0.1)
    assert profile.predicted.low <= profile.held_out.ratio <= profile.predicted.high
    assert 0 < profile.groups[0].acceptance < 1 and profile.groups[0].distortion > 0
    assert any(point.measured for point in profile.frontier)


def test_a_stricter_target_gives_a_stricter_bound(model):
    loose, strict = (calibrated(model, f"kl={value}").groups[0].max_relative_error for value in (0.05, 1e-5))
    assert strict < loose


def test_a_ratio_target(model):
    profile = calibrated(model, "ratio=1.8")
    assert profile.met and profile.held_out.ratio >= 1.8 and profile.predicted.low >= 1.8
    bolder = [point for point in profile.frontier if point.max_relative_error < (profile.groups[0].max_relative_error,)]
    assert bolder and all(point.predicted.low < 1.8 for point in bolder)


def test_a_ratio_that_cannot_be_had_gives_the_frontier(model):
    with pytest.raises(TargetUnmet, match="largest ratio to be relied on is 2") as unmet:
        calibrated(model, "ratio=50")
    assert len(unmet.value.frontier) > 3


def test_a_relative_error_is_its_own_setting(model):
    profile = calibrated(model, "relative_error=0.25")
    assert profile.groups[0].max_relative_error == 0.25 and profile.groups[0].max_token_error == pytest.approx(0.375)


def test_layer_groups_get_bounds_of_their_own(model):
    profile = calibrated(model, "kl=0.001", layer_groups=2)
    assert profile.layer_groups == 2 and profile.met
    assert all(len(point.max_relative_error) == 2 for point in profile.frontier)
    assert any(len(set(point.max_relative_error)) == 2 for point in profile.frontier)
    assert profile.frontier[0].max_relative_error == (0.0, 0.0)


def test_chunk_scope(model):
    rng = random.Random(5)
    made = []
    for request in requests(16):
        chunk = [rng.randrange(2, VOCABULARY) for _ in range(8)]
        made.append(Request(tuple(chunk * 6 + list(request.prompt[-4:])), request.continuation, ""))
    profile = calibrated(model, "relative_error=1", made, scope="chunk", chunk_tokens=8, token_limit=9.0)
    assert profile.held_out.ratio > 1.2
    assert profile.held_out.ratio == pytest.approx(profile.predicted.ratio, rel=0.1)


def test_an_interrupted_calibration_goes_on(model, tmp_path, monkeypatch):
    whole = calibrated(model, "kl=0.01", work=tmp_path)
    from jointkv.evaluate.calibrate import run

    def never(*args, **options):
        raise AssertionError("prefilled again")

    monkeypatch.setattr(run, "prefill", never)
    assert calibrated(model, "kl=0.01", work=tmp_path) == whole


def test_damaged_results_are_measured_again(model, tmp_path):
    whole = calibrated(model, "kl=0.01", work=tmp_path)
    for path in tmp_path.iterdir():
        path.write_bytes(b"{")
    assert calibrated(model, "kl=0.01", work=tmp_path) == whole


def test_other_requests_do_not_use_what_was_kept(model, tmp_path):
    calibrated(model, "kl=0.01", work=tmp_path)
    first = calibrated(model, "kl=0.01", requests(24, seed=7), work=tmp_path)
    assert first == calibrated(model, "kl=0.01", requests(24, seed=7))


@pytest.mark.parametrize(
    ("made", "changes", "error", "said"),
    [
        (requests(15), {}, BadInput, "15 requests are too few: .* at least 16"),
        (requests(16, lengths=(300, 301)), {}, BadInput, "request 1 takes 306 tokens .* reads 256"),
        (requests(16), {"scope": "both"}, BadInput, "one at a time"),
        (requests(16), {"layer_groups": 3}, InvalidPolicy, "does not divide"),
    ],
)
def test_what_cannot_be_calibrated(model, made, changes, error, said):
    with pytest.raises(error, match=said):
        calibrated(model, "kl=0.01", made, **changes)
