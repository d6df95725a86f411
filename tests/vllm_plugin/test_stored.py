"""A store on disk: the next engine loads what this one has computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from tests.vllm_plugin.engines import EXACT, Engine, Prompt, engine, text

OUT = 8
LONG = text(300, 1)
PROMPTS = [LONG, LONG[:200] + text(60, 2), text(90, 3)]
OPTIONS: dict[str, Any] = {"max_model_len": 512, "max_num_batched_tokens": 256}


@pytest.fixture(scope="module")
def stock(calm: Path) -> list[Prompt]:
    with engine(calm, **OPTIONS) as served:
        return served.generate(PROMPTS, OUT)


def worker_counts(served: Engine) -> Any:
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    return get_kv_transfer_group().worker.stored.counts


def test_the_next_engine_answers_from_what_the_first_has_computed(calm: Path, stock: list[Prompt], tmp_path: Path) -> None:
    fusion = {**EXACT, "store": str(tmp_path / "pages")}
    with engine(calm, 60, fusion, **OPTIONS) as served:
        assert served.generate(PROMPTS, OUT) == stock
        served.assert_drained()
    with engine(calm, 60, fusion, **OPTIONS) as served:
        assert served.generate(PROMPTS, OUT) == stock
        print(served.statistics, worker_counts(served), served.cached_tokens)
        served.assert_drained()
        assert 0
