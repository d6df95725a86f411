"""vLLM's example connector, which keeps prompts in files, beside the plugin's."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest

pytest.importorskip("vllm")

from vllm.distributed.kv_transfer.kv_connector.v1.example_connector import ExampleConnector

from jointkv.errors import UnsupportedEngine
from jointkv.vllm_plugin import engine_args
from tests.hazards import FIRST
from tests.vllm_plugin.engines import EXACT, LOSSY, WATCHED, Prompt, engine, near_prefix, text

BLOCK = 32
OUT = 12
TWICE = [text(98, number // 2) for number in range(6)]
OTHERS = [text(98, 100 + number) for number in range(6)]
OPTIONS: dict[str, Any] = {"max_model_len": 512, "max_num_batched_tokens": 4096}
UNCACHED: dict[str, Any] = {**OPTIONS, "enable_prefix_caching": False}

pytestmark = pytest.mark.runs("beside other connectors", *FIRST)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Any]:
    """The connector as an engine is asked for it."""
    options = {"shared_storage_path": str(tmp_path)}
    return {"kv_connector": "ExampleConnector", "kv_role": "kv_both", "kv_connector_extra_config": options}


class Load(NamedTuple):
    name: str
    pages: list[int]
    tokens: int


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[Load]:
    """What is loaded from files."""
    found: list[Load] = []
    update = ExampleConnector.update_state_after_alloc

    def watched(self: Any, request: Any, blocks: Any, tokens: int) -> None:
        if tokens > 0:
            found.append(Load(request.request_id, blocks.get_block_ids()[0], tokens))
        update(self, request, blocks, tokens)

    monkeypatch.setattr(ExampleConnector, "update_state_after_alloc", watched)
    return found


@pytest.fixture(scope="module")
def stock(calm: Path) -> list[Prompt]:
    with engine(calm, **UNCACHED) as served:
        return served.generate(TWICE, OUT)


def several(*connectors: dict[str, Any]) -> dict[str, Any]:
    return {
        "kv_connector": "MultiConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"connectors": list(connectors)},
    }


@pytest.mark.parametrize("last", [False, True], ids=["first", "last, and deeper"])
def test_bound_zero_changes_no_token_of_what_is_computed_or_loaded(
    last: bool, calm: Path, files: dict[str, Any], loads: list[Load], stock: list[Prompt]
) -> None:
    options, own = dict(UNCACHED), engine_args(**WATCHED, **EXACT)["kv_transfer_config"]
    if last:
        options["kv_transfer_config"] = several(files, several(own))
    with engine(calm, 60, EXACT, [files], disable_log_stats=last, **options) as served:
        assert served.generate(TWICE, OUT) == stock and not loads
        computed = served.statistics["blocks_merged"]
        assert computed >= 9
        served.generate(OTHERS, OUT)
        assert served.generate(TWICE, OUT) == stock
        assert [load.tokens for load in loads] == [96] * len(TWICE)
        assert served.statistics["blocks_merged"] >= 2 * computed and served.statistics["faults"] == 0
        served.assert_drained()


def test_pages_that_are_loaded_are_found_by_nobody_whose_text_they_held(
    calm: Path, files: dict[str, Any], loads: list[Load], monkeypatch: pytest.MonkeyPatch
) -> None:
    with engine(calm, 30, LOSSY, [files], **UNCACHED) as served:
        residents, held, left = served.side.candidates.residents, set[int](), list[int]()
        update = ExampleConnector.update_state_after_alloc

        def watched(self: Any, request: Any, blocks: Any, tokens: int) -> None:
            """vLLM tells its connectors in their order; the plugin's knows by now."""
            if tokens > 0:
                left.extend(page for page in blocks.get_block_ids()[0] if page in residents)
            update(self, request, blocks, tokens)

        monkeypatch.setattr(ExampleConnector, "update_state_after_alloc", watched)
        served.generate(TWICE[:1], OUT, salt="red")
        for prompt in OTHERS:
            served.generate([prompt], OUT, salt="blue")
            held |= {page for page in range(30) if page in residents}
        served.generate(TWICE[:1], OUT, salt="red")
        (load,) = loads
        assert held.intersection(load.pages), "the pages had held nothing"
        assert not left


def test_a_request_that_comes_back_overwrites_no_page_that_others_read(
    calm: Path, files: dict[str, Any], loads: list[Load]
) -> None:
    with engine(calm, 60, LOSSY, [files], **OPTIONS) as served:
        first, second = (served.submit(prompt, 20) for prompt in near_prefix(2, shared=96, head=BLOCK, tail=2))
        while not served.statistics["blocks_merged"]:
            served.step()
        served.step()
        shared = [page for page in served.table(second) if page in served.table(first)]
        before = {page: served.page(page) for page in shared}
        assert shared
        scheduler = served.vllm_scheduler
        (request,) = (one for one in scheduler.running if one.request_id.startswith(second))
        (tracked,) = (one for one in served.side.requests.active.values() if one.request is request)
        assert tracked.private_from is not None
        scheduler.kv_cache_manager.evict_blocks({served.table(second)[3]})
        scheduler.running.remove(request)
        scheduler.prev_step_scheduled_req_ids.discard(request.request_id)
        scheduler._preempt_request(request, 0.0, drop_stale_output=True)
        while not loads:
            served.step()
        assert loads[0].name == request.request_id and not set(loads[0].pages).intersection(shared)
        assert all(served.page(page).equal(content) for page, content in before.items())
        served.finish()
        assert len(served.outputs[first]) == len(served.outputs[second]) == 20
        assert served.statistics["faults"] == 0
        served.assert_drained()


def test_what_is_reused_would_be_stored_for_all(calm: Path, files: dict[str, Any]) -> None:
    with engine(calm, 60, {**LOSSY, "reuse": "auto"}, [files], **OPTIONS) as served:
        assert served.side.settings.reuse == "off" and served.side.report().data["no_reuse"] == "connectors"
        assert len(served.generate(TWICE[:1], OUT)[0]) == OUT
    refused = pytest.raises(UnsupportedEngine, match=r"store what a request starts with.*reuse=off")
    with refused, engine(calm, 60, {**LOSSY, "reuse": "probed"}, [files], **OPTIONS):
        pass
