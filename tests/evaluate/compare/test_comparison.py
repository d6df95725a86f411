"""Rows of a comparison: what is compared, what is counted, what is said of a method that cannot run."""

import dataclasses
from dataclasses import asdict

import pytest
import torch
from torch.nn.functional import one_hot

from jointkv.evaluate.compare import comparison
from jointkv.evaluate.compare.comparison import Reference, equal_bytes, run_methods
from jointkv.evaluate.compare.result import MethodRow
from jointkv.evaluate.holding.batch import Batch
from jointkv.evaluate.holding.held import ByteCount, greedy, true_logits
from jointkv.evaluate.methods import get_method
from jointkv.evaluate.methods.base import Method
from jointkv.evaluate.score.summary import summarize
from tests.evaluate.methods.tiny_batches import BLOCK, PER_TOKEN, VOCABULARY, batch_of, build_model, different


class Broken(Method):
    name, description, levels, level_means, allowed = "broken", "fails", (1.0,), "nothing", "all"

    def allows(self, level):
        return True

    def compress(self, batch, level):
        raise RuntimeError("out of luck")


class Elsewhere(Broken):
    name, packages = "elsewhere", ("no-such-distribution",)


def test_logits_are_those_of_the_true_continuation_in_one_forward_pass():
    batch = batch_of(different(rows=2))
    logits = true_logits(get_method("unfused").hold(batch, 1.0), batch.requests)
    for row, request in zip(logits, batch.requests, strict=True):
        whole = batch.model(torch.tensor([request.prompt + request.continuation])).logits[0]
        first = len(request.prompt) - 1
        torch.testing.assert_close(row, whole[first : first + len(request.continuation)], rtol=1e-3, atol=1e-3)


def test_greedy_outputs_are_those_of_generate():
    batch = batch_of(different(rows=2))
    outputs = greedy(get_method("unfused").hold(batch, 1.0), batch.requests, 5)
    for output, request in zip(outputs, batch.requests, strict=True):
        prompt = torch.tensor([request.prompt])
        generated = batch.model.generate(prompt, do_sample=False, max_new_tokens=5, eos_token_id=None)
        assert output == tuple(generated[0, prompt.shape[1] :].tolist())


def test_a_row_has_means_of_its_requests_and_survives_json():
    batch = batch_of(different(), num_hidden_layers=8)
    (row,) = run_methods(batch, [(get_method("minicache"), 0.5)], generate=3, traffic="different")
    means = asdict(summarize(row.per_request))
    assert {name: getattr(row, name) for name in means} == means
    assert len(row.per_request) == row.requests == 3 and row.kl_worst_request >= row.kl > 0
    assert (row.traffic, row.method, row.level, row.generated) == ("different", "minicache", 0.5, 3)
    assert row.common_prefix_worst_request <= row.common_prefix <= 3 and len(row.outputs[0]) == 3
    assert row.nbytes == pytest.approx(row.share * row.unfused_nbytes)
    assert MethodRow.model_validate_json(row.model_dump_json()) == row


def test_the_unfused_model_is_the_reference():
    methods = [(get_method("unfused"), 1.0), (get_method("minicache"), 0.75)]
    unfused, merged = run_methods(batch_of(different()), methods)
    assert unfused.nll == unfused.nll_reference == merged.nll_reference != merged.nll


def test_unfused_bytes_are_those_of_every_token_but_the_last():
    batch = batch_of(different())
    assert batch.unfused_nbytes == sum(len(request.prompt) - 1 for request in batch.requests) * PER_TOKEN * 4
    (row,) = run_methods(batch, [(get_method("unfused"), 1.0)])
    assert row.nbytes == row.unfused_nbytes and row.share == row.share_16bit == 1 and row.kl == 0


def test_shares_at_16_bits_do_not_shrink_packed_codes():
    batch = Batch(build_model(), different(), BLOCK)

    class HalfPacked(type(get_method("unfused"))):
        name = "half_packed"

        def compress(self, batch, level):
            held = super().compress(batch, level)
            held.nbytes_packed = held.nbytes // 2
            return held

    (row,) = run_methods(batch, [(HalfPacked(), 1.0)])
    assert row.share == 1 and row.share_16bit == pytest.approx(1.5)


def test_a_method_that_cannot_run_has_a_row_that_says_why():
    lines = []
    wanted = [(Broken(), 1.0), (Elsewhere(), 1.0), (get_method("unfused"), 1.0)]
    rows = list(run_methods(batch_of(different()), wanted, progress=lines.append))
    assert [row.not_run for row in rows] == ["RuntimeError: out of luck", "needs no-such-distribution", None]
    assert rows[0].kl is None and rows[0].nbytes is None and rows[0].per_request == ()
    assert lines[0] == "unfused reference" and "broken at 1 failed: RuntimeError: out of luck" in lines


class NotFinite(type(get_method("unfused"))):
    name = "not_finite"

    @torch.inference_mode()
    def compress(self, batch, level):
        batch.dense[0].layers[0].keys[0, 0, 0, 0] = float("nan")
        return super().compress(batch, level)


def test_logits_that_are_not_finite_are_said_not_shown_as_numbers():
    unfused, broken = run_methods(batch_of(different()), [(get_method("unfused"), 1.0), (NotFinite(), 1.0)], generate=2)
    assert unfused.not_run is None
    assert broken.not_run == "broken: logits are not finite" and broken.kl is None and broken.per_request == ()
    batch = batch_of(different())
    batch.model.lm_head.weight.data[3] = float("nan")
    (row,) = run_methods(batch, [(get_method("unfused"), 1.0)])
    assert row.not_run == "broken: the unfused model's logits are not finite"


def test_a_reference_that_fails_is_said_in_every_row():
    batch, lines = batch_of(different()), []
    batch.requests[1] = dataclasses.replace(batch.requests[1], prompt=(10_000, *batch.requests[1].prompt))
    wanted = [(get_method("minicache"), 0.5), (get_method("semantic"), 0.99)]
    rows = list(run_methods(batch, wanted, progress=lines.append, traffic="odd"))
    assert [(row.method, row.traffic) for row in rows] == [("minicache", "odd"), ("semantic", "odd")]
    assert all(row.not_run.startswith("unfused reference: IndexError: ") for row in rows)
    assert lines[1].startswith("unfused reference failed: IndexError")


def test_a_level_out_of_range_costs_its_row_only():
    bad, good = run_methods(batch_of(different()), [(get_method("minicache"), 1.5), (get_method("minicache"), 0.5)])
    assert "BadInput: minicache: level 1.5" in bad.not_run and good.not_run is None


class Says(type(get_method("unfused"))):
    """Holds the prompts, but says `outputs` whatever it is fed."""

    name = "says"

    def __init__(self, *outputs):
        self.outputs = outputs

    def compress(self, batch, level):
        held = super().compress(batch, level)
        script, step = self.outputs, iter(range(99))

        def feed(tokens):
            at = next(step)
            return one_hot(torch.tensor([[row[at]] for row in script]), VOCABULARY).float()

        fork = held.fork()
        fork.feed = feed
        held.fork = lambda: fork
        return held


def test_what_follows_an_end_token_is_not_compared(monkeypatch):
    batch = batch_of(different(), eos_token_id=[5, 6])
    told = Says((7, 8, 5, 9), (7, 8, 9, 10), (7, 6, 9, 9))
    monkeypatch.setattr(comparison, "Unfused", lambda: told)
    # The first ends like the reference, the second goes on otherwise, the third ends where the reference goes on.
    (row,) = run_methods(batch, [(Says((7, 8, 5, 4), (7, 8, 4, 10), (7, 5, 9, 9)), 1.0)], generate=4)
    assert row.not_run is None and row.generated == 4
    assert row.outputs == ((7, 8, 5), (7, 8, 4, 10), (7, 5))
    assert row.common_prefix == pytest.approx((4 + 2 + 1) / 3) and row.common_prefix_worst_request == 1


def test_byte_counts_add_up():
    total = ByteCount(100, 60, 20, 4) + ByteCount(300, 100, 60, 4)
    assert total == ByteCount(400, 160, 80, 4) and total.share == 0.4
    assert total.share_16bit == pytest.approx((80 + 80 / 2) / 200)


def test_equal_bytes_asks_for_the_share_or_takes_all_levels():
    snapkv, minicache = get_method("snapkv"), get_method("minicache")
    assert equal_bytes([snapkv], 0.37) == [(snapkv, 0.37)]
    assert equal_bytes([minicache], 0.37) == [(minicache, level) for level in minicache.levels]


def test_reference_generates_only_if_asked():
    batch = batch_of(different(rows=1))
    assert Reference.of(batch).outputs == () and len(Reference.of(batch, 2).outputs[0]) == 2
