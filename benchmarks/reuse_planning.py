"""Looking up a prompt of 100,000 tokens among 100,000 resident pages, as the scheduler does before a request starts.

The floor is one look into a hash table per block and one comparison of its tokens, in numpy. Hashing a prompt's tokens
is not in it: that is done once per request, whether it reuses or not, and measured beside.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
from numpy.typing import NDArray
from vllm.sampling_params import SamplingParams
from vllm.v1.request import Request

from jointkv.core.reuse import Integers, ReusePlan
from jointkv.fusion.token_index import places
from jointkv.policy.reuse import Computed, ReuseRule, decide
from jointkv.vllm_plugin.scheduler.requests import TrackedRequest, isolation_key
from jointkv.vllm_plugin.scheduler.residents import Residents
from timing import paired, timed, write

TOKENS, PAGES, BLOCK_SIZE, HEADER = 100_000, 100_000, 16, 64
RULE = ReuseRule()


def tracked(name: str, tokens: list[int], number: int) -> TrackedRequest:
    request = Request(name, tokens, SamplingParams(max_tokens=1), None)
    return TrackedRequest(request, isolation_key(request), BLOCK_SIZE, number)


def fill(residents: Residents, texts: list[list[int]]) -> None:
    """Texts in turn, behind headers of their own, until every page is taken."""
    page = 0
    for number in range(PAGES * BLOCK_SIZE // TOKENS + 1):
        owner = tracked(f"resident {number}", header(number) + texts[number % len(texts)], number)
        for slot, place in enumerate(at(owner)):
            if page < PAGES:
                residents.add(owner, slot, page, (((owner.isolation, 0), place),))
                page += 1


def at(request: TrackedRequest) -> list[int]:
    """Where blocks like those of `request` are in the index."""
    blocks = TOKENS // BLOCK_SIZE
    return places(request.hashes(blocks), np.arange(blocks))


def header(seed: int) -> list[int]:
    return np.random.default_rng(1000 + seed).integers(10, 50_000, HEADER).tolist()


class Near(Computed):
    """Steps of a request whose entry blocks are near."""

    def __init__(self, residents: Residents, request: TrackedRequest) -> None:
        self.known = partial(residents.known, request)

    def ratios(self, slots: Integers, pages: Integers) -> NDArray[np.floating]:
        return np.full(len(slots), 0.3)


def plan(residents: Residents, request: TrackedRequest) -> ReusePlan:
    """What becomes of a request whose pages have no witnesses yet."""
    end = (TOKENS - 1) // BLOCK_SIZE
    found = residents.find(request, 0, end, 0)
    if not found.stretches(RULE.least):
        return ReusePlan.nothing(end)
    return decide(found, 0, end, RULE, Near(residents, request))


def run(output: Path) -> None:
    draw = np.random.default_rng(0)
    texts = [draw.integers(10, 50_000, TOKENS - HEADER).tolist() for _ in range(4)]
    residents = Residents(PAGES, BLOCK_SIZE)
    fill(residents, texts)
    known = tracked("known", header(99) + texts[1], 1000)
    unknown = tracked("unknown", draw.integers(10, 50_000, TOKENS).tolist(), 1001)
    hashing = timed(lambda: tracked("new", known.request.prompt_token_ids or [], 0).hashes(TOKENS // BLOCK_SIZE))
    for request in (known, unknown):
        request.hashes(TOKENS // BLOCK_SIZE), request.standing(0, TOKENS // BLOCK_SIZE)
    skipped = plan(residents, known).skipped * BLOCK_SIZE
    assert skipped > 0.99 * TOKENS - 2 * HEADER and plan(residents, unknown).skipped == 0
    owner, looked_up = (known.isolation, 0), at(known)
    pages = np.array([residents.index.pages(owner, [place])[0] for place in looked_up[8:]])
    kept = residents._tokens

    def floor() -> None:
        residents.index.pages(owner, looked_up)
        (kept[pages] == known.tokens(8, len(looked_up))).all()

    works = [lambda: plan(residents, known), lambda: plan(residents, unknown), floor]
    seconds = paired(works, repeats=15, warmup=3, clock="processor")
    found, nothing, least = (median(times) for times in seconds)
    headline = {
        "tokens_skipped": skipped,
        "plan_ms": round(1e3 * found, 2),
        "nothing_resident_ms": round(1e3 * nothing, 2),
        "floor_ms": round(1e3 * least, 2),
        "hashing_once_ms": round(1e3 * median(hashing), 2),
    }
    write(output, "reuse_planning", {"headline": headline, "tokens": TOKENS, "resident_pages": PAGES})


if __name__ == "__main__":
    run(Path("out/bench"))
