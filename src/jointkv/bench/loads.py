"""How requests arrive, from what was written on the command line."""

from __future__ import annotations

import math

from jointkv.bench.result import Load
from jointkv.errors import BadInput


def make_loads(
    concurrency: str | None,
    rate: str | None,
    burstiness: str | None,
    speed: str | None,
    *,
    one_first: bool,
    replay: bool,
    requests: int,
    max_running: int,
) -> list[Load]:
    """The loads in the order closed, one first, open, replay.

    Without any, a closed loop with all requests that may run at once.

    Args:
        concurrency, rate, burstiness, speed: numbers with commas between them; every rate comes with every burstiness.
        one_first: whether one request goes first and all others follow at once.
        replay: whether the requests come with the times of a log.
        requests: how many there are.
        max_running: requests that the engine may run at once.

    Raises:
        BadInput: no numbers, numbers out of range, or options that need others.
    """
    if burstiness is not None and rate is None:
        raise BadInput("--burstiness needs --rate")
    if speed is not None and not replay:
        raise BadInput("--speed needs --replay")
    loads = [Load(kind="closed", concurrency=number) for number in _counts(concurrency, requests)]
    if one_first:
        loads.append(Load(kind="one_first"))
    for each in _numbers("--rate", rate):
        loads += [_open(each, shape) for shape in _numbers("--burstiness", burstiness or "1")]
    if replay:
        loads += [Load(kind="replay", speed=factor) for factor in _numbers("--speed", speed or "1")]
    if not loads:
        loads = [Load(kind="closed", concurrency=min(requests, max_running))]
    labels = [load.label for load in loads]
    for label in labels:
        if labels.count(label) > 1:
            raise BadInput(f"the load {label!r} is there twice")
    return loads


def _open(rate: float, burstiness: float) -> Load:
    if burstiness > 1:
        raise BadInput(f"--burstiness: 1 is Poisson, below it arrivals come in bursts; got {burstiness:g}")
    return Load(kind="poisson", rate=rate) if burstiness == 1 else Load(kind="bursty", rate=rate, burstiness=burstiness)


def _counts(text: str | None, requests: int) -> list[int]:
    numbers = _numbers("--concurrency", text)
    for number in numbers:
        if number != int(number):
            raise BadInput(f"--concurrency: whole numbers expected, got {number:g}")
        if number > requests:
            raise BadInput(f"--concurrency {number:g} needs as many requests; there are {requests}")
    return [int(number) for number in numbers]


def _numbers(option: str, text: str | None) -> list[float]:
    """The positive numbers in `text`; None has none."""
    if text is None:
        return []
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        raise BadInput(f"{option}: numbers with commas between them expected, got {text!r}") from None
    for number in numbers:
        if not (math.isfinite(number) and number > 0):
            raise BadInput(f"{option}: numbers above 0 expected, got {number:g}")
    return numbers
