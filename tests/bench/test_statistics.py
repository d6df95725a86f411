"""Pairs, ratios by round, and the permutation test against a count by hand."""

import itertools
import math

import pytest

from jointkv.bench.statistics import compare, pairs, sign_flip_p, smallest_p
from tests.bench.plans import CLOSED, POISSON, arm, latency, run


@pytest.mark.parametrize("ratios", [[1.2, 1.3], [1.2, 0.9, 1.1], [0.8, 0.7, 0.9, 0.95, 1.01], [2.0] * 6])
def test_p_is_the_share_of_exchanges_that_are_as_extreme(ratios: list[float]) -> None:
    logs = [math.log(ratio) for ratio in ratios]
    observed = abs(sum(logs))
    flips = list(itertools.product((1, -1), repeat=len(logs)))
    extreme = sum(
        abs(sum(sign * log for sign, log in zip(signs, logs, strict=True))) >= observed - 1e-9 for signs in flips
    )
    assert sign_flip_p(ratios) == pytest.approx(extreme / len(flips))


@pytest.mark.parametrize("rounds", [1, 2, 3, 5])
def test_smallest_p_is_reached_and_not_undercut(rounds: int) -> None:
    assert sign_flip_p([1.5 + number for number in range(rounds)]) == pytest.approx(smallest_p(rounds))
    assert smallest_p(1) == 1.0 and smallest_p(3) == 0.25


def test_equal_arms_have_p_of_one() -> None:
    assert sign_flip_p([1.0, 1.0, 1.0]) == 1.0


def test_who_is_compared() -> None:
    arms = [arm(name) for name in ("fused", "stock", "large_pool")]
    assert pairs(arms) == [("fused", "stock"), ("fused", "large_pool"), ("stock", "large_pool")]
    assert pairs([arm("fused"), arm("tight")]) == [("tight", "fused")]
    assert pairs([arm("large_pool"), arm("fused")]) == [("fused", "large_pool")]
    assert pairs([arm("stock")]) == []


def test_ratios_are_taken_within_rounds() -> None:
    runs = [
        run("fused", number=2, output_tokens_per_s=9.0, ttft=latency(1.0)),
        run("stock", number=1, output_tokens_per_s=4.0, ttft=latency(2.0)),
        run("fused", number=1, output_tokens_per_s=8.0, ttft=latency(1.0)),
        run("stock", number=2, output_tokens_per_s=3.0, ttft=latency(4.0)),
        run("stock", number=3),
        run("stock", POISSON),
    ]
    found = compare(runs, [arm("stock"), arm("fused")], [CLOSED, POISSON])
    by_metric = {row.metric: row for row in found}
    assert len(by_metric) == len(found) and {row.load for row in found} == {"closed 2"}
    speed = by_metric["output_tokens_per_s"]
    assert (speed.upper, speed.lower, speed.ratios, speed.median_ratio) == ("fused", "stock", [2.0, 3.0], 2.5)
    assert speed.p == speed.smallest_p == 0.5
    assert by_metric["ttft_p95"].ratios == [0.5, 0.25]


def test_what_is_zero_or_unmeasured_has_no_ratio() -> None:
    runs = [
        run("stock", number=1, preemptions=2, itl=None),
        run("fused", number=1, preemptions=4),
        run("stock", number=2, preemptions=0),
        run("fused", number=2, preemptions=4),
    ]
    metrics = {row.metric for row in compare(runs, [arm("stock"), arm("fused")], [CLOSED])}
    assert "preemptions" not in metrics and "itl_p50" not in metrics and "e2el_p95" in metrics
    first = compare(runs[:2], [arm("stock"), arm("fused")], [CLOSED])
    assert next(row for row in first if row.metric == "preemptions").ratios == [2.0]
