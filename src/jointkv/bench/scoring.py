"""How far the distributions of every arm moved, from engines that are made to give the reference arm's answers.

Texts tell little: one near tie, and two answers part for good although nothing is wrong. Where every arm gives the
same answer, each of its tokens is compared behind the same words. The requests, the pool and what is fused are those of
the benchmark; all requests are there from the start, as many under way as its loads say.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from jointkv.bench.environment import engine_environment
from jointkv.bench.fidelity import Outputs, reference_arm
from jointkv.bench.plan import Plan
from jointkv.bench.program import run_program
from jointkv.bench.requests import ServingRequest
from jointkv.bench.result import Arm, Load, ServingResult
from jointkv.bench.scores import Scored, TrueAnswers
from jointkv.bench.scoring_process import ScoringOutcome, ScoringSpec
from jointkv.bench.warm import OUTPUT_TOKENS, served_before
from jointkv.errors import BadInput, JointKVError
from jointkv.evaluate.score.summary import RequestSums, summarize
from jointkv.evaluate.tasks.metrics import token_f1

COMMAND = (sys.executable, "-P", "-m", "jointkv.bench.scoring_process")
SHUTDOWN_SECONDS = 10.0


class ScoringFailed(JointKVError, RuntimeError):
    """An engine did not give the answers it was told. The message ends with the reason."""


Run = Callable[[Arm, ScoringSpec], ScoringOutcome]
"""Has an engine of an arm give answers."""


def require_reference(plan: Plan) -> Arm:
    """The arm that the others are scored against. Raises `BadInput` where it is one that fuses."""
    name = reference_arm([arm.name for arm in plan.arms])
    arm = next(arm for arm in plan.arms if arm.name == name)
    if arm.fusion is not None:
        raise BadInput("--score compares with an arm without jointkv, and there is none; add --arm stock")
    return arm


def with_scores(result: ServingResult, plan: Plan, run: Run, requests: int) -> ServingResult:
    """`result` with `scores` of all arms but the reference, for the first `requests` of the plan.

    Raises:
        BadInput: see `require_reference`.
        ScoringFailed: an engine failed.
    """
    plan = replace(plan, requests=plan.requests[:requests])
    return result.model_copy(update={"scores": score_arms(plan, run)})


def score_arms(plan: Plan, run: Run) -> list[Scored]:
    """All arms of `plan` but the reference, for its requests. Raises as `with_scores` does."""
    reference = require_reference(plan)
    others = [arm for arm in plan.arms if arm != reference]
    with tempfile.TemporaryDirectory() as folder:
        answers = Path(folder) / "answers.safetensors"
        run(reference, spec_of(plan, reference, answers, writes=True))
        scores = []
        for arm in others:
            outcome = run(arm, spec_of(plan, arm, answers, writes=False))
            found = summarize([RequestSums(*row) for row in outcome.sums])
            scores.append(Scored.of(arm.name, reference.name, found, outcome.pages_freed))
    return scores


def spec_of(plan: Plan, arm: Arm, answers: Path, *, writes: bool) -> ScoringSpec:
    """What an engine of `arm` is to do with the file `answers`."""
    closed = [load.concurrency for load in plan.loads if load.concurrency is not None]
    flags = [*plan.facts["common_flags"], "--num-gpu-blocks-override", str(arm.pool_blocks), *arm.flags]
    return ScoringSpec(
        options=arm.fusion,
        arguments=[plan.location, *flags],
        warmup=_as_sent(served_before(plan, arm), OUTPUT_TOKENS),
        requests=_as_sent(plan.requests),
        at_once=max(closed, default=len(plan.requests)),
        reference=str(answers),
        writes=writes,
    )


def runner(
    environment: Mapping[str, str],
    plan: Plan,
    cores: Collection[int],
    stages: Callable[[str], AbstractContextManager[Any]],
) -> Run:
    """How `with_scores` has real engines run, on `cores`.

    Args:
        stages: says what is going on while its context is open, and yields what says more.
    """
    # The processor that forces answers is one of vLLM's first model runner.
    made = engine_environment(environment, cores, plan.pool_bytes(), Path(plan.location).is_dir())
    made = {**made, "VLLM_USE_V2_MODEL_RUNNER": "0", "VLLM_LOGGING_COLOR": "0"}

    def run(arm: Arm, spec: ScoringSpec) -> ScoringOutcome:
        what = f"scoring {arm.name}"
        with stages(what) as show:

            def progress(done: int) -> None:
                if done * 10 // len(spec.requests) > (done - 1) * 10 // len(spec.requests):
                    show(f"{what}: {done} of {len(spec.requests)} requests")

            answer = run_program(COMMAND, spec, made, progress, nullcontext(), cores, SHUTDOWN_SECONDS)
        if "outcome" not in answer:
            raise ScoringFailed(f"arm {arm.name} could not be scored: {answer['error']}")
        return ScoringOutcome.model_validate(answer["outcome"])

    return run


def compare_with_truth(
    outputs: Outputs, requests: Sequence[ServingRequest], arms: Sequence[Arm], loads: Sequence[Load]
) -> list[TrueAnswers]:
    """The texts of every arm under every load beside the true answers, where requests have them."""
    found = []
    for arm in arms:
        for load in loads:
            runs = [texts for (name, label, _), texts in outputs.items() if (name, label) == (arm.name, load.label)]
            pairs = [(text, each.answer) for texts in runs for text, each in zip(texts, requests, strict=True)]
            scores = [token_f1(text, answer) for text, answer in pairs if answer]
            if scores:
                found.append(TrueAnswers(arm=arm.name, load=load.label, f1=fmean(scores), answers=len(scores)))
    return found


def _as_sent(
    requests: Sequence[ServingRequest], output_tokens: int | None = None
) -> list[tuple[list[int], int, str | None]]:
    return [(list(each.prompt), output_tokens or each.output_tokens, each.salt) for each in requests]
