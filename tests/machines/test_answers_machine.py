"""Whatever is done with caches of a pool, a model with them answers as it does with transformers alone.

Only the public interface is used, and nothing is known of pages, tables or evidence; see `tests.machines.answers`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from torch import Tensor

from jointkv.core.pool import BlockPool
from jointkv.core.table import BlockTable
from jointkv.hf import moved
from jointkv.hf.batch import Batch
from jointkv.hf.cache import JointCache
from jointkv.hf.pool import JointPool
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


def broken_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last token of the last page that is read instead of being computed is another one."""
    adopt = Batch.adopt

    def adopting(batch: Batch, pages: Tensor, tokens: Tensor, exact: bool) -> None:
        adopt(batch, pages, tokens, exact)
        for layer in batch.pool.blocks.kv.values:
            layer[pages[-1], -1] = layer[pages[-1], 0]

    monkeypatch.setattr(Batch, "adopt", adopting)


def wrong_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys that move are turned by one token more."""
    turn = moved.moved_blocks
    monkeypatch.setattr(
        moved, "moved_blocks", lambda kv, fills, rotary: turn(kv, replace(fills, shift=fills.shift + 1), rotary)
    )


def foreign_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages of a run are read one place further on."""
    adopt = Batch.adopt
    monkeypatch.setattr(Batch, "adopt", lambda batch, pages, tokens, exact: adopt(batch, pages.roll(1), tokens, exact))


def shared_write(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block that others read is written to as it stands."""
    monkeypatch.setattr(BlockTable, "make_writable", lambda table, rows, slots: table.pages[rows, slots])


MUTATIONS = {broken_token: 1, wrong_turn: 0, foreign_page: 0, shared_write: 0}
"""And a seed that sees it soon."""

ENOUGH_RUNS = 60


@pytest.mark.parametrize("mutation", MUTATIONS, ids=[mutation.__name__ for mutation in MUTATIONS])
def test_it_sees(mutation: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """By answers, K and V alone: what checks itself is kept from it."""
    for checked in (JointPool, BlockPool, JointCache):
        monkeypatch.setattr(checked, "check_integrity", lambda _self: None)
    mutation(monkeypatch)
    with pytest.raises(AssertionError, match=r"from the true ones|beyond the bounds"):
        for seed in range(MUTATIONS[mutation], ENOUGH_RUNS):
            run(seed, "three layers", tmp_path, Counter())
