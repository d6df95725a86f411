"""vLLM's line of waiting requests: who is next, and requests of the plugin's own ahead of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.request_queue import RequestQueue, SchedulingPolicy, create_request_queue
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request, RequestStatus

PLANNABLE = (
    RequestStatus.WAITING,
    RequestStatus.PREEMPTED,
    RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR,
)
JUST_AHEAD = 1e-6
"""Seconds by which a helper has arrived before the request that it helps."""


def seats(scheduler: Scheduler) -> int:
    """Requests that may start in the next step."""
    return max(scheduler.max_num_running_reqs - len(scheduler.running), 0)


def whole_prompts(scheduler: Scheduler) -> bool:
    """Whether a request starts only where there is room for all of its prompt."""
    return bool(scheduler.scheduler_reserve_full_isl)


def in_line(scheduler: Scheduler) -> Iterator[Request]:
    """Waiting requests of which nothing is computed, in the order of scheduling."""
    for request in scheduler.waiting:
        if request.num_computed_tokens == 0 and request.status in PLANNABLE:
            yield request


def helper_of(request: Request, name: str, tokens: int, hash_block_size: int, opt_out: str) -> Request:
    """A request that computes what is missing of the first `tokens` of `request`, and finds there what that would.

    Args:
        tokens: those beyond a multiple of `hash_block_size` are computed in any case.
        opt_out: key of the extra argument that keeps fusion away.
    """
    helper = Request(
        name,
        list(request.all_token_ids[:tokens]),
        SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True, detokenize=False, extra_args={opt_out: False}),
        None,
        client_index=request.client_index,
        arrival_time=request.arrival_time - JUST_AHEAD,
        lora_request=request.lora_request,
        cache_salt=request.cache_salt,
        priority=request.priority,
    )
    helper.block_hashes = request.block_hashes[: tokens // hash_block_size]
    return helper


def send_ahead(scheduler: Scheduler, helpers: Mapping[str, Sequence[Request]]) -> None:
    """Put helpers in line, directly before the request that each belongs to by name."""
    if scheduler.policy != SchedulingPolicy.FCFS:
        for group in helpers.values():
            for number, helper in enumerate(group):
                helper.arrival_time -= JUST_AHEAD * (len(group) - number)
                scheduler.add_request(helper)
        return
    owners = {name for name, group in helpers.items() if group}
    with _front(scheduler) as rest:
        while owners:
            name = rest.peek_request().request_id
            for helper in helpers.get(name, ()):
                scheduler.add_request(helper)
            scheduler.waiting.add_request(rest.pop_request())
            owners.discard(name)


@contextmanager
def line_before(scheduler: Scheduler, request: Request | None) -> Iterator[None]:
    """Inside, the line ends before `request`, so that a step does not even look at it and at those behind it."""
    if request is None:
        yield
        return
    with _front(scheduler) as rest:
        while rest.peek_request() is not request:
            scheduler.waiting.add_request(rest.pop_request())
        yield


@contextmanager
def _front(scheduler: Scheduler) -> Iterator[RequestQueue]:
    """Inside, the line is empty; who is in it in the end stands ahead of the rest, which is yielded.

    So that what is done at its front costs the same however long it is.
    """
    rest, scheduler.waiting = scheduler.waiting, create_request_queue(scheduler.policy)
    try:
        yield rest
    finally:
        front, scheduler.waiting = list(scheduler.waiting), rest
        rest.prepend_requests(reversed(front))
