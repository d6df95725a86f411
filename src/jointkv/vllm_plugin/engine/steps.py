"""What a scheduler's output says of the step it describes."""

from __future__ import annotations

from collections.abc import Iterator

from vllm.v1.core.sched.output import SchedulerOutput


def resumed(output: SchedulerOutput) -> Iterator[tuple[str, int]]:
    """Requests that come back after a preemption, and how many of their tokens they found again."""
    cached = output.scheduled_cached_reqs
    if cached.resumed_req_ids:
        for request_id, computed in zip(cached.req_ids, cached.num_computed_tokens, strict=True):
            if request_id in cached.resumed_req_ids:
                yield request_id, computed


def pages_to_write(output: SchedulerOutput) -> Iterator[int]:
    """Pages that the step gives to requests that go on, all of which will be written, and those to be zeroed."""
    cached = output.scheduled_cached_reqs
    for request_id, groups in zip(cached.req_ids, cached.new_block_ids, strict=True):
        if request_id not in cached.resumed_req_ids:
            for pages in groups or ():
                yield from pages
    yield from output.new_block_ids_to_zero or ()


def started(output: SchedulerOutput) -> Iterator[tuple[str, int]]:
    """Requests that start or come back in the step, and how many of their tokens they found computed."""
    for new in output.scheduled_new_reqs:
        yield new.req_id, new.num_computed_tokens
    yield from resumed(output)
