"""An engine of one arm that gives answers it is told, as a program that `jointkv.bench.scoring` starts.

Run as `python -m jointkv.bench.scoring_process`, with a `ScoringSpec`; see `jointkv.bench.program`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jointkv.bench.program import Notify, be_program
from jointkv.bench.record import Record
from jointkv.vllm_plugin.server import Launch

FORCED = "jointkv.bench.forced_answers:ForcedAnswers"


class ScoringSpec(Record):
    """What the process is told.

    Attributes:
        options: of `PluginSettings`; None is stock vLLM.
        arguments: of `vllm serve`, the model first.
        warmup, requests: `(prompt, output tokens, salt)`, those of the warm-up served first and not scored.
        at_once: requests under way at a time, at most.
        reference: file of the answers to give.
        writes: whether they are this engine's own, and the file is written.
    """

    options: dict[str, Any] | None
    arguments: list[str]
    warmup: list[tuple[list[int], int, str | None]]
    requests: list[tuple[list[int], int, str | None]]
    at_once: int
    reference: str
    writes: bool


class ScoringOutcome(Record):
    """What came out.

    Attributes:
        sums: of every request, as the fields of `RequestSums`; none where the reference was written.
        pages_freed: by merging; None without the plugin.
    """

    sums: list[tuple[int, float, int, float, float]]
    pages_freed: int | None


def score(spec: ScoringSpec, notify: Notify, wait: Callable[[], None]) -> ScoringOutcome:
    """Build the engine, wait, have it serve everything, sum up."""
    from jointkv.bench.forced_answers import ForcedAnswers, read_answers, write_answers

    engine = _engine(spec)
    core = engine.engine_core.engine_core
    processors = core.model_executor.driver_worker.worker.model_runner.input_batch.logitsprocs.all
    forced = next(each for each in processors if isinstance(each, ForcedAnswers))
    if not spec.writes:
        forced.reference = read_answers(Path(spec.reference))
    notify({"ready": True})
    wait()
    _serve(engine, spec.warmup, spec.at_once, False, lambda done: None)
    _serve(engine, spec.requests, spec.at_once, True, lambda done: notify({"finished": done}))
    if spec.writes:
        write_answers(Path(spec.reference), forced.answers())
        return ScoringOutcome(sums=[], pages_freed=None)
    sums = [(each.positions, each.kl, each.top1_equal, each.nll, each.nll_reference) for each in forced.sums()]
    return ScoringOutcome(sums=sums, pages_freed=_pages_freed(core.scheduler))


def _engine(spec: ScoringSpec) -> Any:
    """The engine that `vllm serve` would build, with what forces answers beside the plugin's own processors."""
    from vllm import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser
    from vllm.v1.engine.llm_engine import LLMEngine

    model, *flags = spec.arguments
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    flags = [*flags, "--no-async-scheduling", "--logits-processors", FORCED]
    arguments = parser.parse_args(["--model", model, *Launch(spec.options).command(flags)])
    return LLMEngine.from_engine_args(EngineArgs.from_cli_args(arguments))


def _serve(
    engine: Any,
    requests: list[tuple[list[int], int, str | None]],
    at_once: int,
    scored: bool,
    finished: Callable[[int], None],
) -> None:
    """Serve `requests` in their order, the next one when one ends."""
    from vllm import SamplingParams

    from jointkv.bench.forced_answers import ARGUMENT

    waiting, under_way, done = list(enumerate(requests)), 0, 0
    while waiting or under_way:
        while waiting and under_way < at_once:
            number, (prompt, output_tokens, salt) = waiting.pop(0)
            sampling = SamplingParams(
                temperature=0,
                max_tokens=output_tokens,
                ignore_eos=True,
                detokenize=False,
                extra_args={ARGUMENT: number} if scored else None,
            )
            given = {"prompt_token_ids": prompt, **({"cache_salt": salt} if salt else {})}
            engine.add_request(f"{'scored' if scored else 'warm'}-{number}", given, sampling)
            under_way += 1
        ended = sum(output.finished for output in engine.step())
        under_way, done = under_way - ended, done + ended
        if ended:
            finished(done)


def _pages_freed(scheduler: Any) -> int | None:
    """Raises RuntimeError where the plugin has switched itself off: then nothing was measured."""
    from jointkv.vllm_plugin.engine.others import ours

    connector = ours(scheduler.connector)
    if connector is None:
        return None
    totals = connector.scheduler.totals()
    if totals["faults"]:
        raise RuntimeError("jointkv switched itself off while the arm was scored")
    return int(totals["blocks_merged"])


def main() -> None:
    """Read a `ScoringSpec`, serve, answer on stdout, and end without waiting for the engine's threads."""
    be_program(lambda line, notify, wait: score(ScoringSpec.model_validate_json(line), notify, wait))
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
