"""A prompt whose text is resident behind another first token, served without computing it. For the doctor."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jointkv.vllm_plugin.doctor.trial import BLOCK_SIZE, SYNONYMS, Trial, run_trial, vocabulary

FOLLOWERS = len(SYNONYMS) - 1
NEAR_PREFIX_TOKENS = 12 * BLOCK_SIZE + 4
REUSE = {"reuse": "probed", "reuse_audit_rate": 1e-9, "min_pool_usage": 0.0, "check_integrity": True}
"""Without a licence, which takes many more requests to earn; and without audits, which are drawn by chance."""


@dataclass(frozen=True)
class Reused:
    """What became of near-prefix prompts.

    Attributes:
        prompt_tokens: of those that could reuse, and `skipped` of them were not computed.
        same: of the answers, how many have the stock engine's tokens.
        shift: the largest change of a log-probability, up to the first token that differs.
        fault: why the plugin has switched itself off.
    """

    prompt_tokens: int
    skipped: int
    same: int
    answers: int
    shift: float
    fault: str | None

    def __str__(self) -> str:
        said = (
            f"{self.skipped} of {self.prompt_tokens} prompt tokens skipped; {self.same} of {self.answers} answers have "
            f"the stock engine's tokens, log-probabilities within {self.shift:.2g}"
        )
        return said + (f"; switched off: {self.fault}" if self.fault else "")


def near_prefix_prompts(engine: Any, first: Sequence[int]) -> list[dict[str, Any]]:
    """One random text behind each of the tokens `first`."""
    draw, words = random.Random(1), vocabulary(engine)
    text = [draw.choice(words) for _ in range(NEAR_PREFIX_TOKENS - 1)]
    return [{"prompt_token_ids": [token, *text]} for token in first]


def serve_near_prefix(engine: Any, tiny: bool) -> Trial:
    """One prompt alone, then `FOLLOWERS` together that differ from it in their first token.

    Args:
        tiny: the model is that of `write_tiny_model`. Another has no synonyms that are known here.
    """
    first = SYNONYMS if tiny else random.Random(0).sample(vocabulary(engine), len(SYNONYMS))
    donor, *others = near_prefix_prompts(engine, first)
    alone, rest = run_trial(engine, [donor]), run_trial(engine, others)
    return Trial(alone.outputs + rest.outputs, alone.used + rest.used, alone.freed + rest.freed)


def reused(scheduler: Any, stock: Trial, served: Trial) -> Reused:
    """How `served`, after which the plugin's side is `scheduler`, differs from `stock`."""
    pairs = list(zip(served.outputs, stock.outputs, strict=True))
    changes = [
        abs(ours - theirs)
        for (tokens, found), (expected, exact) in pairs
        for ours, theirs in zip(found, exact[: agreed(tokens, expected)], strict=False)
    ]
    return Reused(
        prompt_tokens=FOLLOWERS * NEAR_PREFIX_TOKENS,
        skipped=scheduler.totals()["prompt_tokens_skipped"],
        same=sum(ours[0] == theirs[0] for ours, theirs in pairs),
        answers=len(pairs),
        shift=max(changes, default=0.0),
        fault=scheduler.recovery.cause,
    )


def agreed(tokens: list[int], expected: list[int]) -> int:
    """How many tokens agree before the first that does not."""
    return next(
        (number for number, (one, other) in enumerate(zip(tokens, expected, strict=False)) if one != other), len(tokens)
    )
