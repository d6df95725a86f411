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


def pages_to_write(output: SchedulerOutput, block_size: int) -> Iterator[int]:
    """Pages that the step hands out and that will be written: not those that a request found in the prefix cache."""
    for new in output.scheduled_new_reqs:
        for pages in new.block_ids:
            yield from pages[new.num_computed_tokens // block_size :]
    found, cached = dict(resumed(output)), output.scheduled_cached_reqs
    for request_id, groups in zip(cached.req_ids, cached.new_block_ids, strict=True):
        for pages in groups or ():
            yield from pages[found.get(request_id, 0) // block_size :]
    yield from output.new_block_ids_to_zero or ()


def started(output: SchedulerOutput) -> Iterator[tuple[str, int]]:
    """Requests that start or come back in the step, and how many of their tokens they found computed."""
    for new in output.scheduled_new_reqs:
        yield new.req_id, new.num_computed_tokens
    yield from resumed(output)
