"""Who may share pages with whom, for every way in which two requests meet."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from tests.vllm_plugin.census import Census
from tests.vllm_plugin.engines import LOSSY, Engine, Prompt, engine, near_prefix, text

OUT = 4
OPTED_OUT = {"extra": {"jointkv": False}}

REUSING = {**LOSSY, "reuse": "probed", "reuse_audit_rate": 1e-9}

SETUPS: dict[str, dict[str, Any]] = {
    "one table": {"fusion": LOSSY},
    "two groups": {"fusion": {**LOSSY, "layer_groups": 2}, "pages": 400},
    "no prefix cache": {"fusion": LOSSY, "enable_prefix_caching": False},
    "chunks": {
        "fusion": {"scope": "both", "chunk_tokens": 96, "max_relative_error": 1.5, "max_token_error": None},
        "max_num_batched_tokens": 128,
    },
    "strict": {"fusion": {**LOSSY, "isolation": "strict"}},
    "signatures": {"fusion": {**LOSSY, "candidates": "signature"}},
    "reuse": {"fusion": REUSING},
    "reuse, strict": {"fusion": {**REUSING, "isolation": "strict"}},
}
SALTED = ("one table", "two groups", "no prefix cache", "chunks", "reuse")
NEEDS_THE_PREFIX_CACHE = ("through_a_prefix_hit", "after_the_other_has_finished")
"""Without it vLLM hands the pages of a finished request out first."""


@dataclass
class Meeting:
    """Two requests with near-equal prompts in one engine, and what they share.

    Attributes:
        options: of either request, such as its salt.
        names: of those that were submitted.
        before: merges between them that do not count.
    """

    served: Engine
    census: Census
    options: tuple[dict[str, Any], dict[str, Any]]
    seed: int
    names: list[str] = field(default_factory=list)
    before: int = 0

    @property
    def same_words(self) -> dict[str, Any]:
        """Answers then have equal text, whatever the context, and no other meeting has it."""
        return {"allowed_token_ids": [10 + self.seed]}

    def prompt(self, number: int) -> Prompt:
        return near_prefix(2, shared=304, tail=0, seed=self.seed)[number]

    def ask(self, number: int, out: int = OUT, prompt: Prompt | None = None, **more: Any) -> str:
        options = {**self.options[number], **more}
        self.names.append(self.served.submit(prompt or self.prompt(number), out, **options))
        return self.names[-1]

    def ask_both_and_wait_for_answers(self, out: int, **more: Any) -> None:
        for number in range(2):
            self.ask(number, out, **more)
        self.served.run_until_decoding()
        self.served.step()

    def forget_what_was(self) -> None:
        self.before = self.census.between(*self.names)

    def shared(self) -> int:
        return self.census.between(*self.names) - self.before


def in_the_same_step(meeting: Meeting) -> None:
    meeting.ask(0)
    meeting.ask(1)


def while_the_other_runs(meeting: Meeting) -> None:
    meeting.ask(0, out=24)
    meeting.served.run_until_decoding()
    meeting.ask(1)


def after_the_other_has_finished(meeting: Meeting) -> None:
    meeting.ask(0)
    meeting.served.finish()
    meeting.ask(1)


def through_a_prefix_hit(meeting: Meeting) -> None:
    """All blocks of the second one come from its own prefix cache and are looked at only then."""
    meeting.ask(1, **OPTED_OUT)
    meeting.served.finish()
    meeting.ask(0)
    meeting.served.finish()
    cached = meeting.served.cached_tokens
    meeting.ask(1)
    meeting.served.finish()
    assert meeting.served.cached_tokens - cached >= 256


def in_their_answers(meeting: Meeting) -> None:
    """The prompts have nothing in common, the answers have equal text."""
    for number in range(2):
        meeting.ask(number, 40, text(320, 100 * meeting.seed + number), **meeting.same_words)


def after_a_preemption(meeting: Meeting) -> None:
    """The second one is preempted and resumed; what it computes afterwards has the text of the first one's answer."""
    meeting.ask_both_and_wait_for_answers(40, **meeting.same_words)
    preempt(meeting.served, meeting.names[1])
    meeting.forget_what_was()
    meeting.served.finish()


def after_a_reset(meeting: Meeting) -> None:
    """Both run when the prefix cache is reset, and compute everything again."""
    meeting.ask_both_and_wait_for_answers(24)
    assert meeting.served.llm.reset_prefix_cache(reset_running_requests=True)
    meeting.forget_what_was()


def across_chunks(meeting: Meeting) -> None:
    """Prompts that repeat themselves: every block has candidates in its own request too."""
    body = text(96, meeting.seed) * 3
    for number in range(2):
        meeting.ask(number, OUT, text(96, 100 * meeting.seed + number) + body)


WAYS: list[Callable[[Meeting], None]] = [
    in_the_same_step,
    while_the_other_runs,
    after_the_other_has_finished,
    through_a_prefix_hit,
    in_their_answers,
    after_a_preemption,
    after_a_reset,
    across_chunks,
]


def preempt(served: Engine, name: str) -> None:
    """As vLLM does when the pool is full."""
    scheduler = served.vllm_scheduler
    (request,) = (one for one in scheduler.running if one.request_id.startswith(f"{name}-"))
    scheduler.running.remove(request)
    scheduler._preempt_request(request, time.monotonic(), drop_stale_output=True)
    scheduler.prev_step_scheduled_req_ids.discard(request.request_id)


@dataclass
class Place:
    """An engine in which requests meet; every meeting gets texts of its own."""

    served: Engine
    census: Census
    setup: str
    meetings: int = 0

    def meet(self, way: Callable[[Meeting], None], first: dict[str, Any], second: dict[str, Any]) -> int:
        """Merges between two requests with these options that meet in this way."""
        self.meetings += 1
        meeting = Meeting(self.served, self.census, (first, second), self.meetings)
        way(meeting)
        self.served.finish()
        assert self.served.statistics["faults"] == 0
        return meeting.shared()


@pytest.fixture(scope="module")
def place(request: pytest.FixtureRequest, calm: Path) -> Iterator[Place]:
    with engine(calm, **SETUPS[request.param]) as served, pytest.MonkeyPatch.context() as patch:
        yield Place(served, Census(served, patch), request.param)
        served.assert_drained()


@pytest.mark.hazard(
    "Isolation",
    "a request reads K and V computed for a request with another cache_salt",
    "none, however the two meet; with equal salts they do share",
)
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("place", SALTED, indirect=True)
def test_salts_keep_requests_apart(place: Place, way: Callable[[Meeting], None], record_property: Any) -> None:
    if place.setup == "no prefix cache" and way.__name__ in NEEDS_THE_PREFIX_CACHE:
        pytest.skip("there is no prefix cache")
    together = place.meet(way, {"salt": "red"}, {"salt": "red"})
    assert together > 0
    apart = sum(
        place.meet(way, {"salt": first}, {"salt": second}) for first, second in (("red", "blue"), (None, "red"))
    )
    assert apart == 0
    record_property("merges_with_equal_salts", together)
    record_property("merges_across_salts", apart)


@pytest.mark.hazard(
    "Isolation",
    "a request reads K and V of other text, found by their signatures, of a request with another cache_salt",
    "never: signatures of different salts are never compared; with equal salts they are",
)
@pytest.mark.parametrize("place", ["signatures"], indirect=True)
def test_signatures_stay_within_a_salt(place: Place) -> None:
    for way in (in_the_same_step, while_the_other_runs, after_a_preemption):
        assert place.meet(way, {"salt": "red"}, {"salt": "red"}) > 0
        assert place.meet(way, {"salt": "red"}, {"salt": "blue"}) == place.meet(way, {}, {"salt": "red"}) == 0
        assert place.meet(way, {"salt": "red"}, {"salt": "red", **OPTED_OUT}) == 0


@pytest.mark.parametrize(
    ("first", "second", "merges"), [(None, None, True), ("red", None, False), ("red", "reda", False)]
)
@pytest.mark.parametrize("place", ["one table"], indirect=True)
def test_no_salt_is_a_key_of_its_own(place: Place, first: str | None, second: str | None, merges: bool) -> None:
    assert (place.meet(in_the_same_step, {"salt": first}, {"salt": second}) > 0) is merges


@pytest.mark.hazard(
    "Isolation", "text of a request with another salt is reused before compute", "never; with equal salts it is"
)
@pytest.mark.parametrize("place", ["reuse"], indirect=True)
def test_reuse_stays_within_a_salt(place: Place) -> None:
    helped = place.served.statistics["reuse_helpers"]
    for first, second in (("red", "blue"), (None, "red"), ("red", "reda")):
        place.meet(after_the_other_has_finished, {"salt": first}, {"salt": second})
    assert place.served.statistics["reuse_helpers"] == helped
    place.meet(after_the_other_has_finished, {"salt": "red"}, {"salt": "red"})
    assert place.served.statistics["reuse_helpers"] > helped


@pytest.mark.parametrize("place", ["one table", "reuse"], indirect=True)
@pytest.mark.hazard(
    "Isolation", "a request that opted out reads or serves a shared page", "none, whether it comes first or second"
)
def test_who_opts_out_neither_merges_nor_serves(place: Place) -> None:
    for way in (in_the_same_step, while_the_other_runs, after_the_other_has_finished):
        assert place.meet(way, OPTED_OUT, {}) == place.meet(way, {}, OPTED_OUT) == 0
        assert place.meet(way, {"extra": {"jointkv": True}}, {"extra": {"other": 1}}) > 0


@pytest.mark.hazard(
    "Isolation",
    "with isolation=strict a request without a salt shares pages",
    "none; the blocks left alone are counted; equal salts do share",
)
@pytest.mark.parametrize("place", ["strict", "reuse, strict"], indirect=True)
def test_strict_isolation_wants_a_salt(place: Place) -> None:
    assert place.meet(in_the_same_step, {}, {}) == 0
    statistics = place.served.statistics
    assert (statistics["state"], statistics["blocks_considered"]) == ("inert", 0)
    assert statistics["isolation_refusals"] == 2 * (320 // 32)
    for way in (in_the_same_step, after_the_other_has_finished, through_a_prefix_hit):
        assert place.meet(way, {}, {}) == place.meet(way, {"salt": "red"}, {}) == 0
        assert place.meet(way, {"salt": "red"}, {"salt": "blue"}) == 0
        assert place.meet(way, {"salt": "red"}, {"salt": "red"}) > 0
