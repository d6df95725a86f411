"""Where the prefix of a request stops being that of an earlier one, and how much behind it is equal again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from jointkv.core.moved import MovedRun
from jointkv.core.reuse import Integers
from jointkv.evaluate.advise.resident import Seen

Tokens = NDArray[np.integer]
RUNS = 6
"""Of a request that are followed back, the longest: the one of its own conversation is seldom among the first."""
PROBE = 16
"""Tokens by which a text is looked for elsewhere."""


@dataclass(frozen=True, eq=False)
class Break:
    """What keeps a request from being a longer exact prefix of one earlier request.

    Attributes:
        at: the first token that differs.
        resumes: where it is equal again.
        theirs: the earlier request.
        theirs_resume: the same place there.
        gain: tokens more that an exact prefix would have, in whole blocks, if what differs stood behind.
        reordered: whether what stands there in each of them stands later in the other.
    """

    at: int
    resumes: int
    theirs: Tokens
    theirs_resume: int
    gain: int
    reordered: bool


def find_break(
    tokens: Integers, seen: Seen, sources: Mapping[int, Tokens], block_size: int, least: int
) -> Break | None:
    """The break of `tokens [n]` that costs the most exact tokens; None where none costs as much as `least`."""
    best: Break | None = None
    behind = [run for run in seen.runs if run.end > seen.exact_tokens and run.source in sources]
    for run in sorted(behind, key=lambda run: -run.tokens)[:RUNS]:
        theirs = sources[run.source]
        at, resumes = common(tokens, theirs), _back(tokens, theirs, run)
        if at >= run.end or (resumes <= at and not run.shift):
            continue
        their_resume = resumes - run.shift
        reordered = _reordered(tokens, theirs, at)
        # In one order all that is resident would follow; else only what follows in this request.
        follows = sum(each.tokens for each in behind) if reordered else run.end - max(resumes, at)
        gain = (at + follows) // block_size * block_size - seen.exact_tokens
        if gain >= max(least, best.gain + 1 if best else 0):
            best = Break(at, resumes, theirs, their_resume, gain, reordered)
    return best


def common(one: Tokens, other: Tokens) -> int:
    """How many tokens both begin with."""
    length = min(len(one), len(other))
    differ = np.flatnonzero(one[:length] != other[:length])
    return int(differ[0]) if len(differ) else length


def _back(tokens: Tokens, theirs: Tokens, run: MovedRun) -> int:
    """Where the equal stretch begins that `run` is the end of."""
    length = min(run.first, run.first - run.shift)
    ours = tokens[run.first - length : run.first]
    there = theirs[run.first - run.shift - length : run.first - run.shift]
    differ = np.flatnonzero(ours != there)
    return run.first - (length - int(differ[-1]) - 1 if len(differ) else length)


def _reordered(tokens: Tokens, theirs: Tokens, at: int) -> bool:
    """Whether what comes next in each of them comes later in the other."""
    return _comes_later(theirs, tokens, at) and _comes_later(tokens, theirs, at)


def _comes_later(tokens: Tokens, other: Tokens, at: int) -> bool:
    probe, rest = other[at : at + PROBE], tokens[at:]
    if len(probe) < PROBE or len(rest) < PROBE:
        return False
    starts = np.flatnonzero((rest[: 1 - PROBE] == probe[0]) & (rest[1 : 2 - PROBE] == probe[1]))
    return any(np.array_equal(rest[start : start + PROBE], probe) for start in starts.tolist())
