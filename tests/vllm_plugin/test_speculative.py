"""Drafts from the request's own text: what is verified later is neither compared nor shared before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.distributed.kv_transfer import get_kv_transfer_group

from tests.hazards import FIRST
from tests.vllm_plugin.engines import EXACT, LOSSY, Engine, Prompt, engine, near_prefix, text

OUT = 60
DRAFTS = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
OPTIONS: dict[str, Any] = {"speculative_config": DRAFTS, "max_model_len": 512, "max_num_batched_tokens": 256}
PROMPTS = [text(100, number // 2) + text(60, 99) for number in range(12)]
ALIKE = near_prefix(5, shared=300, head=32)
PROBED = {**LOSSY, "reuse": "probed", "reuse_audit_rate": 1e-9}

pytestmark = [pytest.mark.usefixtures("bold"), pytest.mark.runs("drafts by ngram", *FIRST)]


def crowd(served: Engine) -> dict[str, Prompt]:
    """Answers of those who stay."""
    names = [served.submit(prompt, OUT) for prompt in PROMPTS]
    for step in range(12):
        served.step()
        if step in (3, 8):
            served.abort(names[step])
    served.finish()
    return {name: served.outputs[name] for name in names if name not in (names[3], names[8])}


def test_bound_zero_changes_no_token_of_drafted_answers(calm: Path) -> None:
    with engine(calm, enable_prefix_caching=False, max_model_len=512, max_num_batched_tokens=256) as plain:
        expected = crowd(plain)
        assert not plain.drafted
    with engine(calm, 34, EXACT, enable_prefix_caching=False, **OPTIONS) as served:
        assert crowd(served) == expected and served.drafted > 100
        assert served.statistics["blocks_merged"] > 0 and served.statistics["faults"] == 0
        assert served.preempted > 0
        served.assert_drained()


@pytest.mark.parametrize(
    "fusion", [PROBED, {**LOSSY, "own_norms": True, "max_relative_error": 0.5}], ids=["reuse", "own norms"]
)
def test_drafts_beside_reuse_and_own_norms(fusion: dict[str, Any], calm: Path) -> None:
    with engine(calm, 60, fusion, **OPTIONS) as served:
        held: list[int] = []
        norms = get_kv_transfer_group().worker.norms
        served.watchers.append(lambda _: held.append(0 if norms is None else len(norms)))
        answers = served.generate(ALIKE[:1], OUT) + served.generate(ALIKE[1:], OUT)
        assert all(len(tokens) == OUT for tokens in answers)
        found = served.statistics
        assert found["blocks_merged"] > 0 and found["faults"] == 0 and served.drafted > 0
        assert (found["prompt_tokens_skipped"] > 0) == ("reuse" in fusion) and (max(held) > 0) == (
            "own_norms" in fusion
        )
        served.assert_drained()
