"""Reuse beside a store: what is stored is loaded first, runs behind it are reused, and nothing of those is stored."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from vllm.distributed.kv_transfer import get_kv_transfer_group

from jointkv.codec.base import Aids
from jointkv.codec.registry import decode
from jointkv.store import Store
from jointkv.store.names import Names
from jointkv.store.segments import DATA
from jointkv.vllm_plugin.scheduler.requests import IsolationKey
from tests.hazards import FIRST, FIRST_AHEAD, runs
from tests.vllm_plugin.engines import LOSSY, Engine, Prompt, engine, text, write_model
from tests.vllm_plugin.test_reuse_traffic import Traffic
from tests.vllm_plugin.test_stored import records

BLOCK, OUT = 32, 8
PREFIX, BODY = text(4 * BLOCK, 1), text(12 * BLOCK, 2)
DONOR = text(4 * BLOCK, 3) + BODY + text(20, 4)
"""Holds the body at the same positions behind text that is not stored."""
PROMPTS = [PREFIX + BODY + text(20, 5), PREFIX + BODY + text(20, 6)]
REUSED = 11 * BLOCK
PROBED = {**LOSSY, "reuse": "probed", "reuse_audit_rate": 1e-9}
OPTIONS: dict[str, Any] = {"max_model_len": 768, "max_num_batched_tokens": 256}

pytestmark = pytest.mark.usefixtures("bold", "patient_store")


@pytest.fixture(scope="module")
def serene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("serene"), context=0.005)


@pytest.fixture(scope="module")
def expected(serene: Path) -> list[Prompt]:
    with engine(serene, **OPTIONS) as stock:
        return stock.generate(PROMPTS, OUT)


@pytest.fixture(scope="module")
def written(serene: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the prefix alone."""
    folder = tmp_path_factory.mktemp("prefix") / "pages"
    with engine(serene, 100, {**PROBED, "store": str(folder)}, **OPTIONS) as served:
        served.generate([PREFIX + text(5, 7)], 1)
    return folder


@pytest.fixture
def found(written: Path, tmp_path: Path) -> Path:
    return shutil.copytree(written, tmp_path / "pages")


def blocks_stored(folder: Path, model: str, tokens: Prompt) -> list[bool]:
    """Of each whole block of a prompt, whether it is in the store."""
    with Store(folder, write=False) as store:
        names = Names(store.secret, model, IsolationKey(None, None, ()))
        return store.has([block.address for block in names.of(tokens, BLOCK)])


@pytest.mark.hazard(
    "Stored pages",
    "a request finds its beginning in the store, and what follows in another request's pages",
    "the beginning is loaded, the rest is reused behind it, and what is reused or computed behind that is never stored",
)
@pytest.mark.parametrize(
    "ahead",
    [
        pytest.param(False, marks=runs("reuse behind stored pages", FIRST)),
        pytest.param(True, marks=runs("reuse behind stored pages", FIRST_AHEAD)),
    ],
    ids=["in step", "a step ahead"],
)
def test_runs_are_reused_behind_what_is_loaded(ahead: bool, serene: Path, expected: list[Prompt], found: Path) -> None:
    with engine(serene, 100, {**PROBED, "store": str(found)}, async_scheduling=ahead, **OPTIONS) as served:
        served.generate([DONOR], 1)
        assert served.statistics["store_hits"] == 0
        reads = watched(served)
        assert served.generate(PROMPTS[:1], OUT) == expected[:1]
        counted = served.statistics
        assert counted["store_hits"] == 1 and counted["store_tokens_loaded"] == len(PREFIX)
        assert counted["prompt_tokens_skipped"] == REUSED and counted["faults"] == counted["store_faults"] == 0
        assert reads == [(len(PROMPTS[0]), len(PREFIX) + REUSED)]
        assert served.generate(PROMPTS[1:], OUT) == expected[1:]
        assert served.statistics["store_hits"] == 1, "from the prefix cache"
        assert not served.side.reuse.loaders.waiting and not served.side.reuse.stray()
        served.assert_drained()
        model = served.side.stored._model
    of_donor, of_prompt = (blocks_stored(found, model, prompt) for prompt in (DONOR, PROMPTS[0]))
    assert all(of_donor)
    assert of_prompt == [True] * 6 + [False] * 10, "of each request the entry block was computed behind what is exact"


def watched(served: Engine) -> list[tuple[int, int]]:
    """Prompt tokens, and those that clients are told were cached, of requests that finish from here on."""
    reads: list[tuple[int, int]] = []
    step = served.llm.llm_engine.step

    def stepped() -> Any:
        outputs = step()
        reads.extend((len(one.prompt_token_ids), one.num_cached_tokens) for one in outputs if one.finished)
        return outputs

    served.llm.llm_engine.step = stepped
    return reads


@pytest.mark.hazard(
    "Stored pages",
    "what a helper loads for a request that reuses is damaged",
    "it is computed, and runs are reused behind it",
)
def test_what_cannot_be_loaded_is_computed_and_reuse_goes_on(serene: Path, expected: list[Prompt], found: Path) -> None:
    (segment,) = (found / "segments").glob(f"*{DATA}")
    data = bytearray(segment.read_bytes())
    data[len(data) // 2] ^= 1
    segment.write_bytes(data)
    with engine(serene, 100, {**PROBED, "store": str(found)}, **OPTIONS) as served:
        served.generate([DONOR], 1)
        assert served.generate(PROMPTS[:1], OUT) == expected[:1]
        assert get_kv_transfer_group().worker.stored.counts["store_pages_lost"] > 0
        assert served.statistics["prompt_tokens_skipped"] == REUSED
        served.assert_drained()


@pytest.mark.hazard(
    "Stored pages",
    "a step fails before its pages are written, and the engine with it",
    "nothing of that step is stored, where later engines would read it",
)
def test_nothing_of_a_step_that_failed_is_stored(serene: Path, tmp_path: Path) -> None:
    """vLLM tells connectors to save all the same."""
    with engine(serene, 100, {**PROBED, "store": str(tmp_path / "pages")}, **OPTIONS) as served:
        served.generate([PREFIX + text(5, 7)], 1)
        assert served.submit(DONOR, 1)
        served.runner.get_model().model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            served.finish()
        model = served.side.stored._model
    assert all(blocks_stored(tmp_path / "pages", model, PREFIX))
    assert not any(blocks_stored(tmp_path / "pages", model, DONOR))


def test_a_step_inside_somebodys_error_handling_is_one_as_any_other(serene: Path, tmp_path: Path) -> None:
    with engine(serene, 100, {**PROBED, "store": str(tmp_path / "pages")}, **OPTIONS) as served:
        try:
            raise LookupError
        except LookupError:
            served.generate([DONOR], 1)
        model = served.side.stored._model
        assert served.statistics["faults"] == 0
    assert all(blocks_stored(tmp_path / "pages", model, DONOR))


@pytest.mark.hazard(
    "Stored pages",
    "random requests, aborts, preemptions and resets beside a store, with reuse, in a full pool",
    "requests end with all their tokens, nothing stays behind",
)
@pytest.mark.parametrize(
    ("reuse", "options"),
    [
        pytest.param({}, {}, marks=runs("reuse behind stored pages", FIRST)),
        pytest.param(
            {"reuse": "licensed", "reuse_miss_rate": 0.5, "reuse_confidence": 0.5},
            {"scheduling_policy": "priority"},
            marks=[*runs("reuse behind stored pages", FIRST), pytest.mark.slow],
        ),
        pytest.param(
            {"moved": True},
            {"async_scheduling": True, "max_num_seqs": 3},
            marks=[*runs("reuse behind stored pages", FIRST_AHEAD), pytest.mark.slow],
        ),
    ],
    ids=["in step", "licensed, priorities", "moved, a step ahead, few seats"],
)
def test_random_requests(reuse: dict[str, Any], options: dict[str, Any], calm: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"max_num_batched_tokens": 128, "max_num_seqs": 12, **options}
    fusion = {**PROBED, **reuse, "store": str(tmp_path / "pages")}
    asked: list[Prompt] = []
    Store(tmp_path / "pages").close()
    exact = shutil.copytree(tmp_path / "pages", tmp_path / "exact")  # with the same secret
    with engine(calm, 40, fusion, **settings) as served:
        served.side.reuse.look_up.draw = random.Random(7).random
        submit = served.submit
        served.submit = lambda prompt, *more, **others: asked.append(prompt) or submit(prompt, *more, **others)  # type: ignore[func-returns-value, method-assign]
        traffic = Traffic(served, 7, options.get("scheduling_policy") == "priority")
        while served.statistics["store_hits"] < 5 or not served.statistics["prompt_tokens_skipped"]:
            assert served.steps < 3000
            traffic.run(100)
            wait(get_kv_transfer_group().worker.stored._jobs, 60)  # a busy machine leaves the writer no time
        while served.pages_in_use:
            served.step()
        served.assert_drained()
        assert served.statistics["faults"] == served.statistics["store_faults"] == 0
        for name, tokens in served.outputs.items():
            assert len(tokens) == traffic.asked[name]
        assert not served.side.reuse.intakes and not served.side.reuse.stray()
        assert not served.side.reuse.loaders.waiting and not served.side.stored._loading
        keys = {key[:-4] for key in served.pool.cached_block_hash_to_block._cache}
        assert not keys & traffic.private
    if options:
        assert_exact(tmp_path / "pages", calm, asked, exact)


def assert_exact(folder: Path, model: Path, prompts: list[Prompt], other: Path) -> None:
    """Pages of prompts in a store are what an engine computes that fuses and reuses nothing."""
    with engine(model, 400, {"enabled": False, "store": str(other)}, max_num_batched_tokens=128) as served:
        served.generate(prompts, 1)
        layout = get_kv_transfer_group().worker.stored.layout
        assert get_kv_transfer_group().worker.stored.counts["store_pages_dropped"] == 0
    found, exact = records(folder), records(other)
    common, position = found.keys() & exact.keys(), torch.zeros(1, dtype=torch.long)
    assert len(common) > len(prompts) / 2
    for address in common:
        pages = [decode([record.payload], layout, position, Aids()) for record in (found[address], exact[address])]
        assert torch.allclose(pages[0].keys, pages[1].keys, atol=1e-4)
        assert torch.allclose(pages[0].values, pages[1].values, atol=1e-4)


@pytest.mark.parametrize("steps", range(1, 5))
def test_a_loading_helper_goes_with_its_request(steps: int, serving: Engine) -> None:
    serving.generate([DONOR], 1)
    name = serving.submit(PROMPTS[0], OUT)
    for _ in range(steps):
        serving.step()
    serving.abort(name)
    serving.finish()
    while serving.pages_in_use:
        serving.step()
    assert not serving.side.reuse.loaders.waiting and not serving.side.reuse.stray()
    serving.assert_drained()
    assert serving.llm.reset_prefix_cache()


@pytest.fixture(scope="module")
def serving(serene: Path, written: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    folder = shutil.copytree(written, tmp_path_factory.mktemp("aborted") / "pages")
    with engine(serene, 100, {**PROBED, "store": str(folder)}, disable_log_stats=False, **OPTIONS) as served:
        yield served


def test_statistics_do_not_count_loading_helpers(serving: Engine) -> None:
    serving.generate([DONOR], 1)
    with serving.watched() as seen:
        serving.generate(PROMPTS[:1], OUT)
    for stats, outputs in seen:
        counts = stats.num_running_reqs, stats.num_waiting_reqs, stats.num_skipped_waiting_reqs
        assert sum(counts) <= 1 and min(counts) >= 0
        assert not any("-load-" in output.request_id for output in outputs)
    cache = [stats.prefix_cache_stats for stats, _ in seen]
    assert sum(one.requests for one in cache) == 1
    assert sum(one.queries for one in cache) == len(PROMPTS[0])
    assert sum(one.hits for one in cache) == REUSED
    prefills = [output.prefill_stats for _, outputs in seen for output in outputs if output.prefill_stats is not None]
    assert [(one.num_local_cached_tokens, one.num_external_cached_tokens) for one in prefills] == [
        (REUSED, len(PREFIX))
    ]


def test_what_is_stored_to_the_end_is_loaded_by_the_request_itself(serving: Engine) -> None:
    assert serving.llm.reset_prefix_cache()
    loaded, helpers = serving.statistics["store_tokens_loaded"], serving.side.reuse.sent._number
    serving.generate([PREFIX + text(40, 8)], 1)
    assert serving.statistics["store_tokens_loaded"] - loaded == len(PREFIX)
    assert serving.side.reuse.sent._number == helpers
    serving.assert_drained()
