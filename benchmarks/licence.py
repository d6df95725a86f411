"""What a licence to reuse costs and how it fails, by simulation: errors, audits to earn one, losses, delays.

`python benchmarks/licence.py --output out/reuse`; a quarter of an hour on one core. Every number is given for three
seeds.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from jointkv.theory.confidence import Array, UpperLimit, least_audits
from jointkv.theory.licence import FirstLicences, Licence, error_chance
from jointkv.theory.trials import DRAWS, INDEPENDENT, Fates, follow
from timing import write

SEEDS = (0, 1, 2)
RATE, CONFIDENCE = 0.02, 0.95
CALIBRATED = 300
"""Clean audits of a foreign profile."""

BLOCKS, OF_EACH, AUDIT_RATE = 20, 50, 0.02
"""Blocks that a request reads, requests of each of many keys, and the share of them that is drawn."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--licences", type=int, default=1000, help="of each kind and seed")
    parser.add_argument("--audits", type=int, default=5000, help="of each licence where errors and losses are counted")
    parser.add_argument("--output", type=Path, default=Path("out/reuse"))
    arguments = parser.parse_args()
    size = (arguments.licences, arguments.audits)
    result = {
        "licences": arguments.licences,
        "audits": arguments.audits,
        "seeds": SEEDS,
        "miss_rate": RATE,
        "confidence": CONFIDENCE,
        "least": [
            least(rate, confidence) for rate in (0.005, 0.01, 0.02, 0.05, 0.1) for confidence in (0.9, 0.95, 0.99)
        ],
        "wrongly_granted": by_kind(DRAWS, (1.0, 1.5), lambda draw: wrongly_granted(draw, size)),
        "one_look_at_every_look": of_seeds(lambda seed: {"ever_below": one_look(seed, size)}),
        "earning": by_kind(DRAWS, (0.125, 0.25, 0.5), lambda draw: earning(draw, size)),
        "keeping": by_kind(DRAWS, (0.25, 0.5), lambda draw: keeping(draw, size)),
        "change": by_kind(DRAWS, (2.5, 5.0), lambda draw: change(draw, arguments.licences)),
        "foreign_profile": by_kind(DRAWS, (2.5, 5.0), lambda draw: foreign(draw, arguments.licences)),
        "bad_before": by_kind(DRAWS, (5.0,), lambda draw: bad_before(draw, arguments.licences)),
        "many_keys": by_kind(DRAWS, (0.25, 5.0), lambda draw: many_keys(draw, arguments.licences)),
        "binomial_over_blocks": by_kind(DRAWS, (1.0,), lambda draw: binomial_over_blocks(draw, arguments.licences)),
        "long_requests": of_seeds(lambda seed: long_requests(seed, arguments.licences)),
    }
    write(arguments.output, "licence", {"headline": headline(result), **result})


def headline(result: dict[str, Any]) -> dict[str, Any]:
    """The worst over seeds and over the kinds of shares that are independent; streaks have a line of their own."""

    def worst(part: str, mean: float, number: str) -> float:
        rows = [row for row in result[part] if row["kind"] in INDEPENDENT and row["mean"] == RATE * mean]
        return max(value for row in rows for value in row[number])

    (streaks,) = (row for row in result["wrongly_granted"] if row["kind"] not in INDEPENDENT and row["mean"] == RATE)
    (least,) = (row for row in result["least"] if (row["miss_rate"], row["confidence"]) == (RATE, CONFIDENCE))
    return {
        "audits_without_a_miss": least["licence"],
        "over_the_least": least["over_the_least"],
        "wrongly_granted_at_the_rate": worst("wrongly_granted", 1.0, "ever_granted"),
        "wrongly_granted_at_the_rate_streaks": max(streaks["ever_granted"]),
        "missed_while_granted_streaks": max(streaks["missed_while_granted"]),
        "one_look_at_every_look": max(result["one_look_at_every_look"]["ever_below"]),
        "lost_to_a_false_alarm_at_a_quarter": worst("keeping", 0.25, "lost_to_a_false_alarm"),
        "change_found_after_median": worst("change", 5.0, "median"),
        "change_not_found_in_100": worst("change", 5.0, "not_in_100"),
        "foreign_lost_after_median": worst("foreign_profile", 5.0, "median"),
        "foreign_not_lost_in_100": worst("foreign_profile", 5.0, "not_in_100"),
        "many_keys_reused": worst("many_keys", 5.0, "reused"),
        "many_keys_reused_each_alone": worst("many_keys", 5.0, "reused_each_alone"),
        "binomial_over_blocks": worst("binomial_over_blocks", 1.0, "below"),
        "long_requests_granted": max(result["long_requests"]["granted"]),
        "long_requests_missed": max(result["long_requests"]["missed_blocks"]),
    }


def of_seeds(work: Callable[[int], dict[str, float]]) -> dict[str, list[float]]:
    """Each number for every seed."""
    rows = [work(seed) for seed in SEEDS]
    return {name: [round(row[name], 4) for row in rows] for name in rows[0]}


def by_kind(
    kinds: dict[str, Any], means: tuple[float, ...], work: Callable[[Callable[..., Array]], dict[str, float]]
) -> list[dict[str, Any]]:
    """A row for each kind of shares and each mean, which is given over the rate."""

    def drawing(kind: str, mean: float, seed: int) -> Callable[..., Array]:
        rng = np.random.default_rng(seed)
        return lambda size, of=mean: kinds[kind](rng, of * RATE, size)

    return [
        {
            "kind": kind,
            "mean": RATE * mean,
            **of_seeds(lambda seed, kind=kind, mean=mean: work(drawing(kind, mean, seed))),
        }
        for kind in kinds
        for mean in means
    ]


def after_clean(audits: int) -> Licence:
    licence = Licence(RATE, CONFIDENCE)
    for _ in range(audits):
        licence.observe(0.0)
    return licence


def least(rate: float, confidence: float) -> dict[str, float]:
    """Audits without a miss until a licence is granted, against the least that any method needs."""
    licence = Licence(rate, confidence)
    while licence.observe(0.0) is None:
        pass
    any_method = least_audits(rate, confidence)
    return {
        "miss_rate": rate,
        "confidence": confidence,
        "least": any_method,
        "licence": licence.audits,
        "over_the_least": round(licence.audits / any_method, 4),
    }


def wrongly_granted(draw: Callable[..., Array], size: tuple[int, int]) -> dict[str, float]:
    """Traffic at the rate or above it: how many licences were ever granted, how many audits found one granted."""
    shares = draw(size)
    fates = follow(shares, Licence(RATE, CONFIDENCE))
    return {
        "ever_granted": fates.granted.any(1).mean(),
        "share_of_audits": fates.granted.mean(),
        "missed_while_granted": missed_while_granted(shares, fates),
        "alarms": fates.alarms.mean(),
    }


def missed_while_granted(shares: Array, fates: Fates) -> float:
    """Share of blocks beyond the bounds in runs that come when a licence is granted; 0 if none ever is."""
    before = fates.granted[:, :-1]
    return float((before * shares[:, 1:]).sum() / max(1, before.sum()))


def one_look(seed: int, size: tuple[int, int]) -> float:
    """How often the exact binomial limit, which is for one look, was ever below the rate when read at every audit."""
    misses = INDEPENDENT["all blocks or none"](np.random.default_rng(seed), RATE, size).cumsum(1)
    fewest = stats.binom.ppf(1 - CONFIDENCE, np.arange(1, size[1] + 1), RATE) - 1
    return float((misses <= fewest).any(1).mean())


def earning(draw: Callable[..., Array], size: tuple[int, int]) -> dict[str, float]:
    """Good traffic: audits to the first licence, beside those of an empirical Bernstein limit of the same chance."""
    shares = draw(size)
    first = follow(shares, Licence(RATE, CONFIDENCE)).first_grant
    bernstein = bernstein_limit(shares, error_chance(1, CONFIDENCE)) <= RATE
    other = np.where(bernstein.any(1), bernstein.argmax(1), size[1]) + 1
    return {
        "median": float(np.median(first)),
        "p95": float(np.quantile(first, 0.95)),
        "never": float((first > size[1]).mean()),
        "empirical_bernstein_median": float(np.median(other)),
    }


def bernstein_limit(shares: Array, chance: float) -> Array:
    """After each audit: theorem 2 of Waudby-Smith and Ramdas (2024), the predictable plug-in, one-sided."""
    number = np.arange(1, shares.shape[1] + 1)
    mean = (0.5 + shares.cumsum(1)) / (number + 1)
    variance = (0.25 + ((shares - mean) ** 2).cumsum(1)) / (number + 1)
    mean_before = np.insert(mean[:, :-1], 0, 0.5, axis=1)
    variance_before = np.insert(variance[:, :-1], 0, 0.25, axis=1)
    bet = np.minimum(np.sqrt(2 * -np.log(chance) / (variance_before * number * np.log(number + 1))), 0.5)
    loss = ((shares - mean_before) ** 2 * (-np.log1p(-bet) - bet)).cumsum(1)
    limit: Array = ((bet * shares).cumsum(1) - np.log(chance) + loss) / bet.cumsum(1)
    return limit


def keeping(draw: Callable[..., Array], size: tuple[int, int]) -> dict[str, float]:
    """Good traffic: how many licences were lost, to what, and how many audits found one granted."""
    shares = draw(size)
    fates = follow(shares, Licence(RATE, CONFIDENCE))
    half = size[1] // 2
    return {
        "missed_while_granted": missed_while_granted(shares, fates),
        "lost_to_a_false_alarm": (fates.lost_to_rise > 0).mean(),
        "lost_to_the_limit": (fates.lost_to_limit > 0).mean(),
        "losses_to_the_limit": fates.lost_to_limit.mean(),
        "share_of_audits_first_half": fates.granted[:, :half].mean(),
        "share_of_audits_second_half": fates.granted[:, half:].mean(),
    }


def delay(lost: Array) -> dict[str, float]:
    """Audits from the change to the loss."""
    return {
        "median": float(np.median(lost)),
        "p95": float(np.quantile(lost, 0.95)),
        "not_in_100": float((lost > 100).mean()),
    }


def change(draw: Callable[..., Array], licences: int) -> dict[str, float]:
    """Traffic turns bad after 5,000 clean audits."""
    return delay(follow(draw((licences, 1000)), after_clean(5000)).first_loss)


def foreign(draw: Callable[..., Array], licences: int) -> dict[str, float]:
    """Bad traffic under a licence that a profile of other traffic granted."""
    evidence = UpperLimit(CONFIDENCE)
    for _ in range(CALIBRATED):
        evidence.observe(0.0)
    return delay(follow(draw((licences, 1000)), Licence.from_profile(evidence.to_json(), RATE, CONFIDENCE)).first_loss)


def many_keys(draw: Callable[..., Array], keys: int) -> dict[str, float]:
    """Keys with few requests each, one after another, under that profile: which part of all requests is reused."""
    shares, drawn = draw((keys, OF_EACH)), np.random.default_rng(keys).random((keys, OF_EACH)) < AUDIT_RATE
    evidence = {"pages": after_clean(CALIBRATED).to_json()["evidence"]}
    together, reused = FirstLicences(evidence, RATE, CONFIDENCE), {"together": 0, "alone": 0}
    for row, audits in zip(shares.tolist(), drawn.tolist(), strict=True):
        for name, first in (("together", together), ("alone", FirstLicences(evidence, RATE, CONFIDENCE))):
            licence = first.new("pages")
            for share, audit in zip(row, audits, strict=True):
                if licence.granted and not audit:
                    reused[name] += 1
                else:
                    first.observe("pages", licence, share)
    return {"reused": reused["together"] / shares.size, "reused_each_alone": reused["alone"] / shares.size}


def binomial_over_blocks(draw: Callable[..., Array], times: int) -> dict[str, float]:
    """Traffic at the rate: how often one look of a limit that takes blocks for independent finds no more than that."""
    missed = draw((10 * times, 172)).sum(1) * BLOCKS
    limit = stats.beta.ppf(CONFIDENCE, missed + 1, 172 * BLOCKS - missed)
    return {"below": float((limit <= RATE).mean())}


def long_requests(seed: int, licences: int) -> dict[str, float]:
    """Three in a hundred requests read 200 blocks, half of them beyond the bounds, all others two good ones."""
    long = np.random.default_rng(seed).random((licences, 1000)) < 0.03
    granted = follow(np.where(long, 0.5, 0.0), Licence(RATE, CONFIDENCE)).granted[:, -1].mean()
    return {"granted": granted, "missed_blocks": float(100 * long.sum() / np.where(long, 200, 2).sum())}


def bad_before(draw: Callable[..., Array], licences: int) -> dict[str, float]:
    """1,000 bad audits, then clean ones: audits of the clean that are needed for a licence."""
    shares = np.concatenate((draw((licences, 1000)), np.zeros((licences, 4000))), axis=1)
    granted = follow(shares, Licence(RATE, CONFIDENCE)).granted
    needed = np.where(granted[:, 1000:].any(1), granted[:, 1000:].argmax(1), 4000) + 1
    return {
        "granted_while_bad": granted[:, :1000].any(1).mean(),
        "median": float(np.median(needed)),
        "p95": float(np.quantile(needed, 0.95)),
    }


if __name__ == "__main__":
    main()
