"""Loads from numbers on a command line."""

from typing import Any

import pytest

from jointkv.bench.loads import make_loads
from jointkv.errors import BadInput

NONE: dict[str, Any] = {
    **{"concurrency": None, "rate": None, "burstiness": None, "speed": None},
    **{"one_first": False, "replay": False, "requests": 32, "max_running": 16},
}


def labels(**given: Any) -> list[str]:
    return [load.label for load in make_loads(**{**NONE, **given})]


def test_without_any_all_requests_that_may_run_come_at_once() -> None:
    assert labels() == ["closed 16"]
    assert labels(requests=4) == ["closed 4"]


def test_sweeps() -> None:
    assert labels(concurrency="8,16", rate="0.5,1") == ["closed 8", "closed 16", "poisson 0.5/s", "poisson 1/s"]
    assert labels(rate="2", burstiness="1,0.3") == ["poisson 2/s", "bursty 2/s x0.3"]
    assert labels(one_first=True, concurrency="8", rate="1") == ["closed 8", "one first then all", "poisson 1/s"]
    assert labels(replay=True) == ["replay x1"]
    assert labels(replay=True, speed="1,2", concurrency="2") == ["closed 2", "replay x1", "replay x2"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"burstiness": "0.3"}, "--burstiness needs --rate"),
        ({"speed": "2"}, "--speed needs --replay"),
        ({"rate": "0"}, "--rate: numbers above 0 expected, got 0"),
        ({"rate": "nan"}, "numbers above 0"),
        ({"rate": "1,x"}, "numbers with commas between them expected, got '1,x'"),
        ({"rate": "1", "burstiness": "2"}, "1 is Poisson"),
        ({"concurrency": "1.5"}, "whole numbers"),
        ({"concurrency": "64"}, "there are 32"),
        ({"concurrency": "8,8"}, "twice"),
    ],
)
def test_bad_loads(given: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        labels(**given)
