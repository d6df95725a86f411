"""The study of skipped blocks: samples that are what they say, ratios known in advance, limits that hold."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from jointkv.core.blocks import PagedKV, served_errors
from jointkv.errors import BadInput
from jointkv.evaluate.reuse.cases import Cases, draw_cases
from jointkv.evaluate.reuse.experiment import measure, run_reuse, steps, study
from jointkv.evaluate.reuse.headers import KINDS
from jointkv.evaluate.reuse.limits import NOTHING, Scored, count, held_out, largest_limit
from jointkv.evaluate.reuse.pairs import pair_ratios, prefilled
from jointkv.evaluate.reuse.predictors import NEVER, PREDICTORS
from jointkv.evaluate.reuse.result import ALL, ReuseResult
from jointkv.evaluate.reuse.setup import UNIT, ReuseSettings, samples
from tests.evaluate.random_models import random_llama
from tests.evaluate.toy_tokenizers import MAKERS

SIZES = {"texts": 2, "headers": 8, "header_tokens": 96, "text_tokens": 96, "block_sizes": (16, 32)}
SMALL = ReuseSettings(**SIZES, sources=(1, 3), witnesses=(0, 2, 4), draws=20)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def tokenizer():
    return MAKERS["single_digits"]()


@pytest.fixture(scope="module")
def model(tokenizer):
    return random_llama(tokenizer, layers=3)


@pytest.fixture(scope="module")
def measured(model, tokenizer):
    return measure(model, samples(tokenizer, SMALL), SMALL, lambda line: None)


def cases_of(measured, witnesses: int = 4, sources: int = 3) -> list[Cases]:
    rng = np.random.default_rng(0)
    return [draw_cases(sample, ratios[16], 96, sources, witnesses, 30, rng) for sample, ratios in measured]


def test_samples_differ_in_the_header_alone(tokenizer):
    made = samples(tokenizer, SMALL)
    assert [sample.kind for sample in made] == [kind for kind in KINDS for _ in range(2)]
    for sample in made:
        prompts = [request.prompt for request in sample.requests]
        assert {len(prompt) for prompt in prompts} == {96 + 96 + 1}
        assert len({prompt[:96] for prompt in prompts}) == 8 and len({prompt[96:] for prompt in prompts}) == 1
    assert samples(tokenizer, SMALL) == made
    assert samples(tokenizer, ReuseSettings(**SIZES, seed=1)) != made  # type: ignore[arg-type]


def test_ratios_are_errors_over_bounds(model, tokenizer):
    [sample, *_] = samples(tokenizer, SMALL)
    batch = prefilled(model, sample)
    found = pair_ratios(batch, SMALL)
    layers = range(batch.layers)
    kv = PagedKV(*([batch.state[f"{side}.{layer}"] for layer in layers] for side in ("key", "value")))
    table = batch.table[:, 96 // UNIT :]
    for donor, target in ((0, 1), (5, 2)):
        errors = served_errors(kv, table[target, :6], table[donor, :6], "rms")
        expected = torch.maximum(torch.maximum(errors.key, errors.value) / 0.2, errors.token / 0.3)
        assert np.allclose(found[16][donor, target], expected.numpy(), rtol=1e-4)
    assert found[32].shape == (8, 8, 3) and (np.diagonal(found[32]) == 0).all()
    # The worst token of a block is the worst of its halves; means lie between them.
    halves = found[16].reshape(8, 8, 3, 2)
    assert (found[32] <= halves.max(-1) * 1.5 + 1e-5).all() and (found[32] >= halves.min(-1) - 1e-5).all()


def test_a_request_never_testifies_for_itself(measured):
    for case in cases_of(measured):
        assert (case.entry > 0).all() and (case.witness_entry > 0).all() and (case.other_entry > 0).all()
        # The nearest source serves.
        assert (case.entry[:, None] <= case.other_near).all()
        assert case.true.shape == (30, 5) and case.share == pytest.approx(80 / 192)


@pytest.mark.parametrize("name", PREDICTORS)
def test_predictors_score_every_block(name, measured):
    predictor = PREDICTORS[name]
    for case in cases_of(measured):
        score = predictor.score(case)
        assert score.shape == case.true.shape and not np.isnan(score).any() and (score > -np.inf).all()


def test_blocks_with_new_echoes_are_never_reused(measured):
    for case in cases_of(measured):
        covered = case.own_echo | np.bitwise_or.reduce(case.witness_echo, axis=1)
        new = case.echo & ~covered != 0
        for name in ("echoes covered", "echoes explain"):
            assert (PREDICTORS[name].score(case)[new] == NEVER).all()


def scored(score: list[float], missed: list[bool], fold: int = 0, kind: str = "ids") -> Scored:
    return Scored(kind, fold, np.array([score], np.float32), np.array([missed]), 0.5)


def test_the_largest_limit_keeps_the_rate():
    one = scored([0.1, 0.2, 0.3, 0.4, np.inf], [False, False, True, False, False])
    assert largest_limit([one], 0.25) == pytest.approx(0.4)
    assert largest_limit([one], 0.2) == pytest.approx(0.2)
    # Equal scores are reused together.
    assert largest_limit([scored([0.1, 0.1], [False, True])], 0.4) == NOTHING
    counted = count([one], 0.4)
    assert (counted.skipped, counted.missed_share, counted.reused) == (0.4, 0.25, 4)
    assert count([one], NOTHING).missed_share is None


def test_limits_come_from_the_other_texts():
    good, bad = scored([0.1, 0.9], [False, False]), scored([0.1, 0.9], [False, True], fold=1)
    found = held_out([good, bad], 0.0)["ids"]
    # Chosen on the bad one: 0.1, used on the good one; chosen on the good one: 0.9, which misses.
    assert (found.reused, found.missed) == (3, 1)
    assert held_out([good, bad, scored([0.1], [True], kind="names")], 0.0, "names")["names"].reused == 0


def test_the_study_measures_every_predictor_with_evidence_enough(measured):
    result = study(measured, "tiny", "float32", SMALL, lambda line: None)
    assert len(result.texts) == 2 * 8
    asked = {(row.sources, row.witnesses, row.predictor) for row in result.held_out}
    assert (1, 0, "entry") in asked and (1, 0, "witnesses") not in asked
    assert (3, 4, "two sources") in asked and (1, 4, "two sources") not in asked
    together = [row for row in result.held_out if row.chosen == "all"]
    assert all(set(row.shares) == {*KINDS, ALL} for row in together)
    for row in together:
        assert row.shares[ALL].reused == sum(row.shares[kind].reused for kind in KINDS)
    assert len(result.rule) == 2 * 6 and {curve.block_size for curve in result.curves} == {16, 32}
    written = result.model_dump_json()
    assert ReuseResult.model_validate_json(written).model_dump_json() == written


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kinds": ("poems",)}, "unknown kind of headers 'poems'"),
        ({"headers": 7}, "headers: 7 is less than 8"),
        ({"texts": 1}, "texts: 1 is less than 2"),
        ({"block_sizes": (24,)}, "block size 24"),
        ({"text_tokens": 480}, "the model reads 512"),
        ({"sources": (0,)}, "sources must be at least 1"),
        ({"headers": 400, "kinds": ("names",)}, "names: [0-9]+ headers"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes, words, model, tokenizer):
    settings = ReuseSettings(**{**SIZES, **changes})
    with pytest.raises(BadInput, match=words):
        run_reuse(model, tokenizer, "tiny", "float32", settings, lambda line: None)


def test_every_step_is_reported(model, tokenizer):
    settings = ReuseSettings(**{**SIZES, "kinds": ("ids",)}, sources=(1,), witnesses=(2,), draws=2)  # type: ignore[arg-type]
    lines: list[str] = []
    run_reuse(model, tokenizer, "tiny", "float32", settings, lines.append)
    assert len(lines) == steps(settings) == 4
