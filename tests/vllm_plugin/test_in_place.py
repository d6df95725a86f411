"""Text that moved, read where it is resident: no page is written, and what is read is what a copy would hold."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")

from vllm.distributed.kv_transfer import get_kv_transfer_group

from jointkv.attention.rotary import NOT_TURNED
from jointkv.core.moved import MovedRun
from jointkv.errors import IntegrityError
from jointkv.vllm_plugin.attention.backend import JointAttention
from jointkv.vllm_plugin.attention.in_place import InPlace
from jointkv.vllm_plugin.messages import ReadInPlace
from tests.hazards import FIRST
from tests.vllm_plugin.engines import Engine, Prompt, engine, text
from tests.vllm_plugin.test_moved import BLOCK, MOVING, OUT, named, whole
from tests.vllm_plugin.test_reuse import Served

IN_PLACE = {**MOVING, "attention": "shared"}
HEADS = (16, 21, 45, 40)

pytestmark = [pytest.mark.usefixtures("bold"), pytest.mark.runs("text read in place", *FIRST)]


def one_by_one(served: Engine, prompts: list[Prompt]) -> list[tuple[Prompt, list[float]]]:
    """Answers, with the log-probability of every token."""
    found = []
    for prompt in prompts:
        name = served.submit(prompt, OUT, logprobs=0)
        served.finish()
        found.append((served.outputs[name], served.logprobs[name]))
    return found


def two_texts(head: int, gap: int) -> Prompt:
    """A head before one text, and something else between that and another."""
    return text(head, head) + text(8 * BLOCK, 600) + text(gap, 10 + head) + text(8 * BLOCK, 601) + text(20, 20 + head)


def test_a_request_that_takes_the_whole_pool_does_not_wait_for_what_it_reads(calm: Path) -> None:
    """Of 32 pages it takes all, and what it would read in place is one more than it saves.

    The first test, while there is no other engine.
    """
    body = text(30 * BLOCK, 1)
    with engine(calm, pages=33, fusion=IN_PLACE) as served:
        served.generate([text(16, 2) + body], 2)
        name = served.submit(text(21, 3) + body, 1024 - 21 - len(body))
        for _ in range(100):
            served.step()
        assert len(served.outputs[name]) == 1024 - 21 - len(body)
        assert served.statistics["blocks_in_place"] == served.statistics["faults"] == 0
        served.assert_drained()


@pytest.fixture(scope="module")
def copied(calm: Path) -> dict[str, list[tuple[Prompt, list[float]]]]:
    """What an engine answers that writes pages with text that moved, and one that computes everything."""
    found = {}
    for kind, fusion in (("computed", None), ("copied", MOVING)):
        with engine(calm, fusion=fusion) as served:
            found[kind] = one_by_one(served, named(*HEADS))
            found[f"{kind}, two texts"] = one_by_one(served, [two_texts(16, 40), two_texts(45, 50)])
            if fusion is not None:
                assert served.statistics["pages_filled"] > 0 and served.statistics["blocks_in_place"] == 0
    return found


@pytest.fixture(scope="module")
def reading(calm: Path, copied: Any) -> Iterator[Served]:
    """There is one engine at a time, so what others answer comes first."""
    with engine(calm, pages=120, fusion=IN_PLACE) as served:
        yield Served(served)


@pytest.fixture
def served(reading: Served) -> Iterator[Served]:
    reading.start()
    yield reading
    reading.engine.finish()
    reading.engine.generate([text(3, 1)], 1)  # workers hear in the next step of who has ended
    reading.engine.assert_drained()
    side = reading.engine.side
    assert not side.tables.lent and not side.reuse.intakes and not len(get_kv_transfer_group().worker.in_place)
    assert side.tables.pool.null_block.block_hash is None and not reading.engine.pool.cached_block_hashes_by_block
    side.reuse.fills.check_integrity()


def assert_near(found: list[tuple[Prompt, list[float]]], expected: list[tuple[Prompt, list[float]]]) -> None:
    """The same tokens, for the same reasons up to rounding."""
    assert [tokens for tokens, _ in found] == [tokens for tokens, _ in expected]
    assert far(found, expected) < 1e-4


def far(one: list[tuple[Prompt, list[float]]], two: list[tuple[Prompt, list[float]]]) -> float:
    return float(max(np.abs(np.subtract(a, b)).max() for (_, a), (_, b) in zip(one, two, strict=True)))


def test_answers_are_those_that_copies_would_give(served: Served, copied: Any) -> None:
    """Which are others than those of an engine that computes everything, so that it matters what is read."""
    found = one_by_one(served.engine, named(*HEADS))
    assert_near(found, copied["copied"])
    assert far(copied["copied"][1:], copied["computed"][1:]) > 1e-3
    blocks = sum(whole(length) - 1 for length in HEADS[1:])
    assert served.new("blocks_in_place") == blocks and served.new("pages_filled") == served.new("faults") == 0
    assert served.new("moved_tokens_skipped") == served.new("prompt_tokens_skipped") == blocks * BLOCK
    assert served.computed == sum(len(prompt) + OUT - 1 for prompt in named(*HEADS)) - blocks * BLOCK


def test_what_lies_between_two_texts_is_computed_behind_the_first(
    served: Served, copied: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a helper, which reads in place as well."""
    in_place, readers = served.engine.side.reuse.fills.in_place, list[str]()
    start = in_place.start

    def watched(output: Any) -> list[ReadInPlace]:
        reads: list[ReadInPlace] = start(output)
        readers.extend(read.request_id for read in reads)
        return reads

    monkeypatch.setattr(in_place, "start", watched)
    found = one_by_one(served.engine, [two_texts(16, 40), two_texts(45, 50)])
    assert_near(found, copied["copied, two texts"])
    assert ["-gap-" in name for name in readers] == [True, False]
    assert served.new("blocks_in_place") == 2 * 6 and served.new("faults") == 0


def test_many_shifts_take_the_pages_of_one_text(served: Served) -> None:
    """Of 119 pages, which hold five of these requests."""
    prompts = named(*range(16, 28))
    served.engine.generate(prompts[:1], OUT)
    served.count_anew()
    names = [served.engine.submit(prompt, 2 * BLOCK) for prompt in prompts[1:]]
    served.engine.run_until_decoding()
    assert len(served.engine.vllm_scheduler.running) == len(names)
    lent = served.engine.side.tables.lent
    assert len(lent) <= whole(16) + 1 and max(lent.values()) == len(names)
    assert served.engine.pages_in_use <= len(lent) + 4 * len(names)
    served.engine.finish()
    assert all(len(served.engine.outputs[name]) == 2 * BLOCK for name in names)
    assert served.new("blocks_in_place") == sum(whole(length) - 1 for length in range(17, 28))


def test_pages_are_kept_though_whoever_computed_them_has_ended_and_the_pool_is_full(
    served: Served, copied: Any
) -> None:
    """Others take all that is free while it decodes."""
    served.engine.generate(named(16), OUT)
    name = served.engine.submit(named(*HEADS)[1], OUT, logprobs=0)
    served.engine.run_until_decoding()
    kept = set(served.engine.side.tables.lent)
    assert kept
    others = [served.engine.submit(text(900, 40 + number), 2) for number in range(3)]
    most = 0
    while name not in served.engine.outputs:
        served.engine.step()
        held = {page for other in others for page in pages_of(served.engine, other)}
        assert not held & kept
        most = max(most, served.engine.pages_in_use)
    assert most >= 100
    served.engine.finish()
    assert_near([(served.engine.outputs[name], served.engine.logprobs[name])], copied["copied"][1:2])


def pages_of(served: Engine, name: str) -> list[int]:
    """Its pages, where it holds some."""
    try:
        return served.table(name)
    except ValueError:
        return []


def test_a_request_that_was_preempted_reads_in_place_again(served: Served) -> None:
    """What it read was given back meanwhile, else the cache could not be emptied."""
    prompts = named(*HEADS)
    served.engine.generate(prompts[:1], OUT)
    served.count_anew()
    names = [served.engine.submit(prompt, 40) for prompt in prompts[1:]]
    served.engine.run_until_decoding()
    assert served.engine.side.tables.lent
    assert served.engine.llm.reset_prefix_cache(reset_running_requests=True)
    assert not served.engine.side.tables.lent and served.engine.pages_in_use == 0
    served.engine.finish()
    assert all(len(served.engine.outputs[name]) == 40 for name in names) and served.new("faults") == 0


def test_a_reader_that_goes_away_gives_back_what_it_read(served: Served) -> None:
    prompts = named(*HEADS)
    served.engine.generate(prompts[:1], OUT)
    names = [served.engine.submit(prompt, 40) for prompt in prompts[1:]]
    served.engine.run_until_decoding()
    before = dict(served.engine.side.tables.lent)
    served.engine.abort(names[0])
    after = served.engine.side.tables.lent
    assert max(before.values()) == 3 and max(after.values()) == 2
    served.engine.finish()


@pytest.mark.parametrize("when", ["before the step", "while it is scheduled"])
def test_sources_that_are_gone_before_the_request_starts(
    served: Served, copied: Any, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """Nobody reads them: their text is computed."""
    served.engine.generate(named(16), OUT)
    served.count_anew()
    in_place, residents = served.engine.side.reuse.fills.in_place, served.engine.side.candidates.residents
    look, taken = in_place.look, list[int]()

    def late(intakes: Any) -> None:
        intakes = list(intakes)
        look(intakes)
        pages = sorted({page for intake in intakes for page in intake.sources_in_place()})
        if pages and not taken:
            taken.append(pages[4])
            if when == "before the step":
                residents.remove(pages[4])
            else:  # as one that decodes does; that the page is another's is known when all is scheduled
                served.engine.pool.touch([served.engine.pool.blocks[pages[4]]])

    monkeypatch.setattr(in_place, "look", late)
    name = served.engine.submit(named(*HEADS)[1], OUT, logprobs=0)
    while not taken:
        served.engine.step()
    assert not served.engine.side.tables.lent
    if when == "while it is scheduled":
        residents.remove(taken[0])
        served.engine.pool.free_blocks([served.engine.pool.blocks[taken[0]]])
    served.engine.finish()
    assert served.engine.outputs[name] == copied["computed"][1][0]
    assert served.new("faults") == 0 and served.new("blocks_in_place") < whole(21) - 1


@pytest.mark.hazard(
    "Faults", "attention fails, and vLLM's own would read a wrong page", "the definition does it; no request starts so"
)
def test_a_fault_in_attention(served: Served, copied: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who reads in place goes on to; whose text moved after that reads copies."""
    prompts = named(*HEADS)
    served.engine.generate(prompts[:1], OUT)
    served.count_anew()
    name = served.engine.submit(prompts[1], OUT, logprobs=0)
    served.engine.run_until_decoding()
    assert served.new("blocks_in_place") == whole(21) - 1

    def broken(*args: Any) -> None:
        raise RuntimeError("broken")

    (shared,) = get_kv_transfer_group().worker.readings.values()
    with monkeypatch.context() as patch:
        patch.setattr(JointAttention, "attend", broken)
        served.engine.finish()
    assert shared.fault == "RuntimeError: broken"
    found = [(served.engine.outputs[name], served.engine.logprobs[name])]
    assert_near(found, copied["copied"][1:2])
    assert_near(one_by_one(served.engine, prompts[2:3]), copied["copied"][2:3])
    assert served.new("blocks_in_place") == whole(21) - 1 and served.new("pages_filled") == whole(45) - 1
    shared.fault = None
    served.engine.generate([text(40, 1)], 1)


def test_an_error_of_the_scheduler_while_a_request_waits(
    served: Served, copied: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It computes what it was to read in place."""
    served.engine.generate(named(16), OUT)
    served.count_anew()
    side = served.engine.side

    def broken(*args: Any) -> None:
        raise RuntimeError("broken")

    with monkeypatch.context() as patch:
        patch.setattr(side.reuse.fills.in_place, "may_start", broken)
        name = served.engine.submit(named(*HEADS)[1], OUT, logprobs=0)
        served.engine.finish()
    assert served.engine.outputs[name] == copied["computed"][1][0]
    assert served.new("blocks_in_place") == 0 and served.new("faults") == 1 and "broken" in side.recovery.cause
    side.recovery, side.enabled = type(side.recovery)(60.0, 3), True


def step(finished: tuple[str, ...] = (), new: tuple[str, ...] = ()) -> Any:
    """What a worker sees of a scheduler's output."""
    starting = [SimpleNamespace(req_id=name, num_computed_tokens=64) for name in new]
    cached = SimpleNamespace(resumed_req_ids=set(), req_ids=[], num_computed_tokens=[])
    return SimpleNamespace(finished_req_ids=set(finished), scheduled_new_reqs=starting, scheduled_cached_reqs=cached)


FILLS = MovedRun(16, 48, 0, 0, np.arange(5, 8), 3).fills(16)
LENGTHS = torch.tensor([80])


def test_a_worker_forgets_what_requests_read_that_end_or_start_anew() -> None:
    reads = InPlace([NOT_TURNED], 16)
    reads.follow(step(new=("a", "b")), [ReadInPlace("a", FILLS)])
    tables = torch.tensor([[1, 2, 0, 0, 0], [4, 0, 0, 0, 3]])
    assert reads.rows(["b", "a"], tables, torch.tensor([20, 80])) == {1: FILLS}
    for gone in (step(finished=("a",)), step(new=("a",))):
        reads.follow(step(new=("a",)), [ReadInPlace("a", FILLS)])
        reads.follow(gone, [])
        assert not len(reads)


@pytest.mark.parametrize(
    ("table", "name"),
    [([4, 0, 2, 0, 3], "a"), ([4, 0, 0, 9, 3], "a"), ([4, 0, 0, 0, 0], "a"), ([4, 0, 0, 0, 3], "b"), ([4, 0, 0], "a")],
    ids=["a page where there is none", "the last one", "none where there is one", "a stranger", "a short table"],
)
def test_a_table_that_is_not_as_the_scheduler_said_ends_the_engine(table: list[int], name: str) -> None:
    """What would be read instead is another's."""
    reads = InPlace([NOT_TURNED], 16)
    reads.follow(step(new=("a",)), [ReadInPlace("a", FILLS)])
    assert reads.rows(["a"], torch.tensor([[4, 0, 0, 0, 3]]), LENGTHS) == {0: FILLS}
    with pytest.raises(IntegrityError):
        reads.rows([name], torch.tensor([table]), LENGTHS)
