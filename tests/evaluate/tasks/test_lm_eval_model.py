"""`jointkv` in lm-evaluation-harness: as its own model when nothing differs, and refusals."""

import json

import pytest
import torch
import transformers

lm_eval = pytest.importorskip("lm_eval")
tokenizers = pytest.importorskip("tokenizers")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from jointkv.errors import BadInput, InvalidPolicy  # noqa: E402
from jointkv.evaluate.tasks.lm_eval_model import JointKVLM  # noqa: E402

WORDS = [f"w{number}" for number in range(60)]
SHARED = " ".join(WORDS[:40])
EXACT = {"max_relative_error": 0.0, "max_token_error": 0.0, "block_size": 4}


@pytest.fixture
def parts():
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<end>", "<unk>", *WORDS])}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<end>", unk_token="<unk>"
    )
    config = transformers.LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    return {"pretrained": transformers.LlamaForCausalLM(config).eval(), "tokenizer": tokenizer}


def generations(model, contexts, length=6):
    arguments = {"until": ["w7"], "max_gen_toks": length, "do_sample": False}
    requests = [Instance("generate_until", {}, (context, arguments), 0) for context in contexts]
    return model.generate_until(requests, disable_tqdm=True)


def likelihoods(model, pairs):
    return model.loglikelihood([Instance("loglikelihood", {}, pair, 0) for pair in pairs], disable_tqdm=True)


CONTEXTS = [f"{SHARED} w4{i} w5{i % 5}" for i in range(5)] + ["w1 w2", "w50"]
PAIRS = [(context, f" {answer}") for context in CONTEXTS for answer in ("w9 w10 w11", "w58")]


@pytest.mark.parametrize("policy", [{"policy": "off", "block_size": 4}, EXACT])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_without_error_it_answers_as_the_stock_model(parts, policy, batch_size):
    stock = HFLM(**parts, batch_size=batch_size)
    expected, expected_scores = generations(stock, CONTEXTS), likelihoods(stock, PAIRS)
    model = JointKVLM(**parts, batch_size=batch_size, **policy)
    assert generations(model, CONTEXTS) == expected and len(set(expected)) > 2
    scores = likelihoods(model, PAIRS)
    assert [greedy for _, greedy in scores] == [greedy for _, greedy in expected_scores]
    assert [value for value, _ in scores] == pytest.approx([value for value, _ in expected_scores], abs=1e-4)
    model.pool.check_integrity()
    assert model.pool.stats()["pages_used"] == 0 and model.pool.stats()["fusion"] != "faulted"


def test_only_a_batch_shares_pages(parts):
    held = {}
    for batch_size in (1, 5):
        model = JointKVLM(**parts, batch_size=batch_size, **EXACT)
        generations(model, CONTEXTS[:5])
        held[batch_size] = (model.prompt_references, model.prompt_pages)
    # 42 tokens are 11 blocks of 4, of which 10 are the shared words.
    assert held == {1: (55, 55), 5: (55, 15)}


def test_a_context_asked_for_several_times_is_no_sharing(parts):
    choices = [(CONTEXTS[0], f" w{number}") for number in range(9, 13)]
    # 42 tokens are 11 blocks; the last token is fed with the continuation, and 41 are as many.
    for exact, pairs, held in ((EXACT, choices, (11, 11)), (EXACT, [*choices, (CONTEXTS[1], " w9")], (22, 12))):
        model = JointKVLM(**parts, batch_size=5, **exact)
        scores = likelihoods(model, pairs)
        assert (model.prompt_references, model.prompt_pages) == held
        expected = likelihoods(HFLM(**parts, batch_size=1), pairs)
        assert [value for value, _ in scores] == pytest.approx([value for value, _ in expected], abs=1e-4)
        model.pool.check_integrity()
    model = JointKVLM(**parts, batch_size=4, **EXACT)
    assert len(set(generations(model, [CONTEXTS[0]] * 4))) == 1
    assert (model.prompt_references, model.prompt_pages) == (11, 11)


def test_likelihoods_read_the_fused_context(parts):
    pairs = [(" ".join(WORDS[i::3]), " w9 w10") for i in range(3)]
    expected = likelihoods(HFLM(**parts, batch_size=3), pairs)
    changes = {"key_threshold": -1.0, "skip_first_layers": 0, "skip_last_layers": 0, "block_size": 4}
    ruined = JointKVLM(**parts, batch_size=3, policy="paper", **changes)
    scores = likelihoods(ruined, pairs)
    assert ruined.prompt_pages < ruined.prompt_references
    assert max(abs(a - b) for (a, _), (b, _) in zip(expected, scores, strict=True)) > 0.01


def test_the_harness_runs_a_task_and_reports_the_policy(parts, tmp_path):
    rows = [{"question": context, "answer": "w9"} for context in CONTEXTS[:4]]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "toy.yaml").write_text(
        f"""task: jointkv_toy
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / "rows.jsonl"}}}, cache_dir: {tmp_path / "cache"}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["w7"], max_gen_toks: 4, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""
    )
    found = {}
    for name, model in (
        ("stock", HFLM(**parts, batch_size=4)),
        ("jointkv", JointKVLM(**parts, batch_size=4, **EXACT)),
    ):
        manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
        found[name] = lm_eval.simple_evaluate(
            model=model, tasks=["jointkv_toy"], task_manager=manager, bootstrap_iters=0, log_samples=True
        )
    answers = {name: [one["resps"] for one in result["samples"]["jointkv_toy"]] for name, result in found.items()}
    assert answers["jointkv"] == answers["stock"] and len(answers["stock"]) == 4
    info = model.get_model_info()["jointkv"]
    assert info["policy"]["max_relative_error"] == 0.0 and info["prompt_pages"] < info["prompt_references"]
    assert found["jointkv"]["config"]["jointkv"]["block_size"] == 4


def test_refusals(parts):
    with pytest.raises(BadInput, match="batch_size: give a number"):
        JointKVLM(**parts, batch_size="auto")
    with pytest.raises(InvalidPolicy, match="preset: 'best'"):
        JointKVLM(**parts, policy="best")
    model = JointKVLM(**parts)
    with pytest.raises(NotImplementedError, match="jointkv evaluate"):
        model.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (SHARED,), 0)])
    with pytest.raises(BadInput, match="leaves no room for its context"):
        likelihoods(model, [("w1", " w2" * 200)])


def test_the_harness_knows_the_name():
    assert lm_eval.api.registry.get_model("jointkv") is JointKVLM
