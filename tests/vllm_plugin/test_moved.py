"""Text that moved in a real engine: found at other positions, written to pages of the request's own, and read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm")

from torch import Tensor

from jointkv.core.moved import Fills
from jointkv.theory.licence import FirstLicences
from jointkv.vllm_plugin.scheduler.licences import PageClass
from jointkv.vllm_plugin.worker.filler import PageFiller
from tests.hazards import FIRST
from tests.vllm_plugin.engines import LOSSY, Prompt, engine, text, write_model
from tests.vllm_plugin.test_reuse import Served

BLOCK, OUT, BODY = 32, 8, 20 * 32
MOVING = {**LOSSY, "reuse": "probed", "reuse_audit_rate": 1e-9, "moved": True}

pytestmark = [pytest.mark.usefixtures("bold"), pytest.mark.runs("text that moved", *FIRST)]


def named(*lengths: int, seed: int = 0) -> list[Prompt]:
    """Prompts with heads of these lengths before the same text, and tails of their own."""
    return [
        text(length, 100 * seed + number) + text(BODY, 7000 + seed) + text(20, 100 * seed + 50 + number)
        for number, length in enumerate(lengths)
    ]


def whole(length: int) -> int:
    """Blocks of the text behind a head of that length."""
    return (length + BODY) // BLOCK - -(-length // BLOCK)


@pytest.fixture(scope="module")
def serene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model in which a different first line changes K and V of what follows next to nothing."""
    return write_model(tmp_path_factory.mktemp("serene"), context=0.005)


@pytest.fixture(scope="module")
def stock(serene: Path) -> tuple[list[Prompt], list[Tensor]]:
    """What the stock engine answers, and the pages of the third request."""
    with engine(serene) as served:
        answers = served.generate(named(16, 21, 45, 40), OUT)
        name = served.submit(named(16, 21, 45)[2])
        served.run_until_decoding()
        pages = [served.page(page) for page in served.table(name)]
        served.finish()
    return answers, pages


@pytest.fixture(scope="module")
def moving(serene: Path, stock: tuple[list[Prompt], list[Tensor]]) -> Iterator[Served]:
    """There is one engine at a time, so what stock vLLM answers comes first."""
    with engine(serene, pages=120, fusion=MOVING) as served:
        yield Served(served)


@pytest.fixture
def served(moving: Served) -> Iterator[Served]:
    moving.start()
    yield moving
    moving.engine.finish()
    moving.engine.assert_drained()
    fills = moving.engine.side.reuse.fills
    assert not fills.unconfirmed and not moving.engine.side.reuse.intakes
    assert not moving.engine.pool.cached_block_hashes_by_block
    fills.check_integrity()


def page_errors(own: Tensor, read: Tensor) -> list[float]:
    """Relative errors of a page, by layer."""
    return ((own - read).norm(dim=1) / own.norm(dim=1)).tolist()  # type: ignore[no-any-return]


def test_a_name_of_another_length_costs_header_entry_block_and_tail(
    served: Served, stock: tuple[list[Prompt], list[Tensor]]
) -> None:
    """What is read is what a prefill would have written, but for what the header changes."""
    answers, pages = stock
    prompts = named(16, 21, 45, 40)
    assert served.engine.generate(prompts[:1], OUT) == answers[:1]
    served.count_anew()
    assert served.engine.generate(prompts[1:2], OUT) == answers[1:2]
    assert served.new("moved_tokens_skipped") == served.new("prompt_tokens_skipped") == (whole(21) - 1) * BLOCK
    assert served.computed == len(prompts[1]) - (whole(21) - 1) * BLOCK + OUT - 1
    name = served.engine.submit(prompts[2], OUT)
    served.engine.run_until_decoding()
    table = served.engine.table(name)
    for slot in range(len(table) - 1):
        assert max(page_errors(pages[slot], served.engine.page(table[slot]))) < 0.02, f"block {slot}"
    served.engine.finish()
    assert served.engine.outputs[name] == answers[2]
    assert served.new("moved_tokens_skipped") == (whole(21) + whole(45) - 2) * BLOCK
    assert served.new("pages_filled") == served.new("moved_tokens_skipped") // BLOCK and served.new("faults") == 0


def test_readers_of_equal_shift_share_what_is_written(served: Served) -> None:
    prompts = named(16, 21, 21, 21)
    served.engine.generate(prompts[:1], OUT)
    served.count_anew()
    names = [served.engine.submit(prompt, OUT) for prompt in prompts[1:3]]
    served.engine.run_until_decoding()
    first, second = ([*served.engine.table(name)] for name in names)
    shared = set(first) & set(second)
    served.engine.finish()
    assert len(shared) >= whole(21) - 1
    served.engine.generate(prompts[3:], OUT)
    assert served.new("prompt_tokens_skipped") >= 3 * (whole(21) - 1) * BLOCK
    assert served.new("pages_filled") == whole(21) - 1, "what is written already is written again"


def test_another_salt_finds_nothing(served: Served) -> None:
    first, second, third = named(16, 21, 40)
    served.engine.generate([first], OUT, salt="a")
    served.count_anew()
    served.engine.generate([second], OUT, salt="b")
    served.engine.generate([third], OUT)
    assert served.new("prompt_tokens_skipped") == served.new("pages_filled") == 0
    served.engine.generate([third], OUT, salt="a")
    assert served.new("moved_tokens_skipped") == (whole(40) - 1) * BLOCK


def test_where_the_pool_is_short_everybody_is_answered(
    served: Served, stock: tuple[list[Prompt], list[Tensor]]
) -> None:
    """Twelve requests of 22 blocks in 119: who waits for room finds what is resident when there is some."""
    prompts = named(*range(16, 28))
    served.engine.generate(prompts[:1], OUT)
    served.count_anew()
    answers = served.engine.generate(prompts[1:], 40)
    assert all(len(answer) == 40 for answer in answers) and served.new("faults") == 0
    possible = sum(whole(length) - 1 for length in range(17, 28)) * BLOCK
    assert 0.9 * possible < served.new("moved_tokens_skipped") <= possible, "some have computed what was resident"


def test_sources_that_are_gone_when_pages_are_to_be_written(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their blocks are computed."""
    prompts = named(16, 21)
    served.engine.generate(prompts[:1], OUT)
    served.count_anew()
    side = served.engine.side
    place = side.reuse.fills.place

    def late(intake: Any, others: Any) -> None:
        if intake.plan.skipped and not intake.filled:
            fills = intake.text.fills(intake.plan.pages[intake.plan.pages >= 1 << 40])
            for page in fills.first[5:9].tolist():
                side.candidates.residents.remove(page)
        place(intake, others)

    monkeypatch.setattr(side.reuse.fills, "place", late)
    served.engine.generate(prompts[1:], OUT)
    assert 0 < served.new("moved_tokens_skipped") < (whole(21) - 4) * BLOCK


@pytest.mark.hazard(
    "Faults", "a page is not written, and a request reads it", "reuse ends before it is read, and the answer is stock's"
)
def test_a_fault_while_a_page_is_written(
    served: Served, stock: tuple[list[Prompt], list[Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    served.engine.generate(named(16), OUT)
    served.count_anew()

    def broken(self: PageFiller, targets: np.ndarray, fills: Fills) -> None:
        for layer in self.pages.layers:
            layer[targets.tolist()] = 1e9
        raise RuntimeError("broken")

    with monkeypatch.context() as patch:
        patch.setattr(PageFiller, "fill", broken)
        names = [served.engine.submit(prompt, OUT) for prompt in named(16, 21, 45)[1:]]
        served.engine.finish()
    side = served.engine.side
    assert [served.engine.outputs[name] for name in names] == stock[0][1:3]
    assert served.new("faults") == 1 and "broken" in side.recovery.cause
    assert served.new("moved_tokens_skipped") == 0
    side.recovery, side.enabled = type(side.recovery)(60.0, 3), True


def test_a_licence_of_its_own(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Audits of text at other positions say nothing of text that stands where it is read, nor the other way round."""
    side = served.engine.side
    monkeypatch.setattr(side.licences, "_needed", True)
    monkeypatch.setattr(side.licences, "_first", FirstLicences({}, 0.9, 0.3))
    served.engine.generate(named(32), 2)
    key = next(iter(side.candidates.residents.index._buckets.values()))[0][0][0]
    moved, exact = PageClass(key, exact=False, moved=True), PageClass(key, exact=True)
    for head in range(33, 63):
        if side.licences.granted(moved):
            break
        served.engine.generate([text(head, head) + named(32)[0][32:]], 2)
        assert not served.new("prompt_tokens_skipped")
    assert served.new("reuse_audits") and side.licences.granted(moved) and not side.licences.granted(exact)
    served.engine.generate([text(64 + 5, 1) + named(32)[0][32:]], 2)
    assert served.new("moved_tokens_skipped") > 0
