"""How long state machines and fuzzers run: briefly with the other tests, long with `make nightly` and `make fuzz`."""

import os

from hypothesis import HealthCheck, settings

MACHINE_STEPS = int(os.environ.get("JOINTKV_TEST_STEPS", "3000"))
"""Steps of every state machine: 100,000 with `make nightly`."""

FUZZ_EXAMPLES = int(os.environ.get("JOINTKV_FUZZ_EXAMPLES", "200"))
"""Inputs for every parser: 20,000 with `make fuzz`."""


def machine_settings(steps_per_run: int = 100) -> settings:
    """For a `RuleBasedStateMachine`: `MACHINE_STEPS` steps in runs of `steps_per_run`."""
    return settings(
        deadline=None,
        stateful_step_count=steps_per_run,
        max_examples=max(1, MACHINE_STEPS // steps_per_run),
        suppress_health_check=list(HealthCheck),
    )


def fuzz_settings() -> settings:
    """For a property of a parser."""
    return settings(deadline=None, max_examples=FUZZ_EXAMPLES, suppress_health_check=list(HealthCheck))
