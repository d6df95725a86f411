"""What makes two requests comparable: salt, LoRA adapter and media, on vLLM's own request objects."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from vllm.exceptions import VLLMValidationError
from vllm.lora.request import LoRARequest

from jointkv.vllm_plugin.engine.opt_out import RequestCheck
from jointkv.vllm_plugin.scheduler.requests import TrackedRequest, isolation_key
from jointkv.vllm_plugin.scheduler.side import SchedulerSide
from jointkv.vllm_plugin.settings import PluginSettings
from tests.effort import fuzz_settings
from tests.vllm_plugin.census import Census
from tests.vllm_plugin.engines import LOSSY, Engine, engine, near_prefix
from tests.vllm_plugin.scheduling import BLOCK, TOKENS, Identity, new_manager, new_request, start, step_of

RED, RED_AGAIN, BLUE = (("red", 1, "/red"), ("red", 1, "/other"), ("blue", 2, "/blue"))
"""Name, number and folder of adapters; the second is another one that took the first one's place."""

IDENTITIES: list[Identity] = [
    {},
    {"salt": "red"},
    {"salt": "blue"},
    {"adapter": RED},
    {"adapter": RED_AGAIN},
    {"adapter": BLUE},
    {"salt": "red", "adapter": RED},
    {"media": (("a", 40, 10),)},
    {"media": (("b", 40, 10),)},
    {"media": (("a", 44, 10),)},
    {"media": (("a", 40, 9),)},
    {"media": (("a", 40, 10), ("b", 60, 10))},
    {"media": (("b", 40, 10), ("a", 60, 10))},
    {"salt": "red", "media": (("a", 40, 10),)},
]


def pairs_asked(*identities: Identity, **settings: Any) -> int:
    """Pairs of pages that workers are to compare when requests with equal text are read in one step."""
    manager = new_manager()
    side = SchedulerSide(PluginSettings(min_pool_usage=0.0, **settings), manager, (0,))
    started = []
    for number, identity in enumerate(identities):
        request = new_request(identity, f"request-{number}")
        side.admit(request)
        started.append(start(manager, request))
    return len(side.next_inquiry(step_of(started)).group)


@pytest.mark.hazard(
    "Isolation",
    "blocks of requests with another salt, LoRA adapter or image are compared",
    "none; with equal ones they are",
)
def test_only_equal_identities_are_compared(record_property: Any) -> None:
    pairs = 0
    for number, first in enumerate(IDENTITIES):
        assert pairs_asked(first, first) == len(TOKENS) // BLOCK
        for second in IDENTITIES[number + 1 :]:
            assert pairs_asked(first, second) == 0, (first, second)
            pairs += 1
    record_property("identity_pairs", pairs)


def test_strict_isolation_asks_about_salted_requests_only() -> None:
    assert pairs_asked({}, {}, isolation="strict") == 0
    assert pairs_asked({"adapter": RED}, {"adapter": RED}, isolation="strict") == 0
    assert pairs_asked({"salt": "red"}, {"salt": "red"}, isolation="strict") == len(TOKENS) // BLOCK


salts = st.sampled_from([None, "", "red", "blue"])
adapters = st.sampled_from([None, RED, RED_AGAIN, BLUE, ("red", 3, "/red")])
images = st.tuples(st.sampled_from("ab"), st.integers(0, 100), st.integers(1, 20))
media = st.lists(images, max_size=2).map(lambda found: tuple(sorted(found, key=lambda image: image[1])))
identities = st.fixed_dictionaries({"salt": salts, "adapter": adapters, "media": media})


@pytest.mark.hazard(
    "Isolation",
    "fusion takes requests for the same tenant whom exact prefix caching tells apart",
    "never: equal keys mean equal hashes of vLLM's own prefix cache",
)
@fuzz_settings()
@given(identities, identities, st.sampled_from(["salt", "adapter", "media", None]))
def test_no_coarser_than_the_prefix_cache(first: Identity, second: Identity, differs: str | None) -> None:
    """Two adapters of one name and number, loaded from two folders, were taken for one."""
    second = {name: value if name == differs else first[name] for name, value in second.items()}
    ours, theirs = new_request(first), new_request(second)
    if isolation_key(ours) == isolation_key(theirs):
        assert ours.block_hashes == theirs.block_hashes


def test_text_is_hashed_once_and_a_restart_keeps_what_was_found_again() -> None:
    request = new_request({})
    request.num_preemptions = 3
    tracked = TrackedRequest(request, None, BLOCK)
    first = tracked.hashes(2).tolist()
    assert len(first) == 2 and len(set(tracked.hashes(4).tolist())) == 4 and tracked.hashes(1)[:2].tolist() == first
    assert tracked.tokens(1, 3).ravel().tolist() == TOKENS[BLOCK : 3 * BLOCK] and tracked.tokens(2, 2).size == 0
    assert tracked.tokens(0, 4).ravel().tolist() == TOKENS
    tracked.next_slot, tracked.served = 2, {(0, 0), (0, 1)}
    tracked.restart(kept=1)
    assert (tracked.epoch, tracked.next_slot, tracked.served) == (3, 1, {(0, 0)})


# Adapters in a running engine.


def write_adapter(folder: Path, seed: int, rank: int = 4, layers: int = 4, hidden: int = 128) -> Path:
    """A random adapter of the queries of the random model, in the format of peft."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for layer in range(layers):
        name = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        weights[f"{name}.lora_A.weight"] = 0.05 * torch.randn(rank, hidden, generator=generator)
        weights[f"{name}.lora_B.weight"] = 0.05 * torch.randn(hidden, rank, generator=generator)
    save_file(weights, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": ["q_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def adapted(calm: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Engine, Census, list[LoRARequest]]]:
    folder = tmp_path_factory.mktemp("adapters")
    loras = [
        LoRARequest(name, number, str(write_adapter(folder / name, number)))
        for number, name in enumerate(("red", "blue"), 1)
    ]
    options = {"enable_lora": True, "max_loras": 2, "max_lora_rank": 8}
    with engine(calm, fusion=LOSSY, **options) as served, pytest.MonkeyPatch.context() as patch:
        yield served, Census(served, patch), loras
        served.assert_drained()


@pytest.mark.hazard(
    "Isolation",
    "a request reads K and V computed with another LoRA adapter, or without one",
    "none; same adapter: some",
)
@pytest.mark.parametrize("resident", [False, True], ids=["in the same step", "after the other has finished"])
def test_adapters_keep_requests_apart(
    adapted: tuple[Engine, Census, list[LoRARequest]], resident: bool, record_property: Any
) -> None:
    served, census, (red, blue) = adapted
    merges = {}
    for number, (first, second) in enumerate([(red, red), (red, blue), (None, red), (red, None), (None, None)]):
        names = []
        prompts = near_prefix(2, shared=200, seed=10 * number + resident)
        for prompt, lora in zip(prompts, (first, second), strict=True):
            names.append(served.submit(prompt, 4, lora=lora))
            if resident:
                served.finish()
        served.finish()
        merges[first is second] = merges.get(first is second, 0) + census.between(*names)
        assert (census.between(*names) > 0) is (first is second), (first, second)
    assert served.statistics["faults"] == 0
    record_property("merges_with_the_same_adapter", merges[True])
    record_property("merges_across_adapters", merges[False])


def test_a_wish_that_is_not_understood_is_refused_before_the_engine(
    adapted: tuple[Engine, Census, list[LoRARequest]],
) -> None:
    served, _, _ = adapted
    with pytest.raises(VLLMValidationError, match="'jointkv' is neither true nor false"):
        served.submit(TOKENS, 2, extra={"jointkv": "nonsense"})
    processors = [type(each) for each in served.runner.input_batch.logitsprocs.all]
    assert RequestCheck not in processors and not served.runner.input_batch.logitsprocs_need_output_token_ids
    before = served.statistics["left_alone"].get("opted_out", 0)
    served.submit(TOKENS, 2, extra={"jointkv": "FALSE"})
    served.finish()
    assert served.statistics["left_alone"]["opted_out"] == before + 1 and served.statistics["faults"] == 0
