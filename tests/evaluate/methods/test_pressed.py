"""The methods of kvpress; run in the environment of `make setup-eval`."""

from typing import Any

import pytest
import torch

from jointkv.evaluate.compare.comparison import run_methods
from jointkv.evaluate.holding.batch import Batch
from jointkv.evaluate.methods import get_method
from jointkv.evaluate.methods.pressed import Pressed
from tests.evaluate.methods.tiny_batches import LAYERS, PER_TOKEN, batch_of, build_model, different

pytest.importorskip("kvpress")

PRESSES = ("snapkv", "expected_attention", "knorm", "tova", "streaming_llm")


@pytest.mark.parametrize("name", PRESSES)
@pytest.mark.parametrize("level", [0.75, 0.25])
def test_the_share_of_tokens_is_kept_in_every_layer(name, level):
    # SnapKV always keeps the last 64 tokens and needs a longer prompt than that.
    batch = batch_of(different(length=101))
    held = get_method(name).hold(batch, level)
    kept = [int(length * level) for length in batch.lengths]
    assert held.counted == "tensors" and held.nbytes == sum(kept) * PER_TOKEN * 4
    assert not batch.model.model.layers[0].self_attn._forward_hooks


@pytest.mark.parametrize("name", PRESSES)
def test_fewer_tokens_cost_more(name):
    method = get_method(name)
    rows = list(run_methods(batch_of(different(length=101)), [(method, 0.95), (method, 0.2)]))
    assert [row.not_run for row in rows] == [None, None]
    assert 1e-6 < rows[0].kl < rows[1].kl


def test_tokens_keep_their_true_positions():
    batch = batch_of(different(rows=1))
    held: Any = get_method("streaming_llm").hold(batch, 0.5)
    assert held._positions == [len(batch.requests[0].prompt) - 1]
    last = batch.dense[0].layers[0].keys[:, :, -10:]
    assert torch.isin(held._caches[0].layers[0].keys, last).sum() >= last.numel()


def test_any_share_can_be_asked_for():
    method = get_method("tova")
    assert isinstance(method, Pressed) and method.level_for_share(0.37) == 0.37 and method.level_for_share(1.5) is None


@pytest.fixture
def model_folder(tmp_path):
    """A model with a tokenizer beside it, which KVzip wants."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {f"w{i}": i for i in range(95)} | {"<unk>": 95, "Repeat": 96}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(tmp_path)
    build_model().save_pretrained(tmp_path)
    return tmp_path


def test_kvzip_masks_the_share_it_drops_and_leaves_no_mask_behind(model_folder):
    from transformers import AutoModelForCausalLM

    batch = Batch(AutoModelForCausalLM.from_pretrained(model_folder).eval(), different(), 4)
    method = get_method("kvzip")
    rows = list(
        run_methods(batch, [(method, 1.0), (method, 0.8), (method, 0.3), (get_method("unfused"), 1.0)], generate=3)
    )
    assert [row.not_run for row in rows] == [None] * 4
    assert rows[0].kl < 1e-9 < rows[1].kl < rows[2].kl
    assert rows[3].kl < 1e-9 and rows[0].counted == "predicted"
    for row, level in zip(rows, (1.0, 0.8, 0.3), strict=False):
        assert row.share == pytest.approx(level, abs=0.01)
    assert len(batch.model.model.layers) == LAYERS
