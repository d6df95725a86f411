"""A model of transformers goes on behind pages from a store."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from jointkv.codec import Bound
from jointkv.errors import BadInput, LayoutError, UnsupportedModel
from jointkv.hf.identity import model_fingerprint
from jointkv.hf.stored import SCORED_TOKENS, cache_of, fit_transform, layout_of, prefill_pages, step_weights
from jointkv.store import PageStore, Store
from tests.hf.tiny_models import VOCABULARY, build_model

SIZE = 8
DRAW = torch.Generator().manual_seed(0)
TEXT = torch.randint(2, VOCABULARY, (5 * SIZE + 3,), generator=DRAW).tolist()


@torch.no_grad()
def test_another_process_goes_on_where_the_first_stopped(tmp_path: Path) -> None:
    model = build_model("llama")
    whole = model(input_ids=torch.tensor([TEXT])).logits[0, -3:]
    for bound, tolerance in ((Bound(0, 0), 1e-5), (Bound(0.05, 0.1), 0.2)):
        with Store(tmp_path / str(tolerance)) as store:
            transform = fit_transform(model, [TEXT[::-1] * 3, TEXT[3:] * 3], SIZE)
            pages = PageStore(store, model_fingerprint(model), layout_of(model, SIZE), bound=bound, transform=transform)
            pages.put(TEXT, prefill_pages(model, TEXT, SIZE))
        with Store(tmp_path / str(tolerance), write=False) as store:
            pages = PageStore(store, model_fingerprint(model), layout_of(model, SIZE), bound=bound)
            found = pages.load(TEXT)
            assert len(found) == 5
            logits = model(input_ids=torch.tensor([TEXT[5 * SIZE :]]), past_key_values=cache_of(model, found)).logits[0]
            assert (logits - whole).abs().mean() < tolerance * whole.std()


def test_other_weights_find_nothing(tmp_path: Path) -> None:
    model = build_model("llama")
    with Store(tmp_path) as store:
        layout = layout_of(model, SIZE)
        PageStore(store, model_fingerprint(model), layout).put(TEXT, prefill_pages(model, TEXT, SIZE))
        assert PageStore(store, model_fingerprint(model), layout).prefix(TEXT) == 5
        other = build_model("llama", seed=1)
        assert PageStore(store, model_fingerprint(other), layout).prefix(TEXT) == 0


def test_what_does_not_fit() -> None:
    model = build_model("llama")
    pages = prefill_pages(model, TEXT, SIZE)
    with pytest.raises(LayoutError, match="in order"):
        cache_of(model, pages.take(torch.tensor([1, 0])))
    with pytest.raises(BadInput, match="fills a block"):
        fit_transform(model, [[1, 2]], SIZE)
    with pytest.raises(UnsupportedModel, match="window"):
        layout_of(build_model("gemma3"), SIZE)


def test_steps_are_finer_where_errors_matter() -> None:
    model = build_model("llama")
    # What the last layer reads of V goes straight into the answer; what the first reads hardly does.
    model.model.layers[0].self_attn.o_proj.weight.data *= 1e-3
    model.model.layers[2].self_attn.o_proj.weight.data *= 3
    transform = fit_transform(model, [TEXT[::-1] * 3], SIZE)
    weights = step_weights(model, transform, [TEXT * 2], SIZE)
    assert weights.shape == (2, 3) and weights[1, 0] > 2 * weights[1, 2]
    finer = transform.weighted(weights)
    assert finer.identity != transform.identity
    assert torch.allclose(finer.value.unit, transform.value.unit * weights[1])
    with pytest.raises(BadInput, match="fills no block"):
        step_weights(model, transform, [TEXT[: SCORED_TOKENS + 2]], SIZE)
