"""The paper's experiments: requests that are what they say, ratios known in advance, other requests predict."""

import json
import math

import pytest
import torch

from jointkv.errors import BadInput, InvalidPolicy
from jointkv.evaluate.datasets import base, get_dataset
from jointkv.evaluate.datasets.hub import HubUnavailable
from jointkv.evaluate.paper.batch import growth
from jointkv.evaluate.paper.chunks import documents
from jointkv.evaluate.paper.experiments import run_paper, steps
from jointkv.evaluate.paper.result import BatchRow
from jointkv.evaluate.paper.setup import QUESTION_TOKENS, PaperSettings, Setup, sample
from jointkv.evaluate.samples import packaged
from jointkv.evaluate.traffic.base import encode
from jointkv.hf.models import load_model
from jointkv.policy import FusionPolicy
from tests.evaluate.random_models import random_llama
from tests.evaluate.toy_tokenizers import MAKERS

LAYERS, FUSED, BLOCK = 6, 2, 4
ALWAYS, NEVER = -1.0, 1.0
THERAPY = "Synthetic Therapy Conversations"


@pytest.fixture(scope="module")
def tokenizer():
    return MAKERS["single_digits"]()


@pytest.fixture(scope="module")
def model(tokenizer):
    return random_llama(tokenizer, LAYERS)


@pytest.fixture(autouse=True)
def data_dir(tmp_path, monkeypatch):
    """A data folder with two small sets; no hub is asked."""

    def unavailable(*_, **__):
        raise HubUnavailable("no hub in tests")

    monkeypatch.setattr(base, "fetch_records", unavailable)
    monkeypatch.setenv("JOINTKV_DATA_DIR", str(tmp_path))
    novel = packaged("novel_sample.txt").read_text(encoding="utf-8")
    pieces = [novel[start : start + 1500].strip() for start in range(0, 9000, 1500)]
    write(tmp_path / "longbench/hotpotqa.jsonl", [{"prompt": p, "answers": [p[9:80], p[70:99]]} for p in pieces])
    write(tmp_path / "chat/counselling_bench_question.jsonl", [{"turns": [p[:300]]} for p in pieces])
    return tmp_path


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def small(**changes):
    sizes = {"datasets": ("GSM8K",), "thresholds": (ALWAYS, NEVER), "largest": 4, "prompt_tokens": 24}
    sizes |= {"answer_tokens": 5, "tasks": ("hotpotqa",), "chunks": 4, "chunk_tokens": 16, "block_size": BLOCK}
    sizes |= {"chunk_thresholds": (ALWAYS, NEVER), "document_answer_tokens": 6, "layers_requests": 8}
    return PaperSettings(**{**sizes, **changes})


def test_requests_have_one_length_and_true_continuations(tokenizer):
    drawn = sample("GSM8K", tokenizer, 40, small(prompt_tokens=64))
    assert not drawn.stand_in and "GSM8K" in drawn.source and len(drawn.requests) == 40
    rows = get_dataset("GSM8K").load().rows
    answered = 0
    for request in drawn.requests:
        assert (len(request.prompt), len(request.continuation)) == (65, 5)
        end = tokenizer.decode(list(request.prompt[-20:] + request.continuation))
        assert any(end in f"{row.text} {row.answers[0]}" for row in rows) or "\n\nQuestion" in end
        answered += request.text.endswith("\nAnswer:")
    assert answered > 10
    assert len({request.prompt for request in drawn.requests}) == 40


def test_requests_begin_with_the_beginning_of_sequence(tokenizer):
    with_bos = MAKERS["with_bos"]()
    for request in sample("GSM8K", with_bos, 5, small()).requests:
        assert request.prompt[0] == with_bos.bos_token_id and with_bos.bos_token_id not in request.prompt[1:]
        assert len(request.prompt) == 25


def test_a_small_data_set_gives_shorter_requests_or_is_refused(tokenizer):
    drawn = sample(THERAPY, tokenizer, 6, small(prompt_tokens=256))
    shortest = min(len(encode(tokenizer, row.text)) for row in get_dataset(THERAPY).load().rows)
    [length] = {len(request.prompt) - 1 for request in drawn.requests}
    assert drawn.stand_in and length % BLOCK == 0 and shortest - 5 - 2 * BLOCK < length < 256
    with pytest.raises(BadInput, match=r"6 requests of 8 tokens; 7 are needed"):
        sample(THERAPY, tokenizer, 7, small())


def test_ratio_and_answers_of_batches_where_all_blocks_or_none_match(model, tokenizer):
    seen = []
    settings = small()
    found = run_paper(model, tokenizer, settings, ("batch",), seen.append)
    assert len(seen) == steps(settings, ("batch",)) and not found.chunk and not found.layers
    assert [(row.batch, row.threshold) for row in found.batch] == [
        (size, threshold) for size in (2, 4) for threshold in (ALWAYS, NEVER, None)
    ]
    for row in found.batch:
        assert row.prompt_tokens == 24 and row.nll_unfused > 0
        if row.threshold == ALWAYS:
            assert row.ratio_fused_layers == row.batch and row.kl > 0.01
            assert row.ratio == pytest.approx(LAYERS * row.batch / (FUSED + (LAYERS - FUSED) * row.batch))
        if row.threshold == NEVER:
            assert row.ratio == row.ratio_fused_layers == 1 and row.kl < 1e-6 and row.top1 == 1
            assert row.f1 == row.f1_unfused and row.nll == pytest.approx(row.nll_unfused)
    assert found.growth == []


def test_what_is_written_after_the_prompt_is_not_fused(model, tokenizer):
    settings = small()
    setup = Setup(model, tokenizer, settings)
    batch = setup.prefilled(sample("GSM8K", tokenizer, 3, settings))
    held = setup.held(batch, FusionPolicy.preset("paper", key_threshold=ALWAYS))
    before = held.cache.pool.stats()["pages_used"]
    held.feed(torch.ones(3, BLOCK, dtype=torch.long))
    assert held.cache.pool.stats()["pages_used"] == before + 3 * LAYERS
    assert batch.state["fusable"].all()


def test_growth_tells_a_logarithm_from_a_line():
    def rows(name, ratio):
        blank = dict.fromkeys(BatchRow.model_fields, 0) | {"dataset": name, "source": "", "stand_in": False}
        return [
            BatchRow(
                **{**blank, "policy": "paper", "batch": size, "ratio": 2.0, "ratio_fused_layers": ratio(size)},
            )
            for size in (2, 4, 8, 16, 32)
        ]

    made = rows("log", lambda b: 1 + 2 * math.log(b)) + rows("line", lambda b: 1 + b / 9) + rows("flat", lambda b: 1.0)
    log, line, flat = (row for row in growth(made) if row.ratio == "ratio_fused_layers")
    assert all(row.r2_log is None for row in growth(made) if row.ratio == "ratio")
    assert log.r2_log == pytest.approx(1) and log.slope_log == pytest.approx(2) and log.r2_linear < 0.9
    assert line.r2_linear == pytest.approx(1) and line.r2_log < 0.9 and line.sizes == 5
    assert flat.r2_log is None and flat.r2_linear is None


def test_chunks_of_documents(model, tokenizer):
    settings = small()
    found = run_paper(model, tokenizer, settings, ("chunk",)).chunk
    assert [row.threshold for row in found] == [ALWAYS, NEVER, None]
    every, none, _ = found
    assert every.ratio_fused_layers == settings.chunks and every.prompt_tokens == 64 and every.documents == 2
    assert none.ratio == 1 and none.kl < 1e-6 and none.score == none.score_unfused and none.metric == "token F1"
    read = documents("hotpotqa", tokenizer, settings)
    lost = scored = 0.0
    for example, request in zip(read.examples, read.requests, strict=True):
        true = list(example.request.prompt + tuple(encode(tokenizer, f" {example.references[0]}")))
        assert len(example.request.prompt) == 64 + QUESTION_TOKENS
        assert true[:65] == list(request.prompt) and true[65:][: len(request.continuation)] == list(
            request.continuation
        )
        assert len(request.continuation) == QUESTION_TOKENS - 1 + settings.answer_tokens
        with torch.inference_mode():
            log = model(torch.tensor([true])).logits[0].log_softmax(-1)
        for place in range(65, 65 + len(request.continuation)):
            lost, scored = lost - float(log[place - 1, true[place]]), scored + 1
    assert every.scored_tokens == scored and every.nll_unfused == pytest.approx(lost / scored, rel=1e-4)


def test_answers_of_documents_are_those_of_the_plain_model(model, tokenizer, monkeypatch):
    settings = small(documents=1)
    read = documents("hotpotqa", tokenizer, settings)
    prompt = torch.tensor([read.examples[0].request.prompt])
    plain = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False, eos_token_id=None
    )
    expected = tokenizer.decode(plain[0, prompt.shape[1] :], skip_special_tokens=True)
    answers = []
    monkeypatch.setattr(type(read.task), "score", lambda self, answer, example: answers.append(answer) or 0.0)
    run_paper(model, tokenizer, settings, ("chunk",))
    assert answers[0] == answers[2] == expected


def test_layers_are_predicted_from_other_requests(model, tokenizer):
    settings = small(thresholds=(ALWAYS, 0.5, NEVER))
    rows = run_paper(model, tokenizer, settings, ("layers",)).layers
    assert [(row.threshold, row.layer) for row in rows] == [(t, layer) for t in settings.thresholds for layer in (2, 3)]
    for row in rows:
        assert row.poisson_low <= row.poisson <= row.poisson_high and row.low <= row.rarefaction <= row.high
        if row.threshold == ALWAYS:
            assert row.measured == row.poisson == row.tree == row.rarefaction == 8
        if row.threshold == NEVER:
            assert row.measured == row.poisson == row.tree == 1 and row.dispersion is None
    other = sample("GSM8K", tokenizer, 16, settings).requests[8:]
    with torch.inference_mode():
        caches = [model(torch.tensor([each.prompt[:-1]])).past_key_values for each in other]
    keys = torch.cat([cache.layers[2].keys for cache in caches]).transpose(1, 2).reshape(8, 24 // BLOCK, -1)
    unit = torch.nn.functional.normalize(keys, dim=-1).transpose(0, 1)
    share = ((unit @ unit.transpose(1, 2)) >= 0.5).float()
    assert rows[2].match_probability == pytest.approx(float((share.sum((1, 2)) - 8).mean() / 56), abs=1e-6)
    assert 0 < rows[2].match_probability < 1


def test_layers_and_batches_share_a_prefill(model, tokenizer, monkeypatch):
    passes = []
    monkeypatch.setattr(Setup, "prefill", counted := _counted(Setup.prefill, passes))
    found = run_paper(model, tokenizer, small(), ("batch", "layers"))
    assert counted and passes == [16] and len(found.batch) == 6 and len(found.layers) == 4


def _counted(method, passes):
    def prefill(self, requests, at_once):
        passes.append(len(requests))
        return method(self, requests, at_once)

    return prefill


@pytest.mark.parametrize(
    ("changes", "parts", "message"),
    [
        ({"prompt_tokens": 600}, ("batch",), "the model reads 512"),
        ({"chunk_tokens": 200}, ("chunk",), "the model reads 512"),
        ({"chunk_tokens": 18}, ("chunk",), "chunk_tokens: 18 is no multiple"),
        ({"layers_requests": 4}, ("layers",), "layers_requests: 4"),
        ({"datasets": ("HelpSteer",)}, ("batch",), "HelpSteer"),
        ({"tasks": ("lcc",)}, ("chunk",), "lcc"),
        ({"documents": 9}, ("chunk",), "6 documents of 96 tokens; 9 are needed"),
        ({}, ("layer",), "unknown part 'layer'"),
        ({"thresholds": (1.5,)}, ("batch",), "key_threshold"),
    ],
)
def test_bad_input_is_refused_before_anything_is_prefilled(model, tokenizer, changes, parts, message):
    seen = []
    with pytest.raises((BadInput, InvalidPolicy), match=message):
        run_paper(model, tokenizer, small(**changes), parts, seen.append)
    assert not seen


@pytest.mark.real_model
@pytest.mark.slow
def test_keys_alone_ruin_unrelated_requests_and_safe_does_not():
    model, tokenizer = load_model("smollm2", dtype="float32")
    settings = PaperSettings(datasets=("GSM8K",), largest=4, prompt_tokens=64)
    rows = {row.threshold: row for row in run_paper(model, tokenizer, settings, ("batch",)).batch if row.batch == 4}
    assert rows[0.75].ratio > 1.2 and rows[0.75].nll > rows[0.75].nll_unfused + 0.1
    assert rows[0.75].ratio > rows[0.9].ratio and rows[0.75].kl > 10 * rows[0.9].kl
    assert rows[None].kl <= 0.001 and rows[None].f1 == rows[None].f1_unfused
