"""Reuse before compute in a real engine: what is skipped, what clients see, and what is left behind."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm")

from jointkv.policy.worth import ENOUGH, RARELY
from jointkv.vllm_plugin.scheduler.reuse import WAVES
from tests.hazards import FIRST
from tests.vllm_plugin.engines import LOSSY, Engine, Prompt, engine, near_prefix, text, write_model

BLOCK, OUT = 32, 8
PROBED = {**LOSSY, "reuse": "probed", "reuse_audit_rate": 1e-9}
HEAD, TAIL = text(BLOCK, 1), text(20, 2)

pytestmark = [pytest.mark.usefixtures("bold"), pytest.mark.runs("reuse", *FIRST)]


@dataclass
class Served:
    """An engine that reuses, and what was counted in it.

    Attributes:
        computed: tokens that steps were scheduled for.
    """

    engine: Engine
    computed: int = 0
    before: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        schedule = self.engine.vllm_scheduler.schedule

        def counted(*args: Any, **options: Any) -> Any:
            output = schedule(*args, **options)
            self.computed += output.total_num_scheduled_tokens
            return output

        self.engine.vllm_scheduler.schedule = counted

    def start(self) -> None:
        """Count anew, with nothing resident."""
        assert self.engine.llm.reset_prefix_cache()
        self.count_anew()

    def count_anew(self) -> None:
        self.computed, self.before = 0, self.engine.statistics

    def new(self, name: str) -> int:
        return int(self.engine.statistics[name] - self.before[name])

    def done(self) -> None:
        """Nothing is left behind."""
        self.engine.assert_drained()
        assert not self.engine.side.reuse.intakes and not self.engine.side.reuse.stray()
        assert not self.engine.pool.cached_block_hashes_by_block
        assert self.new("faults") == 0


@pytest.fixture(scope="module")
def serene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model in which a different first line changes K and V of what follows next to nothing."""
    return write_model(tmp_path_factory.mktemp("serene"), context=0.005)


@pytest.fixture(scope="module")
def expected(serene: Path) -> list[Prompt]:
    """What the stock engine answers to near prefixes."""
    with engine(serene) as stock:
        return stock.generate(near_prefix(5), OUT)


@pytest.fixture(scope="module")
def reusing(serene: Path) -> Iterator[Served]:
    with engine(serene, fusion=PROBED, disable_log_stats=False) as served:
        yield Served(served)


@pytest.fixture
def served(reusing: Served) -> Iterator[Served]:
    reusing.start()
    yield reusing
    reusing.engine.finish()
    reusing.done()


def test_only_header_entry_block_and_tail_are_computed(expected: list[Prompt], served: Served) -> None:
    """The donor has finished. Answers and what clients are told of their prompts are those of the stock engine."""
    prompts = near_prefix(5)
    reads: list[tuple[int, int]] = []
    served.engine.generate(prompts[:1], OUT)
    served.count_anew()
    step = served.engine.llm.llm_engine.step

    def watched() -> Any:
        outputs = step()
        reads.extend((len(one.prompt_token_ids), one.num_cached_tokens) for one in outputs if one.finished)
        return outputs

    served.engine.llm.llm_engine.step = watched
    try:
        answers = served.engine.generate(prompts[1:], OUT)
    finally:
        served.engine.llm.llm_engine.step = step
    tokens, reused = len(prompts[0]), 20 * BLOCK  # blocks 2 to 21
    assert served.new("prompt_tokens_skipped") == 4 * reused
    assert served.computed == 4 * (tokens - reused + OUT - 1)
    assert (served.new("reuse_runs"), served.new("reuse_helpers"), served.new("reuse_gaps")) == (4, 4, 4)
    assert reads == [(tokens, reused)] * 4
    assert answers == expected[1:]


def test_each_run_has_an_entry_block_and_gaps_are_computed(served: Served) -> None:
    first, own, second = text(7 * BLOCK, 11), text(3 * BLOCK, 12), text(8 * BLOCK, 13)
    served.engine.generate([text(BLOCK, 3) + first + text(3 * BLOCK, 14) + second + TAIL])
    served.count_anew()
    served.engine.generate([HEAD + first + own + second + TAIL])
    assert served.new("prompt_tokens_skipped") == (6 + 7) * BLOCK
    assert (served.new("reuse_runs"), served.new("reuse_gaps")) == (2, 2)


def test_a_page_with_a_bad_witness_is_computed(served: Served) -> None:
    body = text(12 * BLOCK, 21)
    donor = served.engine.submit(text(BLOCK, 3) + body + TAIL, 4)
    served.engine.run_until_decoding()
    page = served.engine.table(donor)[6]
    served.engine.finish()
    residents = served.engine.side.candidates.residents
    residents.evidence.add(np.array([page]), np.array([5.0], np.float32), np.zeros(1, np.uint64))
    served.count_anew()
    served.engine.generate([HEAD + body + TAIL])
    assert served.new("prompt_tokens_skipped") == (11 - 1) * BLOCK
    assert (served.new("reuse_runs"), served.new("reuse_gaps"), served.new("reuse_helpers")) == (2, 2, 2)


def test_pages_with_witnesses_need_no_entry_block(served: Served) -> None:
    body = text(12 * BLOCK, 22)
    donor = served.engine.submit(text(BLOCK, 3) + body + TAIL, 4)
    served.engine.run_until_decoding()
    pages = np.array(served.engine.table(donor)[1:13])
    served.engine.finish()
    residents = served.engine.side.candidates.residents
    residents.evidence.add(pages, np.full(12, 0.1, np.float32), np.zeros(12, np.uint64))
    served.count_anew()
    steps = served.engine.steps
    served.engine.generate([HEAD + body + TAIL], 1)
    assert served.new("prompt_tokens_skipped") == 12 * BLOCK and served.computed == BLOCK + len(TAIL)
    assert served.engine.steps - steps == 1  # the helper's header and the end of the prompt in one
    assert (served.new("reuse_gaps"), served.new("reuse_helpers")) == (1, 1)


def test_comparisons_that_save_nothing_are_made_for_one_request_in_eight(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here every entry block is too far, and several of each request are compared before that is known.

    Requests that have none to compare take nobody's turn.
    """
    reuse = served.engine.side.reuse
    for part in (reuse.entry_blocks, reuse.look_up):
        monkeypatch.setattr(part, "_rule", replace(part._rule, near=0.0, witnesses=10**6))
    asked = []
    for number, prompt in enumerate(near_prefix(ENOUGH + 2 * RARELY)):
        nothing_to_compare = text(2 * BLOCK, 900 + number) + prompt[2 * BLOCK : 4 * BLOCK] + TAIL
        served.engine.generate([nothing_to_compare], 1)
        served.count_anew()
        served.engine.generate([prompt], 1)
        asked.append(served.new("reuse_helpers") > 0)
        assert served.new("prompt_tokens_skipped") == 0
    assert asked[1] and sum(asked[ENOUGH:]) == 2


def test_of_many_that_come_at_once_the_first_need_not_wait_for_the_last(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They begin in the order in which they came, as many at a time as a part of a step can bring to an answer.

    Nobody computes what is resident meanwhile, and who reuses nothing does not wait behind them.
    """
    scheduler, budget, many = served.engine.vllm_scheduler, 24 * BLOCK, 24
    monkeypatch.setattr(scheduler, "max_num_scheduled_tokens", budget)
    donor, *prompts = near_prefix(many + 1)
    served.engine.generate([donor])
    served.count_anew()
    prompts.insert(budget // (2 * BLOCK), text(3 * BLOCK, 77))
    names = [served.engine.submit(prompt, 2) for prompt in prompts]
    other = names.pop(budget // (2 * BLOCK))
    seen: list[set[str]] = []
    served.engine.watchers.append(
        lambda _: seen.append({one.request_id.rsplit("-", 1)[0] for one in scheduler.running})
    )
    try:
        served.engine.finish()
    finally:
        served.engine.watchers.pop()
    assert served.new("prompt_tokens_skipped") == many * 20 * BLOCK
    started = [next(step for step, running in enumerate(seen) if name in running) for name in (*names, other)]
    assert started == [*sorted(started[:-1]), 0]
    assert started.count(started[0]) == math.ceil(budget // WAVES / (len(donor) - 20 * BLOCK))


def test_what_helpers_have_computed_is_fused_afterwards(served: Served) -> None:
    """Until the helper has ended, it holds the entry block as well, and giving one entry up would free nothing."""
    prompts = near_prefix(3)
    served.engine.generate(prompts[:1], 2)
    served.count_anew()
    names = [served.engine.submit(prompt, 8) for prompt in prompts[1:]]
    for _ in range(6):
        served.engine.step()
    tables = [served.engine.table(name) for name in names]
    assert tables[0][1] == tables[1][1] and served.new("blocks_merged") >= 2
    assert not served.engine.statistics["rejected"].get("page_shared")


@pytest.mark.parametrize(
    "options", [{"extra": {"jointkv": False}}, {"prompt_logprobs": 1}, {"salt": "another"}], ids=str
)
def test_who_does_not_take_part_computes_everything(options: dict[str, Any], served: Served) -> None:
    prompts = near_prefix(2)
    served.engine.generate(prompts[:1], 2)
    served.count_anew()
    served.engine.generate(prompts[1:], 2, **options)
    assert served.new("prompt_tokens_skipped") == served.new("reuse_helpers") == 0
    assert served.computed == len(prompts[1]) + 1


@pytest.mark.parametrize("steps", range(5))
def test_a_helper_goes_with_its_request(steps: int, served: Served) -> None:
    """Aborted while its helper waits, runs or is compared, when pages are adopted, and while it runs."""
    prompts = near_prefix(3)
    served.engine.generate(prompts[:1], 2)
    name = served.engine.submit(prompts[1], 20)
    for _ in range(steps):
        served.engine.step()
    served.engine.abort(name)
    assert not served.engine.vllm_scheduler.requests
    assert served.engine.pages_in_use == 0


def test_statistics_of_requests_do_not_count_helpers(served: Served) -> None:
    prompts = near_prefix(4)
    served.engine.generate(prompts[:1], 2)
    with served.engine.watched() as seen:
        served.engine.generate(prompts[1:], 4)
    for stats, outputs in seen:
        counts = stats.num_running_reqs, stats.num_waiting_reqs, stats.num_skipped_waiting_reqs
        assert sum(counts) <= 3 and min(counts) >= 0
        assert not any("-gap-" in output.request_id for output in outputs)
    cache = [stats.prefix_cache_stats for stats, _ in seen]
    assert sum(one.requests for one in cache) == 3
    assert sum(one.queries for one in cache) == 3 * len(prompts[0])
    assert sum(one.hits for one in cache) == 3 * 20 * BLOCK
