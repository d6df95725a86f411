"""Everything at once: chunked prefill, prefix caching, salts, opt-outs, preemption, aborts, generated blocks."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from census import Census
from engines import LOSSY, engine, text, write_model

MERGES = 5000
SALTS = (None, "red", "green", "blue")


@pytest.fixture(scope="module")
def smallest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("smallest"), context=0.3, layers=1, heads=2, kv_heads=1)


@pytest.mark.timeout(600)
def test_five_thousand_merges(smallest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(0)
    shared = [text(600, seed) for seed in range(2)]
    setup = {"pages": 60, "max_num_batched_tokens": 256, "max_num_seqs": 24}
    with engine(smallest, fusion={**LOSSY, "max_blocks_per_step": 40}, **setup) as fused:
        census = Census(fused, monkeypatch)
        expected: dict[str, int] = {}
        waiting: list[str] = []
        aborted = 0
        prompt = text(32, 0)
        while census.merges < MERGES and not fused.statistics["faults"]:
            if len(waiting) < 20 and rng.random() < 0.7:
                if rng.random() < 0.8:  # else the same prompt once more
                    prompt = text(rng.randrange(1, 32), rng.randrange(10**6))
                    prompt = prompt + [9] * (32 - len(prompt)) + rng.choice(shared)[: rng.randrange(200, 600)]
                out = rng.randrange(1, 70)
                extra = {"jointkv": False} if rng.random() < 0.05 else None
                own = text(16, rng.randrange(10**6)) + prompt if extra else prompt
                name = fused.submit(own, out, salt=rng.choice(SALTS), extra=extra)
                expected[name] = out
                waiting.append(name)
            if waiting and rng.random() < 0.02:
                name = waiting.pop(rng.randrange(len(waiting)))
                fused.abort(name)
                aborted += expected.pop(name, None) is not None
            fused.step()
            waiting = [name for name in waiting if name not in fused.outputs]
        fused.finish()
        statistics = fused.statistics
        assert (statistics["faults"], statistics["state"]) == (0, "active")
        assert statistics["blocks_merged"] == statistics["pages_freed"] == census.merges >= MERGES
        assert census.generated > 20 and census.checks > 200
        assert fused.preempted >= 10 and aborted >= 10
        assert {name: len(tokens) for name, tokens in fused.outputs.items() if name in expected} == expected
        fused.assert_drained()
        print(statistics, fused.steps, fused.preempted, aborted, census.generated, fused.cached_tokens)
