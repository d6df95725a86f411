"""Whatever is done with caches of a pool, a model with them answers as it does with transformers alone.

Only the public interface is used, and nothing is known of pages, tables or evidence; see `tests.machines.answers`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.effort import FIRST_SEED, MACHINE_STEPS
from tests.machines.answers import KINDS
from tests.machines.talking import Talking

STEPS_PER_RUN = 40


def run(seed: int, kind: str, folder: Path, tally: Counter[str], steps: int = STEPS_PER_RUN) -> dict[str, float]:
    """`steps` random operations; how far answers and states were from the true ones at the most."""
    talking = Talking(seed, kind, folder, tally)
    try:
        for _ in range(steps):
            talking.step()
        talking.end()
    except BaseException as error:
        error.add_note("\n".join((f"seed {seed}, {kind}, {talking.described}:", *talking.done)))
        raise
    return {f"{name}, {talking.model.dtype}": near.largest for name, near in talking.near.items()}


@pytest.mark.timeout(0)
@pytest.mark.hazard(
    "State",
    "any sequence of operations, errors and interrupts included (transformers)",
    "answers, K and V are those of the plain model up to rounding",
)
def test_any_sequence_of_operations(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    tally: Counter[str] = Counter()
    largest: Counter[str] = Counter()
    seed = FIRST_SEED
    while tally["steps"] < MACHINE_STEPS // 4:
        for name, far in run(seed, list(KINDS)[seed % len(KINDS)], tmp_path, tally).items():
            largest[name] = max(largest[name], far)
        seed += 1
    for name, count in (*tally.items(), *largest.items()):
        record_property(name, count)
    missing = [name for name in HAPPENS if not tally[name]]
    assert not missing, f"{missing} never happened: {tally}"


HAPPENS = (
    *("exact", "skipped", "moved", "audited", "full", "broke off", "interrupted", "dropped meanwhile", "loaded"),
    *("copied", "selected", "cropped", "reset", "left to the collector", "other weights", "generated"),
)
