"""vLLM's own load generator, `vllm.benchmarks`, as a program that `jointkv.bench.load_generator` starts.

Run as `python -m jointkv.bench.load_process`, with a `Spec`; see `jointkv.bench.program`.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

from pydantic import Field

from jointkv.bench.in_turn import InTurn
from jointkv.bench.one_first import OneFirst
from jointkv.bench.program import be_program
from jointkv.bench.record import Record
from jointkv.bench.result import RequestSample

BACKEND = "jointkv"
GREEDY = {"temperature": 0.0, "skip_special_tokens": False, "spaces_between_special_tokens": False}
"""An answer is compared as text: one whose first token is special would else begin with its second."""


class Spec(Record):
    """What the process is told.

    Attributes:
        requests: `(prompt, output tokens, seconds after the start)`.
        turns: of each request `(session, seconds to think before it, salt)`; empty where none is part of a session.
    """

    url: str
    model: str
    tokenizer: str
    requests: list[tuple[list[int], int, float | None]]
    rate: float | None
    burstiness: float
    concurrency: int | None
    seed: int
    one_first: bool
    turns: list[tuple[int | str | None, float, str | None]] = Field(default_factory=list)


class Answer(RequestSample):
    """How one request went.

    Attributes:
        itls: gaps between the parts of the answer as they arrived, mostly one token each.
        error: why there is no complete answer; None where there is.
    """

    itls: list[float]
    text: str
    error: str | None


class LoadOutcome(Record):
    """What came out of one load. Rates are vLLM's own.

    Attributes:
        began: when the first request was sent, on the clock of `time.perf_counter`, which processes share.
        answers: in the order of the requests.
        cpu_seconds: of the load generator while it ran.
    """

    began: float
    seconds: float
    output_tokens_per_s: float
    total_tokens_per_s: float
    requests_per_s: float
    answers: list[Answer]
    cpu_seconds: float

    @property
    def complete(self) -> list[Answer]:
        """Those without an error."""
        return [answer for answer in self.answers if answer.error is None]


def generate(spec: Spec, notify: Callable[[dict[str, Any]], None], wait: Callable[[], object]) -> LoadOutcome:
    """Import vLLM, wait, send everything."""
    import numpy as np
    from vllm.benchmarks import serve
    from vllm.benchmarks.datasets import SampleRequest
    from vllm.benchmarks.lib.endpoint_request_func import ASYNC_REQUEST_FUNCS, async_request_openai_completions
    from vllm.tokenizers import get_tokenizer

    finished, send = 0, async_request_openai_completions
    in_turn = any(session is not None or salt is not None for session, _, salt in spec.turns)
    if in_turn:
        send = InTurn(send, spec.turns, spec.concurrency).send
    if spec.one_first:
        send = OneFirst(send).send

    async def counted(request_func_input: Any, session: Any, pbar: Any = None) -> Any:
        nonlocal finished
        output = await send(request_func_input, session, pbar)
        finished += 1
        notify({"finished": finished})
        return output

    # A backend of our own beside vLLM's, which is theirs and counts: the only progress theirs knows is a bar.
    ASYNC_REQUEST_FUNCS[BACKEND] = counted
    samples = [
        SampleRequest(
            prompt=prompt,
            prompt_len=len(prompt),
            expected_output_len=output_tokens,
            timestamp=at,
            request_id=str(number),
        )
        for number, (prompt, output_tokens, at) in enumerate(spec.requests)
    ]
    tokenizer = get_tokenizer(spec.tokenizer)
    random.seed(spec.seed)
    np.random.seed(spec.seed)
    notify({"ready": True})
    wait()
    cpu = time.process_time()
    found = asyncio.run(
        serve.benchmark(
            task_type=serve.TaskType.GENERATION,
            endpoint_type=BACKEND,
            api_url=f"{spec.url}/v1/completions",
            base_url=spec.url,
            model_id=spec.model,
            model_name=spec.model,
            tokenizer=tokenizer,
            input_requests=samples,
            logprobs=None,
            request_rate=spec.rate or float("inf"),
            burstiness=spec.burstiness,
            disable_tqdm=True,
            num_warmups=0,
            profile=False,
            selected_percentile_metrics=[],
            selected_percentiles=[],
            ignore_eos=True,
            goodput_config_dict={},
            # A turn that waits for the one before it must not take the place of another request.
            max_concurrency=None if in_turn else spec.concurrency,
            lora_modules=None,
            extra_headers=None,
            extra_body=GREEDY,
            ready_check_timeout_sec=0,
            self_timed=samples[0].timestamp is not None,
        )
    )
    return outcome_of(found, [sample[1] for sample in spec.requests], time.process_time() - cpu)


def outcome_of(found: dict[str, Any], expected: Sequence[int], cpu_seconds: float) -> LoadOutcome:
    """From vLLM's result. A request that ended before its last token counts as failed here; vLLM lets it pass.

    Args:
        expected: output tokens of each request.
    """
    began, answers = min(found["start_times"]), []
    for number, (error, tokens) in enumerate(zip(found["errors"], found["output_lens"], strict=True)):
        if not error and tokens != expected[number]:
            error = f"{tokens} of {expected[number]} tokens came"
        itls = found["itls"][number]
        answer = Answer(
            start=found["start_times"][number] - began,
            prompt_tokens=found["input_lens"][number],
            output_tokens=tokens,
            ttft=found["ttfts"][number],
            itl=fmean(itls) if itls else None,
            e2el=found["latencies"][number],
            itls=itls,
            text=found["generated_texts"][number],
            error=error.strip().splitlines()[-1] if error else None,
        )
        answers.append(answer)
    return LoadOutcome(
        began=began,
        seconds=found["duration"],
        output_tokens_per_s=found["output_throughput"],
        total_tokens_per_s=found["total_token_throughput"],
        requests_per_s=found["request_throughput"],
        answers=answers,
        cpu_seconds=cpu_seconds,
    )


def main() -> None:
    """Read a `Spec`, send, answer on stdout."""
    be_program(lambda line, notify, wait: generate(Spec.model_validate_json(line), notify, wait))


if __name__ == "__main__":
    main()
