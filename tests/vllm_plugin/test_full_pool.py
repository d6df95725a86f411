"""Reuse where requests wait for room: looking for text that is not there costs no step, and what comes is found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("vllm")

from jointkv.vllm_plugin.scheduler.no_room import LOOKS_AGAIN
from tests.vllm_plugin.engines import LOSSY, Engine, engine, text, write_model

BLOCK, PAGES, OUT = 32, 41, 90
PROBED = {**LOSSY, "reuse": "probed", "reuse_audit_rate": 1e-9}
LONG = text(20 * BLOCK, 1)
"""Holds half of the pages while it answers."""

pytestmark = pytest.mark.usefixtures("bold")


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with engine(write_model(tmp_path_factory.mktemp("model"), context=0.005), pages=PAGES, fusion=PROBED) as made:
        yield made


@pytest.fixture
def served(started: Engine) -> Iterator[Engine]:
    assert started.llm.reset_prefix_cache()
    started.outputs.clear()
    yield started
    started.assert_drained()
    assert not started.statistics["faults"]


def looked_up(served: Engine, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each request is looked up from here on."""
    counted: Counter[str] = Counter()
    look_up = served.side.reuse.look_up
    intake = look_up.intake

    def counting(tracked: Any) -> Any:
        counted[tracked.request.request_id.rsplit("-", 1)[0]] += 1
        return intake(tracked)

    monkeypatch.setattr(look_up, "intake", counting)
    return counted


def test_who_waits_for_room_is_looked_up_now_and_then_and_who_stands_behind_not_at_all(
    served: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = looked_up(served, monkeypatch)
    served.submit(LONG, OUT)
    served.step()
    first, behind = (served.submit(text(25 * BLOCK, seed), 2) for seed in (2, 3))
    steps = 5 * LOOKS_AGAIN
    for _ in range(steps):
        served.step()
    assert not served.outputs and 1 <= counted[first] <= steps // LOOKS_AGAIN + 1 and not counted[behind]
    served.finish()
    assert len(served.outputs[first]) == len(served.outputs[behind]) == 2 and counted[behind]


def test_what_is_computed_while_it_waits_lets_it_in(served: Engine) -> None:
    """It finds too little room for all of itself, and enough for what is not resident."""
    shared = text(6 * BLOCK, 4)
    served.submit(LONG, OUT)
    served.submit([*text(BLOCK, 5), *shared, *text(8, 6)], OUT)
    waiting = served.submit([*text(BLOCK, 7), *shared, *text(8 * BLOCK, 8)], 2)
    served.step()
    assert served.pool.get_num_free_blocks() < 15, "it fits as a whole, and this test says nothing"
    for _ in range(3 * LOOKS_AGAIN):
        served.step()
    assert waiting in served.outputs and len(served.outputs) == 1
    assert served.statistics["prompt_tokens_skipped"] >= 4 * BLOCK
    served.finish()
