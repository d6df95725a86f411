"""Scores of prompts and repeated requests say the same whatever the engine has served before."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm import SamplingParams

from tests.vllm_plugin.engines import LOSSY, Engine, Prompt, engine, near_prefix, text

SHARED = 320


@pytest.fixture(scope="module")
def served(calm: Path) -> Iterator[Engine]:
    # Prompts come in chunks: what one chunk has merged, the next one reads.
    with engine(calm, fusion=LOSSY, max_num_batched_tokens=128) as found:
        yield found
        assert found.statistics["faults"] == 0
        found.assert_drained()


def scores(served: Engine, prompt: Prompt, extra: dict[str, Any] | None = None) -> list[float]:
    """Log-probability of each token of `prompt` but the first."""
    params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False, extra_args=extra)
    (output,) = served.llm.generate({"prompt_token_ids": prompt}, params, use_tqdm=False)
    first, *rest = output.prompt_logprobs
    assert first is None and len(rest) == len(prompt) - 1, "there is one for every token"
    return [position[token].logprob for position, token in zip(rest, prompt[1:], strict=True)]


@pytest.mark.parametrize("length", [31, 32, 33, 300])
def test_a_prompt_that_is_cached_is_scored_in_full(served: Engine, length: int) -> None:
    prompt = text(length, 100 + length)
    before = scores(served, prompt)
    served.generate([prompt, prompt], 4)
    assert scores(served, prompt) == before == scores(served, prompt)


def test_scores_do_not_depend_on_what_is_resident(served: Engine) -> None:
    first, second, third = near_prefix(3, shared=SHARED, seed=3)
    alone = scores(served, third)
    before = served.statistics["blocks_merged"]
    served.generate([first], 8)
    served.generate([second], 8)
    assert served.statistics["blocks_merged"] > before, "near prefixes share"
    before = served.statistics["blocks_merged"]
    assert scores(served, third) == alone
    assert served.statistics["blocks_merged"] == before


def test_who_says_so_is_scored_within_the_bound(served: Engine) -> None:
    first, second = near_prefix(2, shared=SHARED, seed=4)
    exact = scores(served, second)
    served.generate([first], 8)
    before = served.statistics["blocks_merged"]
    approximate = scores(served, second, {"jointkv": True})
    assert served.statistics["blocks_merged"] > before and approximate != exact


def test_equal_requests_get_equal_answers(served: Engine) -> None:
    """The first one computes its prompt, the others find it, and near prefixes come between."""
    prompt, *others = near_prefix(3, shared=SHARED, seed=5)
    (answer,) = served.generate([prompt], 16)
    for other in others:
        served.generate([other], 4)
        assert served.generate([prompt, prompt], 16) == [answer, answer]
