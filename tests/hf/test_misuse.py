"""What cannot be done with a pool, a cache or a layer is refused by a named error that says what to do instead."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
import transformers

from jointkv.errors import BadInput, InvalidPolicy, JointKVError, LayoutError, UnsupportedModel, UnsupportedUse
from jointkv.hf.cache import JointCache
from jointkv.hf.pool import JointPool
from jointkv.hf.reuse import ReuseOptions
from jointkv.policy import FusionPolicy
from tests.hf.tiny_models import build_model, generate, joint, prompts, step, stock_cache

IDS, MASK = prompts(9, 5)


@pytest.fixture(scope="module")
def served():
    return joint("llama", "safe")


def held(served):
    cache = JointCache(served[1])
    step(served[0], cache, IDS, MASK)
    return cache


@pytest.mark.parametrize("name", ["block_size", "max_pages"])
@pytest.mark.parametrize("number", [-1, 0, 1.5, True, "16"], ids=repr)
def test_sizes_must_be_whole_numbers(served, name, number):
    with pytest.raises(InvalidPolicy, match=f"{name}: .* is not a whole number of at least 1"):
        JointPool(served[0], **{name: number})


@pytest.mark.parametrize("policy", [None, 3, FusionPolicy])
def test_a_policy_must_be_one(served, policy):
    with pytest.raises(InvalidPolicy, match="no FusionPolicy"):
        JointPool(served[0], policy)


@pytest.mark.parametrize("model", ["smollm2", None, transformers.LlamaConfig(), torch.nn.Linear(2, 2)], ids=repr)
def test_a_pool_needs_a_loaded_model(model):
    with pytest.raises(UnsupportedUse, match="from_pretrained"):
        JointPool(model)


def test_encoders_are_refused():
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = transformers.BertConfig(**sizes, vocab_size=97)
    for model_class in (transformers.BertModel, transformers.BertForMaskedLM):
        with pytest.raises(UnsupportedModel, match="is an encoder"):
            JointPool(model_class(config))
    with pytest.raises(UnsupportedModel, match="ViTModel has no KV cache"):
        JointPool(transformers.ViTModel(transformers.ViTConfig(**sizes)))
    decoder = transformers.BertLMHeadModel(transformers.BertConfig(**sizes, vocab_size=97, is_decoder=True)).eval()
    pool = JointPool(decoder, "off")
    expected = generate(decoder, (IDS, MASK), stock_cache(decoder), tokens=3)
    assert torch.equal(expected.sequences, generate(decoder, (IDS, MASK), JointCache(pool), tokens=3).sequences)


@pytest.mark.parametrize("given", ["model", "name", "None"])
def test_a_cache_needs_a_pool(served, given):
    pool = {"model": served[0], "name": "smollm2", "None": None}[given]
    with pytest.raises(UnsupportedUse, match=r"JointCache\(JointPool\(model\)\)"):
        JointCache(pool)


@pytest.mark.parametrize("key", [{"a": 1}, ["a", {"b"}], ("a", ["b"])], ids=repr)
def test_isolation_keys_must_be_hashable(served, key):
    with pytest.raises(BadInput, match="hashable"):
        JointCache(served[1], key)


@pytest.mark.parametrize("key", [torch.tensor([1, 2]), float("nan")], ids=repr)
def test_isolation_keys_equal_what_is_made_of_the_same_content(served, key):
    """They would have kept a tenant apart from itself without a word; a tensor often means one key for each row."""
    for given in (key, [key, "b"]):
        with pytest.raises(BadInput, match="equal what is made of the same content"):
            JointCache(served[1], given)


@pytest.mark.parametrize("size", [10**12, 10**22])
def test_pages_that_no_memory_holds(served, size):
    pool = JointPool(served[0], "off", block_size=size)
    with pytest.raises(LayoutError, match="take a smaller block_size"):
        step(served[0], JointCache(pool), IDS, MASK)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"miss_rate": "0.1"}, "reuse_miss_rate: '0.1'"),
        ({"confidence": None}, "reuse_confidence: None"),
        ({"audit_rate": True}, "reuse_audit_rate: True"),
        ({"rule": "safe"}, "no ReuseRule"),
        ({"seed": 1.5}, "reuse_seed: 1.5"),
        ({"seed": -1}, "reuse_seed: -1"),
        ({"moved": "yes"}, "moved: 'yes' is neither"),
    ],
)
def test_options_of_reuse_have_their_types(options, said):
    with pytest.raises(InvalidPolicy, match=said):
        ReuseOptions(**options)


@pytest.mark.parametrize("name", [None, 3, ["safe"]], ids=repr)
def test_a_preset_has_a_name(name):
    with pytest.raises(InvalidPolicy, match="is none of safe, paper, off"):
        FusionPolicy.preset(name)


@pytest.mark.parametrize("reuse", ["off", "probed"])
@pytest.mark.parametrize(
    ("ids", "mask", "said"),
    [
        ("Hello", None, "input_ids: prefill needs a tensor, not a str"),
        ([[1, 2, 3]], None, "not a list"),
        ({"input_ids": IDS}, None, "not a dict"),
        (IDS.numpy(), None, "not a ndarray"),
        (IDS, [[1] * 9], "attention_mask: .* not a list"),
        (IDS.float(), None, "whole numbers, not torch.float32"),
        (IDS.bool(), None, "whole numbers, not torch.bool"),
        (IDS[0], None, r"\[rows, length\], got \[9\]"),
        (IDS[:0], None, r"got \[0, 9\]"),
    ],
)
def test_a_prefill_takes_tensors_of_token_ids(served, reuse, ids, mask, said):
    with pytest.raises(LayoutError, match=said):
        JointCache(JointPool(served[0], "safe", reuse=reuse)).prefill(served[0], ids, mask)


@pytest.mark.parametrize("model", ["smollm2", None], ids=repr)
def test_a_prefill_takes_the_model(served, model):
    with pytest.raises(UnsupportedUse, match="prefill needs the model of the pool"):
        JointCache(served[1]).prefill(model, IDS)


@pytest.mark.parametrize("call", ["generate", "forward"])
def test_a_pool_in_the_place_of_a_cache(served, call):
    model, pool = served
    with pytest.raises(UnsupportedUse, match=r"past_key_values=JointCache\(pool\)"):
        if call == "generate":
            generate(model, (IDS, MASK), pool)
        else:
            step(model, pool, IDS)
    assert not hasattr(pool, "get_seq_length") and not hasattr(pool, "nonsense")


def test_a_cache_of_another_model(served):
    """Of equal shape it would have read and offered the wrong K and V."""
    for other in (joint("llama", seed=1)[0], joint("qwen2")[0], copy.deepcopy(served[0])):
        cache = JointCache(served[1])
        with pytest.raises(UnsupportedUse, match="another model"):
            generate(other, (IDS, MASK), cache)
        assert cache.pages == 0
        assert other.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("way", [pickle.dumps, lambda held: torch.save(held, io.BytesIO()), copy.copy])
def test_what_is_shared_cannot_be_pickled(served, way):
    for shared, instead in ((held(served), "JointCache.save"), (served[1], "JointCache.save")):
        with pytest.raises(UnsupportedUse, match=instead):
            way(shared)


def test_a_pool_cannot_be_copied_and_a_cache_can(served):
    with pytest.raises(UnsupportedUse, match="copied"):
        copy.deepcopy(served[1])
    copy.deepcopy(held(served)).check_integrity()


@pytest.mark.parametrize("policy", ["safe", "paper"])
def test_k_and_v_can_be_read_from_a_layer(policy):
    model, pool = joint("llama", FusionPolicy.preset(policy))
    ids, mask = prompts(9, 5)
    theirs, ours = stock_cache(model), JointCache(pool)
    assert ours.layers[0].keys is None and ours.layers[0].values is None
    for cache in (theirs, ours):
        step(model, cache, ids, mask)
    for stock, layer in zip(theirs.layers, ours.layers, strict=True):
        for expected, read in ((stock.keys, layer.keys), (stock.values, layer.values)):
            assert read.shape == expected.shape
            torch.testing.assert_close(read, expected * mask[:, None, :, None])
    first: Any = ours.layers[0]
    first.keys.zero_()
    assert first.keys.any(), "what is read is a copy"


@pytest.mark.parametrize("side", ["keys", "values"])
def test_k_and_v_of_a_layer_cannot_be_assigned(served, side):
    """As those do who compress a cache; pages are read by others too."""
    cache = held(served)
    with pytest.raises(UnsupportedUse, match="DynamicCache"):
        setattr(cache.layers[0], side, torch.zeros(1))


def test_pages_are_not_offloaded(served):
    cache = held(served)
    for move in (lambda: cache.offload(0), cache.layers[0].offload, cache.layers[0].prefetch):
        with pytest.raises(UnsupportedUse, match=r"offloading=True"):
            move()


@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        ("reset", ()),
        ("crop", (-1,)),
        ("reorder_cache", (torch.tensor([1, 0]),)),
        ("batch_repeat_interleave", (2,)),
        ("batch_select_indices", (torch.tensor([0]),)),
    ],
)
def test_a_layer_does_alone_nothing_that_concerns_all(served, method, arguments):
    cache = held(served)
    with pytest.raises(UnsupportedUse, match="of the cache"):
        getattr(cache.layers[0], method)(*arguments)
    getattr(cache, method)(*arguments)
    cache.check_integrity()


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize(
    ("method", "argument", "error"),
    [
        ("crop", "3", BadInput),
        ("crop", None, BadInput),
        ("crop", 1.5, BadInput),
        ("reorder_cache", [1, 0], LayoutError),
        ("reorder_cache", torch.tensor([2, 0]), LayoutError),
        ("reorder_cache", torch.tensor([-1, 0]), LayoutError),
        ("reorder_cache", torch.tensor([0.5, 0]), LayoutError),
        ("batch_select_indices", [0], LayoutError),
        ("batch_select_indices", torch.tensor([2]), LayoutError),
        ("batch_select_indices", torch.tensor([True]), LayoutError),
        ("batch_repeat_interleave", -1, LayoutError),
        ("batch_repeat_interleave", 1.5, LayoutError),
        ("batch_repeat_interleave", "2", LayoutError),
    ],
)
def test_an_operation_that_names_no_rows_changes_nothing(name, method, argument, error):
    model, pool = joint(name, "safe")
    cache = JointCache(pool)
    step(model, cache, IDS, MASK)
    with pytest.raises(error, match=r"repeats|rows|crop"):
        getattr(cache, method)(argument)
    cache.check_integrity()
    assert cache.batch_size == 2 and {layer.keys.shape[0] for layer in cache.layers} == {2}


@pytest.mark.parametrize("pool", ["model", "path", None], ids=repr)
def test_a_cache_is_loaded_into_a_pool(served, tmp_path, pool):
    given = {"model": served[0], "path": tmp_path}.get(pool)
    with pytest.raises(UnsupportedUse, match="a cache needs a JointPool"):
        JointCache.load(tmp_path / "cache", given)


@pytest.mark.parametrize("path", [None, 3, ["a"], b"a"], ids=repr)
def test_a_cache_is_saved_to_a_path(served, path):
    with pytest.raises(BadInput, match="cannot write"):
        held(served).save(path)


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}])
def test_keys_of_rows_with_several_sequences_a_prompt(served, options):
    model, pool = served
    with pytest.raises(LayoutError, match="num_beams"):
        generate(model, (IDS, MASK), JointCache(pool, ["a", "b"]), tokens=2, output_logits=False, **options)
    cache = JointCache(pool, ["a", "a", "b", "b"])
    generate(model, (IDS, MASK), cache, tokens=2, output_logits=False, **options)
    assert cache.batch.tenants == ["a", "a", "b", "b"]


def test_each_of_these_is_an_error_of_jointkv():
    assert issubclass(UnsupportedUse, JointKVError)
    assert issubclass(UnsupportedUse, TypeError) and issubclass(UnsupportedUse, AttributeError)
    with pytest.raises(TypeError):
        JointCache(build_model("llama"))


@pytest.mark.parametrize("columns", [3, 6, 10])
def test_a_mask_that_is_not_of_all_tokens(served, columns):
    """Of a shorter one transformers hides the last tokens, without a word."""
    model, pool = served
    cache = JointCache(pool)
    step(model, cache, prompts(4)[0])
    for inputs in ({"ids": prompts(3)[0]}, {"ids": None, "inputs_embeds": model.get_input_embeddings()(prompts(3)[0])}):
        with pytest.raises(LayoutError, match="must cover both"):
            step(model, cache, mask=torch.ones(1, columns, dtype=torch.long), **inputs)
    assert cache.length == 4


@pytest.mark.parametrize("assisted", ["prompt_lookup_num_tokens", "assistant_model"])
def test_assisted_generation_behind_a_cache_that_is_not_empty(served, assisted):
    """It reads the whole prompt once more, as it does behind a stock cache, whose answers are wrong then."""
    model, pool = served
    prompt = prompts(12)
    cache = JointCache(pool)
    options = {assisted: 3 if assisted.startswith("prompt") else build_model("llama", num_hidden_layers=1)}
    expected = generate(model, prompt, JointCache(pool), **options)
    step(model, cache, prompt[0][:, :-1])
    with pytest.raises(LayoutError, match="empty cache"):
        generate(model, prompt, cache, **options)
    cache.reset()
    assert torch.equal(generate(model, prompt, cache, **options).sequences, expected.sequences)
