"""A page answers for a hash of the prefix cache only if it holds what that hash stands for."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from torch import Tensor
from vllm.v1.request import Request

from tests.vllm_plugin.engines import LOSSY, Engine, Prompt, engine, near_prefix, text

ALONE = {"jointkv": False}
"""Requests that do not take part are not approximated themselves: what they say depends on the prefix cache alone."""

OUT = 40
SAME = 1e-4
"""Relative difference of a page computed in other batches; approximated pages differ by more than a tenth."""

SETUPS = {
    "whole prompts": {"pages": 400},
    "chunked, crowded": {"pages": 40, "max_num_batched_tokens": 192, "max_num_seqs": 16},
}


@dataclass(repr=False)
class Served:
    """What the fused engine said and held, and what a stock engine says to it."""

    setup: str
    asked: dict[str, list[Prompt]] = field(default_factory=dict)
    answered: dict[str, list[Prompt]] = field(default_factory=dict)
    expected: dict[str, list[Prompt]] = field(default_factory=dict)
    cached: list[tuple[int, bytes, int, Tensor]] = field(default_factory=list)
    private: int = 0
    exact: dict[bytes, Tensor] = field(default_factory=dict)
    approximated: list[tuple[bytes, Tensor]] = field(default_factory=list)
    hits: int = 0
    preempted: int = 0
    merged: int = 0


def private_hashes(fused: Engine) -> set[bytes]:
    """Hashes that only one running or preempted request can look up."""
    return {
        key
        for tracked in fused.side.requests.active.values()
        if tracked.private_from is not None
        for key in tracked.request.block_hashes[tracked.private_from // 32 :]
    }


def exact_hashes(request: Request) -> list[bytes]:
    """Those that stand for the text of `request`, whatever it looks up itself."""
    twin = copy(request)
    twin.block_hashes = []
    twin.update_block_hashes()
    return twin.block_hashes


def look(served: Served) -> Callable[[Engine], None]:
    """Keep copies of all cached pages now and then, but of those that answer for private hashes."""

    def watcher(fused: Engine) -> None:
        if fused.steps % 16 == 0:
            private = private_hashes(fused)
            for key, pages in fused.pages_by_hash().items():
                if key[:32] in private:
                    served.private += 1
                else:
                    served.cached.extend((fused.steps, key, number, content) for number, content in pages)

    return watcher


def keep_tables(served: Served, fused: Engine) -> None:
    """Keep the pages that running requests read, by the hash that stands for their text."""
    for request in fused.vllm_scheduler.running:
        for key, number in zip(exact_hashes(request), fused.table(request.request_id), strict=False):
            served.approximated.append((key, fused.page(number)))


def ask(served: Served, fused: Engine, name: str, prompts: list[Prompt], out: int = OUT) -> list[Prompt]:
    served.asked[name] = prompts
    names = [fused.submit(prompt, out, extra=ALONE) for prompt in prompts]
    fused.finish()
    served.answered[name] = [fused.outputs[found] for found in names]
    return served.answered[name]


@pytest.fixture(scope="module", params=SETUPS)
def served(request: pytest.FixtureRequest, lively: Path) -> Served:
    served = Served(request.param)
    first = near_prefix(6, shared=300)
    second = [prompt[:200] + text(150, number) for number, prompt in enumerate(first)]
    taking_part: list[Prompt] = []
    with engine(lively, fusion=LOSSY, **SETUPS[request.param]) as fused:
        fused.watchers.append(look(served))
        names = [fused.submit(prompt, OUT) for prompt in first]
        for _ in range(12):
            fused.step()
        keep_tables(served, fused)
        late = [fused.submit(prompt, 8, extra=ALONE) for prompt in first[:2]]
        fused.finish()
        outputs = [fused.outputs[name] for name in names]
        taking_part += [prompt + output for prompt, output in zip(first, outputs, strict=True)]
        served.asked["while others run"] = first[:2]
        served.answered["while others run"] = [fused.outputs[name] for name in late]
        ask(served, fused, "same again", first)
        extended = [full + text(12, 7) for full in taking_part]
        answers = ask(served, fused, "extended by its output", extended)
        turns = extended
        for turn in range(3):
            turns = [p + a + text(30, 100 + turn) for p, a in zip(turns, answers, strict=True)]
            answers = ask(served, fused, f"turn {turn}", turns, 24)
            names = [fused.submit(prompt, 24) for prompt in turns[:3] + second]
            fused.finish()
            taking_part += [p + fused.outputs[n] for p, n in zip(turns[:3] + second, names, strict=True)]
        ask(served, fused, "same again at last", first)
        served.merged = fused.statistics["blocks_merged"]
        served.preempted = fused.preempted
        served.hits = fused.cached_tokens
        assert fused.statistics["faults"] == 0
        fused.assert_drained()
    with engine(lively, pages=1000, enable_prefix_caching=False) as stock:
        for name, prompts in served.asked.items():
            out = len(served.answered[name][0])
            served.expected[name] = stock.generate(prompts, out)
    with engine(lively, pages=4000) as stock:
        asked = [p + a for name in served.asked for p, a in zip(served.asked[name], served.answered[name], strict=True)]
        stock.generate(taking_part + asked, 1)
        served.exact = {key: pages[0][1] for key, pages in stock.pages_by_hash().items()}
    return served


def difference(page: Tensor, exact: Tensor) -> float:
    return float(((page - exact).norm(dim=1) / exact.norm(dim=1)).max())


def test_the_engine_merged_what_differs(served: Served) -> None:
    assert served.merged > 50
    exact = {key[: len(served.approximated[0][0])]: page for key, page in served.exact.items()}
    far = sum(difference(page, exact[key]) > 0.1 for key, page in served.approximated if key in exact)
    assert far > 10


def test_the_prefix_cache_was_hit(served: Served) -> None:
    assert served.hits > 1500


def test_answers_behind_a_hit_are_those_of_the_stock_engine(served: Served) -> None:
    for name, answers in served.answered.items():
        assert answers == served.expected[name], name


def test_every_cached_page_holds_what_its_hash_stands_for(served: Served) -> None:
    assert len(served.cached) > 200 and served.private > 50
    assert {key for _, key, _, _ in served.cached} <= set(served.exact)
    wrong = [
        (step, number) for step, key, number, content in served.cached if difference(content, served.exact[key]) > SAME
    ]
    assert not wrong, f"{len(wrong)} of {len(served.cached)}: {wrong[:5]}"


def test_only_the_crowded_engine_preempted(served: Served) -> None:
    assert (served.preempted > 0) == ("crowded" in served.setup)
