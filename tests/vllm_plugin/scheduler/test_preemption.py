"""A preempted request finds its own blocks again, also those that follow from approximated ones; nobody else does."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("vllm")

from vllm.v1.core.sched.output import SchedulerOutput

from jointkv.vllm_plugin.scheduler.candidates import Member
from tests.vllm_plugin.engines import LOSSY, Engine, engine, near_prefix

PROMPTS = near_prefix(20, shared=300, seed=11)
OUT = 110
CROWDED = {"pages": 48, "max_num_seqs": 24}


class Resumed:
    """Tokens that preempted requests had, and tokens they found in the prefix cache when they came back."""

    def __init__(self, fused: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.found: list[tuple[int, int]] = []
        manager = fused.vllm_scheduler.kv_cache_manager
        stock = manager.get_computed_blocks

        def look_up(request, *arguments, **options):
            result = stock(request, *arguments, **options)
            if request.num_preemptions:
                self.found.append((request.num_tokens, result[1]))
            return result

        monkeypatch.setattr(manager, "get_computed_blocks", look_up)


@pytest.mark.parametrize("options", [{}, {"layer_groups": 2}], ids=["one table", "two groups"])
def test_a_preempted_request_reads_its_own_blocks_again(
    lively: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, int]
) -> None:
    setup = {**CROWDED, "pages": CROWDED["pages"] * options.get("layer_groups", 1)}
    with engine(lively, fusion={**LOSSY, **options}, **setup) as fused:
        resumed = Resumed(fused, monkeypatch)
        names = [fused.submit(prompt, OUT) for prompt in PROMPTS]
        fused.finish()
        assert fused.preempted >= 2 and fused.statistics["blocks_merged"] > 50
        assert all(len(fused.outputs[name]) == OUT for name in names)
        had, found = (sum(numbers) for numbers in zip(*resumed.found, strict=True))
        print(f"resumed requests found {found} of {had} tokens")
        assert found > 0.3 * had, (found, had)  # some of its pages are handed out meanwhile
        assert fused.statistics["faults"] == 0
        fused.assert_drained()
        # What requests have left, no later one with their names finds, and pages that were read by many are not
        # burdened with the hashes of all of them.
        aliases = fused.pool.cached_block_hashes_by_block
        assert not aliases, aliases


def test_private_hashes_answer_nobody_else(lively: Path) -> None:
    """The same prompts again, by requests that are not fused, say what they say in a stock engine."""
    with engine(lively, pages=400) as stock:
        expected = stock.generate(PROMPTS, OUT)
    with engine(lively, fusion=LOSSY, **CROWDED) as fused:
        for prompt in PROMPTS:
            fused.submit(prompt, OUT)
        for _ in range(40):
            fused.step()
        assert fused.statistics["blocks_merged"] > 50
        names = [fused.submit(prompt, OUT, extra={"jointkv": False}) for prompt in PROMPTS]
        fused.finish()
        assert [fused.outputs[name] for name in names] == expected


def test_the_page_of_a_preempted_request_is_compared_with_nothing(lively: Path) -> None:
    """It waited for a second comparison; by now the page may belong to another tenant."""
    with engine(lively, fusion=LOSSY) as fused:
        fused.submit(PROMPTS[0], OUT)
        fused.submit(PROMPTS[1], OUT)
        for _ in range(4):
            fused.step()
        request = fused.vllm_scheduler.running.pop()
        resident = fused.side.tables.block(fused.vllm_scheduler.running[0].request_id, 0, 1).block_id
        assert resident in fused.side.candidates.residents
        tracked = fused.side.requests.active[request.request_id]
        own = fused.side.tables.block(request.request_id, 0, 0)
        fused.side.fusion._again = [Member(tracked, 0, 0, 0, own.block_id, 0, (), (), [resident])]
        fused.vllm_scheduler.prev_step_scheduled_req_ids.discard(request.request_id)
        fused.vllm_scheduler._preempt_request(request, 0.0, drop_stale_output=True)
        assert not list(fused.side.fusion._to_compare(SchedulerOutput.make_empty()))
        fused.finish()
        fused.assert_drained()
