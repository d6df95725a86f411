"""What happens when a message between scheduler and workers is damaged, lost, late, or comes twice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm")

from jointkv.errors import IntegrityError, LayoutError
from jointkv.vllm_plugin.engine.runners.base import Remap
from jointkv.vllm_plugin.messages import COSINES, ERRORS, Inquiry, Verdict
from tests.vllm_plugin.engines import LOSSY, near_prefix
from tests.vllm_plugin.faulty import OUT, Patient

pytest_plugins = ("tests.vllm_plugin.faulty",)

ARRAYS = (*ERRORS, *COSINES)
Damage = Callable[[Verdict], Verdict | None]

ILL_FORMED = pytest.mark.hazard(
    "Faults",
    "an answer of a worker that is no answer: too short, too long, of another type",
    "nothing of it is used; fusion is off and back after the wait",
)
NONSENSE = pytest.mark.hazard(
    "Faults",
    "a worker that measures an error that is negative, infinite or not a number",
    "the page is not shared; after a negative one fusion is off until the engine is restarted",
)
LOST = pytest.mark.hazard(
    "Faults",
    "an answer of the workers, or of one of them, that is lost or overtaken by a later one",
    "no page is shared on its account; fusion is off and back after the wait",
)
HARMLESS = pytest.mark.hazard(
    "Faults",
    "an answer that is late, comes twice, or answers nothing that was asked",
    "what it allows is checked against the tables of that moment; nothing is done twice, nothing switches off",
)
INQUIRY = pytest.mark.hazard(
    "Faults",
    "a message of the scheduler that is lost, or comes twice",
    "lost: the engine ends with an error before anything is computed; twice: passed over",
)


def verdict(pairs: int = 3, **more: Any) -> Verdict:
    return replace(Verdict(1, *np.full((len(ARRAYS), pairs), 0.1, np.float32)), **more)


def with_error(name: str, value: float) -> Damage:
    def change(found: Verdict) -> Verdict:
        errors = getattr(found, name).copy()
        errors[-1] = value
        return replace(found, **{name: errors})

    return change


def damage(name: str, change: Callable[[Any], Any]) -> Damage:
    return lambda found: replace(found, **{name: change(getattr(found, name))})


SHAPES: dict[str, Callable[[Any], Any]] = {
    "too short": lambda array: array[:-1],
    "too long": lambda array: np.append(array, array[-1:]),
    "empty": lambda array: array[:0],
    "two-dimensional": lambda array: array[:, None],
    "a single number": lambda array: array[0],
    "another type": lambda array: array.astype(np.float64),
    "a list": lambda array: array.tolist(),
    "nothing": lambda array: None,
}


@ILL_FORMED
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ARRAYS)
def test_a_verdict_is_of_one_form(name: str, shape: str) -> None:
    verdict().check(3)
    damaged = damage(name, SHAPES[shape])(verdict())
    assert damaged is not None
    with pytest.raises(LayoutError, match=name):
        damaged.check(3)
    for joined in (verdict().aggregate(damaged), damaged.aggregate(verdict())):  # neither ends the engine
        assert joined.fault is not None and not joined.broken


@ILL_FORMED
@pytest.mark.parametrize("shape", SHAPES)
def test_signatures_are_of_one_form(shape: str) -> None:
    signed = verdict(signatures=np.ones((2, 8), np.float16))
    signed.check(3, 2, 8)
    verdict().check(3, 0, 8)
    damaged = damage("signatures", SHAPES[shape])(signed)
    assert damaged is not None
    with pytest.raises(LayoutError, match="signatures"):
        damaged.check(3, 2, 8)
    joined = signed.aggregate(damaged)
    assert joined.fault is not None and not joined.broken


@ILL_FORMED
@pytest.mark.parametrize("shape", SHAPES)
def test_cosines_of_blocks_that_came_together_are_of_one_form(shape: str) -> None:
    gathered = verdict(gathered=np.ones(8, np.float32))
    gathered.check(3, gathered=8)
    damaged = damage("gathered", SHAPES[shape])(gathered)
    assert damaged is not None
    with pytest.raises(LayoutError, match="gathered"):
        damaged.check(3, gathered=8)
    joined = gathered.aggregate(damaged)
    assert joined.fault is not None and not joined.broken


@NONSENSE
@pytest.mark.parametrize("value", [-0.1, -np.inf])
@pytest.mark.parametrize("name", ERRORS)
def test_no_error_is_negative(name: str, value: float) -> None:
    damaged = with_error(name, value)(verdict())
    assert damaged is not None
    with pytest.raises(IntegrityError, match=name):
        damaged.check(3)
    joined = verdict().aggregate(damaged)
    assert joined.fault is not None and joined.broken


@NONSENSE
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", ERRORS)
def test_what_one_rank_cannot_tell_no_rank_can(name: str, value: float) -> None:
    damaged = with_error(name, value)(verdict())
    assert damaged is not None
    for joined in (verdict().aggregate(damaged), damaged.aggregate(verdict())):
        assert joined.fault is None and np.array_equal(getattr(joined, name)[-1], value, equal_nan=True)


@LOST
def test_ranks_are_counted() -> None:
    assert verdict().aggregate(verdict()).aggregate(verdict()).ranks == 3


def tamper(patient: Patient, change: Damage) -> None:
    """Every answer of the worker goes through `change` from now on."""
    answer = patient.worker.answer

    def changed(inquiry: Inquiry) -> Verdict | None:
        found = answer(inquiry)
        return None if found is None else change(found)

    patient.patch.setattr(patient.worker, "answer", changed)


@ILL_FORMED
@pytest.mark.parametrize(
    ("name", "shape"), [("key_cosine", "too short"), ("key_error", "too long"), ("token_error", "another type")]
)
def test_an_ill_formed_verdict(patient: Patient, name: str, shape: str) -> None:
    tamper(patient, damage(name, SHAPES[shape]))
    patient.serve_on()
    assert patient.new("blocks_merged") == 0
    patient.assert_off(name)
    patient.assert_comes_back()


@NONSENSE
def test_a_negative_error(patient: Patient) -> None:
    tamper(patient, with_error("key_error", -1.0))
    patient.serve_on()
    assert patient.new("blocks_merged") == 0
    patient.assert_off("key_error below zero", state="disabled")
    patient.assert_stays_off()


@NONSENSE
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["key_error", "value_error"])
def test_an_error_that_cannot_be_told(patient: Patient, name: str, value: float) -> None:
    tamper(patient, lambda found: replace(found, **{name: np.full_like(found.key_error, value)}))
    patient.serve_on()
    assert patient.new("blocks_merged") == 0 and patient.engine.statistics["rejected"]["bound"] > 0
    patient.patch.undo()
    patient.assert_unharmed()


@pytest.mark.hazard(
    "Faults",
    "a worker that accepts a page beyond the bound",
    "the scheduler compares with the bound itself: the page is not shared",
)
def test_an_error_beyond_the_bound_is_never_taken(patient: Patient) -> None:
    beyond = np.float32(LOSSY["max_relative_error"] * 1.0001)
    tamper(patient, lambda found: replace(found, value_error=np.full_like(found.value_error, beyond)))
    patient.serve_on()
    rejected = patient.engine.statistics["rejected"]["bound"] - patient.before["rejected"].get("bound", 0)
    assert patient.new("blocks_merged") == 0 and rejected > 0
    patient.patch.undo()
    patient.assert_unharmed()


@pytest.mark.hazard(
    "Faults",
    "a page with numbers that are none (NaN)",
    "it is shared with nobody; requests that compute their own page are answered as by the stock engine",
)
def test_nan_in_a_resident_page(patient: Patient) -> None:
    prompts = near_prefix(2, shared=200, seed=2)  # the first two of AFTER
    name = patient.engine.submit(prompts[0], OUT)
    patient.engine.run_until_decoding()
    pages = patient.engine.table(name)
    patient.serve_on()
    layers = patient.engine.core.vllm_config.compilation_config.static_forward_context.values()
    resident = [page for page in pages if page in patient.engine.side.candidates.residents.index]
    assert len(resident) >= 6
    for layer in layers:
        layer.kv_cache[resident] = np.nan
    merged = patient.new("blocks_merged")
    rejected = patient.engine.statistics["rejected"].get("bound", 0)
    assert patient.engine.generate(prompts[1:], OUT) == patient.expected[1:2]
    assert patient.new("blocks_merged") == merged
    assert patient.engine.statistics["rejected"]["bound"] - rejected == 5  # all shared ones
    for layer in layers:
        layer.kv_cache[resident] = 0.0  # vLLM's own kernels multiply what they mask
    patient.assert_unharmed()


@LOST
@pytest.mark.parametrize("lost", [1, 10**6], ids=["once", "always"])
def test_a_lost_verdict(patient: Patient, lost: int) -> None:
    answers: list[Verdict] = []

    def lose(found: Verdict) -> Verdict | None:
        answers.append(found)
        return found if len(answers) > lost else None

    tamper(patient, lose)
    patient.serve_on()
    patient.assert_off("is lost")
    patient.assert_comes_back()


@LOST
def test_one_rank_does_not_answer(patient: Patient) -> None:
    """vLLM joins the answers that there are: pages were once shared without the consent of the other ranks."""
    patient.patch.setattr(patient.engine.side, "_ranks", 2)
    patient.serve_on()
    assert patient.new("blocks_merged") == 0
    patient.assert_off("1 of 2 workers answered")
    patient.assert_comes_back()


def deliver(patient: Patient, through: Callable[[Verdict], list[Verdict]]) -> None:
    """Every verdict becomes those of `through`, one after the other, on its way to the scheduler."""
    link = patient.engine.connector
    update = link.update_connector_output

    def delivered(output: Any) -> None:
        found = output.kv_connector_worker_meta
        for one in [found] if found is None else through(found):
            output.kv_connector_worker_meta = one
            update(output)

    patient.patch.setattr(link, "update_connector_output", delivered)


@LOST
def test_reordered_verdicts(patient: Patient) -> None:
    kept: list[Verdict] = []

    def swap(found: Verdict) -> list[Verdict]:
        kept.append(found)
        return [] if len(kept) == 1 else [found, kept[0]] if len(kept) == 2 else [found]

    deliver(patient, swap)
    patient.engine.submit(near_prefix(3, shared=200)[0], OUT)
    patient.engine.step()
    patient.serve_on()
    patient.assert_off("is lost")
    patient.assert_comes_back()


@HARMLESS
def test_a_verdict_that_comes_again(patient: Patient) -> None:
    deliver(patient, lambda found: [found] * 3)
    patient.serve_on()
    assert patient.new("blocks_merged") > 0
    patient.patch.undo()
    patient.assert_unharmed()


@HARMLESS
@pytest.mark.parametrize("step", [0, 10**9])
def test_a_verdict_on_what_was_never_asked(patient: Patient, step: int) -> None:
    deliver(patient, lambda found: [replace(found, step=step), found])
    patient.serve_on()
    assert patient.new("blocks_merged") > 0
    patient.patch.undo()
    patient.assert_unharmed()


@HARMLESS
def test_verdicts_that_are_late(patient: Patient) -> None:
    """By two steps, as with a scheduler that runs ahead; tables and pages may have changed meanwhile."""
    link, late = patient.engine.connector, []
    update = link.update_connector_output

    def delayed(output: Any) -> None:
        late.append(output.kv_connector_worker_meta)
        output.kv_connector_worker_meta = late.pop(0) if len(late) > 2 else None
        update(output)

    patient.patch.setattr(link, "update_connector_output", delayed)
    patient.serve_on()
    assert patient.new("blocks_merged") > 0
    patient.patch.undo()
    patient.assert_unharmed()


@INQUIRY
def test_a_worker_knows_what_it_was_told(patient: Patient) -> None:
    worker, name = patient.worker, patient.running[0]
    (request_id,) = [one for one in patient.engine.vllm_scheduler.requests if one.startswith(f"{name}-")]
    table = patient.engine.table(name)
    remaps = [Remap(request_id, 0, 0, page=table[1], own=table[0], step=1)]
    with pytest.raises(IntegrityError, match="is lost"):
        worker.apply(Inquiry(worker._last_step + 2, remaps))
    for step in (worker._last_step, 1):
        worker.apply(Inquiry(step, remaps))
    assert patient.engine.runner.requests[request_id].block_ids[0] == table
    patient.serve_on()
    patient.assert_unharmed()
