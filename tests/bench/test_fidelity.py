"""Answers of arms compared, and an arm's own noise."""

import pytest

from jointkv.bench.fidelity import common_prefix, compare_outputs
from tests.bench.plans import CLOSED, POISSON, arm


@pytest.mark.parametrize(
    ("one", "other", "share"),
    [("abcd", "abcd", 1.0), ("abcd", "abxd", 0.5), ("ab", "abcd", 0.5), ("", "", 1.0), ("", "a", 0.0), ("x", "y", 0.0)],
)
def test_common_prefix(one: str, other: str, share: float) -> None:
    assert common_prefix(one, other) == common_prefix(other, one) == share


def test_arms_against_the_reference_and_themselves() -> None:
    outputs = {
        ("stock", "closed 2", 1): ["aa", "bb"],
        ("stock", "closed 2", 2): ["aa", "bc"],
        ("fused", "closed 2", 1): ["aa", "bx"],
        ("fused", "closed 2", 2): ["aa", "bx"],
        ("fused", "poisson 0.5/s", 1): ["aa", "bx"],
    }
    found = compare_outputs(outputs, [arm("stock"), arm("fused")], [CLOSED, POISSON])
    rows = {(row.arm, row.against, row.load): (row.equal, row.common_prefix, row.pairs) for row in found}
    assert rows == {
        ("fused", "stock", "closed 2"): (0.5, 0.75, 4),
        ("stock", "stock", "closed 2"): (0.5, 0.75, 2),
        ("fused", "fused", "closed 2"): (1.0, 1.0, 2),
    }


def test_the_large_pool_is_the_reference_where_it_runs() -> None:
    outputs = {(name, "closed 2", 1): ["a"] for name in ("stock", "fused", "large_pool")}
    found = compare_outputs(outputs, [arm("stock"), arm("fused"), arm("large_pool")], [CLOSED])
    assert [(row.arm, row.against) for row in found] == [("stock", "large_pool"), ("fused", "large_pool")]
