"""What a tenant can see of its neighbours: nothing in its own answers, nothing of them in logs and statistics.

Bounds are so wide that reading a neighbour's page would change an answer, and numbers are compared to the last bit, so
the engine has to be deterministic. Two settings are, which is tested on the stock engine: one request at a time, and
batches of equal shape: kernels cut their work by it. What neighbours do not compute is part of the shape; it is the
same where text alone decides, and no bound.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

pytest.importorskip("vllm")

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.vllm_plugin.engines import LOSSY, Engine, Prompt, engine, near_prefix, text

OUT, HEAD = 6, 16
SALT = "salt-of-the-tenant-8f3a"
NEIGHBOURS_SALT = "salt-of-the-neighbour-c41d"
TENANT = near_prefix(3, shared=150, tail=8, seed=1)
"""The tenant's own requests merge with each other."""

ANY_ERROR = 10.0
"""Bounds nothing: blocks that have nothing in common are 1.4 apart."""

WAYS = {"after compute": LOSSY, "before compute": {**LOSSY, "reuse": "probed", "reuse_audit_rate": 1e-9}}

Stream = tuple[Prompt, list[float]]
"""Tokens of an answer and their log-probabilities."""


@dataclass(frozen=True)
class Neighbour:
    """A request of somebody else.

    Attributes:
        before: number of the tenant's request before which it comes.
        like: number of the tenant's request whose prompt it begins with.
        common: tokens that it has in common with that one.
        head: whether its first tokens are its own all the same.
        steps: aborted after so many steps; None lets it finish.
    """

    before: int
    like: int
    common: int
    salt: str | None = NEIGHBOURS_SALT
    out: int = OUT
    opted_out: bool = False
    head: bool = False
    steps: int | None = None

    def submit(self, served: Engine) -> None:
        prompt = TENANT[self.like][: self.common] + text(40, self.common)
        if self.head:
            prompt[:HEAD] = text(HEAD, 500 + self.like)
        extra = {"jointkv": False} if self.opted_out else None
        name = served.submit(prompt, self.out, salt=self.salt, extra=extra)
        if self.steps is not None:
            for _ in range(self.steps):
                served.step()
            served.abort(name)


def shared(served: Engine) -> int:
    """Blocks so far that were read from another request's page."""
    return int(served.statistics["blocks_merged"] + served.statistics["prompt_tokens_skipped"] // 32)


neighbours = st.lists(
    st.builds(
        Neighbour,
        before=st.integers(0, len(TENANT)),
        like=st.integers(0, len(TENANT) - 1),
        common=st.integers(0, len(TENANT[0])),
        salt=st.sampled_from([NEIGHBOURS_SALT, None, SALT.upper(), SALT + "2"]),
        out=st.integers(2, 12),
        opted_out=st.booleans(),
        head=st.booleans(),
        steps=st.none() | st.integers(0, 4),
    ),
    max_size=6,
)


def streams(served: Engine, beside: Sequence[Neighbour] = ()) -> list[Stream]:
    """The tenant's answers in an engine that remembers nothing."""
    assert served.llm.reset_prefix_cache()
    names = []
    for number, prompt in enumerate(TENANT):
        for neighbour in (one for one in beside if one.before == number):
            neighbour.submit(served)
        names.append(served.submit(prompt, OUT, salt=SALT, logprobs=0))
    for neighbour in (one for one in beside if one.before == len(TENANT)):
        neighbour.submit(served)
    served.finish()
    return [(served.outputs[name], served.logprobs[name]) for name in names]


@pytest.mark.hazard(
    "Isolation",
    "a neighbour with another salt changes a tenant's answer",
    "never: tokens and log-probabilities are equal to the last bit in an engine that serves one request at a time",
)
@pytest.mark.parametrize("way", WAYS)
def test_a_neighbour_changes_nothing(way: str, lively: Path, bold: None, record_property: Any) -> None:
    asked = 0
    with engine(lively, fusion=WAYS[way], pages=400, max_num_seqs=1) as served:
        alone = streams(served)
        assert shared(served) >= 6

        @settings(max_examples=20, suppress_health_check=list(HealthCheck))
        @given(neighbours)
        def compare(beside: list[Neighbour]) -> None:
            nonlocal asked
            assert streams(served, beside) == alone
            asked += len(beside)

        compare()
        # Such a neighbour would change it if it had the tenant's salt.
        like_the_tenant = [Neighbour(0, number, len(TENANT[0]), head=True) for number in range(2)]
        assert streams(served, like_the_tenant) == alone
        assert streams(served, [replace(one, salt=SALT) for one in like_the_tenant]) != alone
        assert served.statistics["faults"] == 0
        served.assert_drained()
    record_property("neighbours", asked)
    record_property("changed_answers", 0)


Shape = list[list[int]]
"""Tokens that each request has in each step."""


def batch(served: Engine, others: list[Prompt], salt: str) -> tuple[list[Stream], Shape]:
    """The tenant's answers when all its requests and as many others are computed together, and how they are."""
    assert served.llm.reset_prefix_cache()
    names, shape, update = [], [], served.vllm_scheduler.update_from_output

    def noted(step: Any, *rest: Any) -> Any:
        shape.append(list(step.num_scheduled_tokens.values()))
        return update(step, *rest)

    for prompt, other in zip(TENANT, others, strict=True):
        served.submit(other, OUT, salt=salt)
        names.append(served.submit(prompt, OUT, salt=SALT, logprobs=0))
    with patch.object(served.vllm_scheduler, "update_from_output", noted):
        served.finish()
    return [(served.outputs[name], served.logprobs[name]) for name in names], shape


UNRELATED = near_prefix(3, shared=150, tail=8, seed=2)
LIKE_THE_TENANT = [text(HEAD, 500 + number) + prompt[HEAD:] for number, prompt in enumerate(TENANT)]


@pytest.mark.hazard(
    "Isolation",
    "what a neighbour in the same batch says changes a tenant's answer",
    "never with another salt: tokens and log-probabilities are equal to the last bit in batches of equal shape",
)
@pytest.mark.parametrize("way", WAYS)
def test_what_a_neighbour_in_the_batch_says_changes_nothing(
    way: str, lively: Path, bold: None, record_property: Any
) -> None:
    with engine(lively, pages=400) as stock:
        expected = batch(stock, UNRELATED, NEIGHBOURS_SALT)
        assert batch(stock, LIKE_THE_TENANT, NEIGHBOURS_SALT) == expected
    with engine(lively, pages=400, fusion={**WAYS[way], "max_relative_error": ANY_ERROR}) as served:
        unrelated, shape = batch(served, UNRELATED, NEIGHBOURS_SALT)
        before = shared(served)
        assert before > 0 and unrelated != expected[0]  # the tenant's own blocks are approximated
        assert batch(served, LIKE_THE_TENANT, NEIGHBOURS_SALT) == (unrelated, shape)
        assert batch(served, TENANT, NEIGHBOURS_SALT) == (unrelated, shape)
        record_property("merges", served.statistics["blocks_merged"])
        assert batch(served, LIKE_THE_TENANT, SALT)[0] != unrelated
        served.assert_drained()


@pytest.fixture
def lines() -> Iterator[list[str]]:
    """All that the plugin logs, at every level, with tracebacks."""
    kept: list[str] = []
    handler = logging.Handler(logging.DEBUG)
    handler.emit = lambda record: kept.append(logging.Formatter().format(record))  # type: ignore[method-assign]
    logger = logging.getLogger("vllm.jointkv")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    yield kept
    logger.setLevel(before)
    logger.removeHandler(handler)


def reveals(written: str) -> list[str]:
    """Salts in `written`, and runs of three tokens of a prompt."""
    runs = [str(prompt[place : place + 3])[1:-1] for prompt in TENANT for place in range(len(prompt) - 2)]
    return [secret for secret in (SALT, NEIGHBOURS_SALT, *runs) if secret in written]


@pytest.mark.hazard(
    "Isolation", "logs or statistics reveal the text or the salt of a tenant", "never, internal errors included"
)
def test_logs_and_statistics_reveal_no_text(calm: Path, lines: list[str]) -> None:
    """A damaged index named the bucket it missed, and with it the salt, in the error that ends fusion."""
    with engine(calm, fusion={**LOSSY, "check_integrity": False}) as served:
        reports: list[Any] = []
        take = served.side.statistics.take
        served.side.statistics.take = lambda *given: reports.append(take(*given)) or reports[-1]  # type: ignore[method-assign,func-returns-value]
        for salt in (SALT, NEIGHBOURS_SALT):
            for prompt in TENANT:
                served.submit(prompt, OUT, salt=salt)
        served.finish()
        assert served.statistics["blocks_merged"] > 0
        served.side.candidates.residents.index._pages.clear()  # as a bug might leave it
        for number in range(40):
            served.submit(text(300, number), 2, salt=SALT)
        served.finish()
        cause = served.side.recovery.cause
        assert cause is not None
        written = json.dumps([*(report.data for report in reports), served.statistics, cause])
    assert any("switched itself off" in line for line in lines) and len(reports) > 1
    assert reveals(str(TENANT[0]) + SALT)  # it would be noticed
    assert not reveals("\n".join(lines) + written)
