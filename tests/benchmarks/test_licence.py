"""The simulation of licences in `benchmarks/licence.py`, briefly: every number is there and makes sense."""

import json

import numpy as np

import licence
from jointkv.theory.trials import DRAWS


def test_all_numbers_are_written(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["licence.py", "--licences", "3", "--audits", "300", "--output", str(tmp_path)])
    monkeypatch.setattr(licence, "SEEDS", (0, 1))
    few = {kind: DRAWS[kind] for kind in ("each of 20 by itself", "streaks of half or none")}
    monkeypatch.setattr(licence, "DRAWS", few)
    licence.main()
    result = json.loads((tmp_path / "licence.json").read_text())
    assert result["headline"]["audits_without_a_miss"] == 172 and result["headline"]["over_the_least"] <= 1.2
    kinds = "wrongly_granted", "earning", "keeping", "change", "foreign_profile", "bad_before", "many_keys"
    for part in (*kinds, "binomial_over_blocks"):
        assert {row["kind"] for row in result[part]} == set(few)
        numbers = [value for row in result[part] for name, value in row.items() if name not in ("kind", "mean")]
        assert all(len(value) == 2 and min(value) >= 0 for value in numbers)


def test_the_limit_it_is_compared_with_covers_the_mean():
    """An empirical Bernstein limit above the average of the shares, and nearer with more of them."""
    shares = DRAWS["each of 20 by itself"](np.random.default_rng(0), 0.02, (50, 4000))
    limits = licence.bernstein_limit(shares, 0.05)
    assert (limits >= 0.02).all(1).mean() >= 0.9 and limits[:, -1].max() < 0.03
