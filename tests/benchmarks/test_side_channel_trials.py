"""The side-channel measurement in a real engine: it sees what leaks without salts, and with salts nothing differs."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("vllm")

import side_channel as script
import side_channel_trials as trials
from tests.vllm_plugin.engines import VOCABULARY, Engine, engine

ROUNDS = 2
WIDE = {"max_relative_error": 0.5, "max_token_error": 0.75}
Seen = dict[tuple[str, str, bool], dict[str, dict[bool, list[float]]]]
TOLD = ("cached_tokens", "turn_cached_tokens", "metrics_merged")
"""What the server itself says: repeats exactly, on any machine."""


@pytest.fixture(scope="module")
def served(calm: Path) -> Iterator[Engine]:
    with engine(calm, pages=trials.Sizes().pages, fusion=WIDE, max_model_len=256) as running:
        yield running
        assert running.statistics["faults"] == 0
        running.assert_drained()


@pytest.fixture(scope="module")
def seen(served: Engine) -> Seen:
    draw = random.Random(0)
    corpus = [draw.randrange(10, VOCABULARY) for _ in range(4000)]
    lines = ([draw.randrange(10, VOCABULARY) for _ in range(trials.FIRST_LINE)] for _ in itertools.count())
    attack = trials.Attack(served.llm.llm_engine, trials.Sizes(), trials.Texts(corpus, lines, seed=0))
    found: Seen = script.measure(attack, trials.schedule(ROUNDS, [False, True], seed=0))
    return found


@pytest.mark.hazard(
    "Side channels",
    "an attacker learns from what the server tells (cached tokens, counters) that another tenant sent a text",
    "with different salts nothing of it depends on the other tenant's text",
)
def test_with_different_salts_the_server_tells_nothing(seen: Seen, record_property: Callable[[str, object], None]):
    for (scenario, guess, salted), observables in seen.items():
        if salted:
            for name in TOLD:
                values = observables[name]
                assert set(values[False]) == set(values[True]), (scenario, guess, name)
            assert set(observables["metrics_merged"][True]) == {0}
            record_property("trials", 2 * ROUNDS)


@pytest.mark.hazard(
    "Side channels",
    "the measurement is blind, and a leak is reported as none",
    "without salts it sees what a hit of the prefix cache and a merge are known to show",
)
def test_without_salts_it_sees_what_leaks(seen: Seen) -> None:
    for scenario in trials.SCENARIOS:
        exact, near = (seen[scenario, guess, False] for guess in trials.GUESSES)
        assert min(exact["cached_tokens"][True]) == 3 * trials.BLOCK > max(exact["cached_tokens"][False])
        assert set(near["cached_tokens"][True]) == set(near["cached_tokens"][False]) == {0}
        assert min(near["metrics_merged"][True]) >= 2 and set(near["metrics_merged"][False]) == {0}
        # What follows from approximated blocks is found by its own request only, and a second turn is another one.
        assert max(near["turn_cached_tokens"][True]) < min(near["turn_cached_tokens"][False])


def test_every_case_and_class_has_its_trials(seen: Seen) -> None:
    assert len(seen) == 8
    for (scenario, _, _), observables in seen.items():
        assert observables.keys() == script.OBSERVABLES.keys() - (
            {"gauge_ttft", "cpu_gauge_ttft"} if scenario == "idle" else set()
        )
        for values in observables.values():
            assert [len(values[each]) for each in (False, True)] == [ROUNDS, ROUNDS]
        assert all(0 < seconds < 60 for each in (False, True) for seconds in observables["ttft"][each])
    rows = script.summarize("fused", seen)
    assert sum("gauge" in row["observable"] for row in rows) == 8


def test_few_pages_are_free_while_neighbours_run() -> None:
    sizes, block = trials.Sizes(), trials.BLOCK
    # When the gauge is sent the probe has 2 tokens, its neighbours 4.
    held = 2 * -(-(sizes.prompt + 4) // block) + -(-(sizes.prompt + 2) // block)
    free, mergeable = sizes.pages - 1 - held, sizes.text_blocks - 1
    assert block > trials.FIRST_LINE and sizes.prompt + trials.ANSWER > (sizes.text_blocks + 1) * block
    assert free < -(-sizes.gauge // block) <= free + mergeable


def test_classes_take_turns_at_random() -> None:
    cases = trials.schedule(40, [False, True], seed=0)
    for place in range(0, len(cases), 16):
        assert len(set(cases[place : place + 16])) == 16
    first = [case.resident for case in cases if (case.scenario, case.guess, case.salted) == ("idle", "near", False)]
    assert sum(first) == 40 and 40 < sum(a != b for a, b in itertools.pairwise(first)) < 79
