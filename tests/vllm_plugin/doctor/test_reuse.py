"""What the doctor makes of near-prefix prompts."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

from jointkv.vllm_plugin.doctor.reuse import FOLLOWERS, NEAR_PREFIX_TOKENS, agreed, near_prefix_prompts, reused
from jointkv.vllm_plugin.doctor.trial import MAX_TOKENS, OUTPUT_TOKENS, SYNONYMS, Trial, vocabulary

ENGINE = SimpleNamespace(vllm_config=SimpleNamespace(model_config=SimpleNamespace(get_vocab_size=lambda: 512)))


def test_prompts_differ_in_their_first_token_alone() -> None:
    prompts = [prompt["prompt_token_ids"] for prompt in near_prefix_prompts(ENGINE, SYNONYMS)]
    assert [prompt[0] for prompt in prompts] == list(SYNONYMS) and not set(SYNONYMS) & set(vocabulary(ENGINE))
    assert len({tuple(prompt[1:]) for prompt in prompts}) == 1
    assert {len(prompt) for prompt in prompts} == {NEAR_PREFIX_TOKENS}
    assert NEAR_PREFIX_TOKENS + OUTPUT_TOKENS <= MAX_TOKENS


@pytest.mark.parametrize(
    ("tokens", "expected", "count"), [([1, 2], [1, 2], 2), ([1, 3, 4], [1, 2, 4], 1), ([3], [1], 0), ([], [], 0)]
)
def test_agreed(tokens: list[int], expected: list[int], count: int) -> None:
    assert agreed(tokens, expected) == count


def test_log_probabilities_count_up_to_the_first_other_token() -> None:
    stock = Trial([([1, 2, 3], [-0.1, -0.2, -0.3]), ([4, 5], [-0.5, -0.6])], [], [])
    served = Trial([([1, 2, 3], [-0.1, -0.25, -0.3]), ([4, 6], [-0.5, -9.0])], [], [])
    side = SimpleNamespace(totals=lambda: {"prompt_tokens_skipped": 64}, recovery=SimpleNamespace(cause=None))
    found = reused(side, stock, served)
    assert (found.same, found.answers, found.skipped, found.fault) == (1, 2, 64, None)
    assert found.prompt_tokens == FOLLOWERS * NEAR_PREFIX_TOKENS and found.shift == pytest.approx(0.05)
    assert "64 of" in str(found) and "switched off" not in str(found)
    side.recovery.cause = "no memory"
    assert "switched off: no memory" in str(reused(side, stock, served))
