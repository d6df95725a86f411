"""How much of what takes long runs: some with `make test`, all with `make nightly`, `make fuzz` or `make test-slow`."""

import itertools
import os
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

MACHINE_STEPS = int(os.environ.get("JOINTKV_TEST_STEPS", "2000"))
"""Steps of every state machine: 100,000 with `make nightly`."""

COMBINATION_STEPS = max(2000, MACHINE_STEPS // 5)
"""Steps of vLLM's scheduler with each model runner, each order of scheduling, fusion and reuse: 20,000 nightly."""

FIRST_SEED = int(os.environ.get("JOINTKV_TEST_SEED", "0"))
"""Of tests that try one seed after the other."""

FUZZ_EXAMPLES = int(os.environ.get("JOINTKV_FUZZ_EXAMPLES", "120"))
"""Inputs for every parser: 20,000 with `make fuzz`."""


def machine_settings(steps_per_run: int = 100) -> settings:
    """For a `RuleBasedStateMachine`: `MACHINE_STEPS` steps in runs of `steps_per_run`."""
    return settings(
        stateful_step_count=steps_per_run,
        max_examples=max(1, MACHINE_STEPS // steps_per_run),
        suppress_health_check=list(HealthCheck),
    )


def fuzz_settings() -> settings:
    """For a property of a parser."""
    return settings(max_examples=FUZZ_EXAMPLES, suppress_health_check=list(HealthCheck))


def every_pair(**axes: Mapping[str, Any]) -> pytest.MarkDecorator:
    """Parametrise by all combinations of the axes' values, which have names.

    Each two values of different axes meet in some combination that is quick; the others run with `make test-slow`.
    """
    missing = {
        pair
        for one, other in itertools.combinations(axes, 2)
        for pair in itertools.product(_of(axes, one), _of(axes, other))
    }
    left = list(itertools.product(*(_of(axes, axis) for axis in axes)))
    quick = set()
    while missing:
        best = max(left, key=lambda each: len(missing.intersection(itertools.combinations(each, 2))))
        missing -= set(itertools.combinations(best, 2))
        left.remove(best)
        quick.add(best)
    return pytest.mark.parametrize(
        tuple(axes),
        [
            pytest.param(
                *(axes[axis][name] for axis, name in each),
                id="-".join(name for _, name in each),
                marks=() if each in quick else pytest.mark.slow,
            )
            for each in itertools.product(*(_of(axes, axis) for axis in axes))
        ],
    )


def _of(axes: Mapping[str, Mapping[str, Any]], axis: str) -> list[tuple[str, str]]:
    return [(axis, name) for name in axes[axis]]
