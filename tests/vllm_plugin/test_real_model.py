"""SmolLM2: near-prefix traffic gives most pages back, and what is served instead is within the bound."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from torch import Tensor

from tests.vllm_plugin.engines import Engine, engine

REQUESTS, OUT = 4, 3
BOUND, TOKEN_BOUND = 0.2, 0.3
Entry = tuple[str, int]


@pytest.fixture(scope="module")
def smollm2() -> Path:
    from jointkv.errors import JointKVError
    from jointkv.hf.models import fetch_model

    try:
        return fetch_model("smollm2")
    except (JointKVError, OSError) as error:
        pytest.skip(f"SmolLM2 cannot be fetched: {error}")


def prompts_of(folder: Path) -> list[list[int]]:
    from transformers import AutoTokenizer

    from jointkv.evaluate.traffic import NearPrefix

    requests = NearPrefix().requests(AutoTokenizer.from_pretrained(folder), REQUESTS)
    return [list(request.prompt) for request in requests]


def relative_errors(own: Tensor, read: Tensor, heads: int) -> tuple[float, float]:
    """Errors of the K and of the V block, root mean squares over layers.

    Pages are `[layers, elements]`; those of a head hold K, then V, each in an order that norms do not depend on.
    """
    sides_own, sides_read = (page.double().unflatten(1, (heads, 2, -1)) for page in (own, read))
    difference = (sides_own - sides_read).square().sum((1, 3))
    return tuple((difference / sides_own.square().sum((1, 3))).mean(0).sqrt().tolist())  # type: ignore[return-value]


@pytest.mark.real_model
def test_what_is_served_is_within_the_bound(smollm2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = prompts_of(smollm2)
    replaced: dict[Entry, Tensor] = {}
    options = {"max_relative_error": BOUND, "max_token_error": TOKEN_BOUND}
    with engine(smollm2, pages=160, fusion=options, max_num_batched_tokens=4096) as fused:
        replace = fused.side.tables.replace

        def keep(request_id: str, group: int, slot: int, page: int) -> None:
            replaced[request_id, slot] = fused.page(fused.table(request_id)[slot])
            replace(request_id, group, slot, page)

        monkeypatch.setattr(fused.side.tables, "replace", keep)
        names = [fused.submit(prompt, OUT) for prompt in prompts]
        fused.run_until_decoding()
        fused.step()
        stock = sum(math.ceil(len(prompt) / 32) for prompt in prompts)
        assert fused.pages_in_use <= 0.4 * stock
        errors = check_served(fused, replaced)
        fused.finish()
        assert all(len(fused.outputs[name]) == OUT for name in names)
        assert fused.statistics["blocks_merged"] == len(replaced) and fused.statistics["faults"] == 0
        assert max(errors) > 0.01  # what is served is not the same
        fused.assert_drained()


@pytest.mark.slow
@pytest.mark.real_model
def test_unrelated_text_shares_pages_under_the_policy_of_the_paper_alone(smollm2: Path) -> None:
    """Of the layers that take part; within bounds nothing of it is shared."""
    from transformers import AutoTokenizer

    from jointkv.evaluate.traffic.unrelated import Unrelated

    requests = Unrelated().requests(AutoTokenizer.from_pretrained(smollm2), REQUESTS)
    prompts = [list(request.prompt)[:160] for request in requests]
    stock = 15 * REQUESTS * 6
    paper = {"policy": "paper", "accept_unbounded": True, "layer_groups": 15, "key_threshold": 0.8}
    found = {}
    for name, options in (("paper", paper), ("both", {"candidates": "both", "layer_groups": 15})):
        with engine(smollm2, pages=1500, fusion=options, max_num_batched_tokens=4096) as served:
            names = [served.submit(prompt, OUT + 3) for prompt in prompts]
            served.run_until_decoding()
            for _ in range(4):
                served.step()
            found[name] = served.pages_in_use
            for group in range(15):
                entries = [page for name in names for page in served.table(name, group)]
                shared = len(set(entries)) < len(entries)
                assert not shared or 0 < group < 14, "layers that are left out are shared"
            served.finish()
            assert served.statistics["faults"] == 0
            served.assert_drained()
    assert found["paper"] < 0.9 * stock and found["both"] == stock


def check_served(fused: Engine, replaced: dict[Entry, Tensor]) -> list[float]:
    """Errors of all served blocks, read from the pages that attention reads now."""
    (heads,) = {
        layer.num_kv_heads for layer in fused.core.vllm_config.compilation_config.static_forward_context.values()
    }
    errors = []
    for (name, slot), own in replaced.items():
        key, value = relative_errors(own, fused.page(fused.table(name)[slot]), heads)
        assert max(key, value) <= BOUND * 1.0001
        errors.append(max(key, value))
    return errors
