"""What is said of a comparison: verdict, cautions, memory in words, break-even."""

import math
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jointkv.bench.result import Arm, ServingResult
from jointkv.report.serving.break_even import in_words, points
from jointkv.report.serving.cautions import cautions
from jointkv.report.serving.pairs import fusion_pairs, large_pool
from jointkv.report.serving.pressure import explain
from jointkv.report.serving.verdict import Verdict, combine, judge, verdicts
from tests.report import serving_samples as samples

RATIOS = st.lists(st.floats(0.05, 20), max_size=7)


def only(result: ServingResult) -> Verdict:
    (verdict,) = verdicts(result)
    return verdict


@pytest.mark.parametrize(
    ("rounds", "kind"),
    [
        ([], "unclear"),
        ([2.0], "unclear"),
        ([1.4, 1.42, 1.5], "helps"),
        ([1.3, 1.4, 1.9], "helps"),  # far apart, yet every round is beyond 10%
        ([1.01, 1.05, 1.3], "unclear"),
        ([0.98, 1.3, 1.4], "unclear"),
        ([1.0, 1.01, 0.98], "none"),
        ([1.05, 1.06, 1.055], "helps"),
        ([1.0, 1.01, 1.2], "unclear"),
        ([0.9, 0.8, 0.85], "costs"),
    ],
)
def test_a_metric_is_judged_by_its_rules(rounds: list[float], kind: str) -> None:
    assert judge(rounds, True) == kind


@given(RATIOS)
def test_judging_is_the_same_from_the_other_side(rounds: list[float]) -> None:
    mirrored = {"helps": "costs", "costs": "helps"}
    kind = judge(rounds, True)
    assert judge(rounds, False) == mirrored.get(kind, kind)
    if kind in ("helps", "costs"):
        assert len({math.copysign(1, value - 1) for value in rounds}) == 1
        assert judge([*rounds, 1.0], True) != kind  # a round without difference is a round that disagrees


def test_kinds_are_combined() -> None:
    assert combine(["helps", "none", "unclear"]) == "helps"
    assert combine(["helps", "costs"]) == combine(["mixed", "none"]) == "mixed"
    assert combine(["none", "none"]) == "none"
    assert combine(["none", "unclear"]) == "unclear"


def test_helping_is_said_with_every_number() -> None:
    verdict = only(samples.scaled([1.35, 1.42, 1.5], ttft=[0.7, 0.68, 0.72]))
    assert verdict.kind == "helps"
    assert verdict.sentence == (
        "On near-prefix traffic with a pool of 200 blocks, fusion served 1.42 times the output tokens/s of stock "
        "(p = 0.25, the smallest possible with 3 rounds) and the first token came after 0.70 of the time (p95) at "
        "closed 16."
    )


def test_no_effect_costs_trade_and_disagreement() -> None:
    none = only(samples.scaled([1.0, 1.01, 0.99]))
    assert none.kind == "none" and "made no difference beyond the spread at closed 16 (1.00 times" in none.sentence
    costs = only(samples.scaled([0.9, 0.88, 0.89]))
    assert costs.kind == "costs" and "served 0.89 times" in costs.sentence and "which is a cost" in costs.sentence
    trade = only(samples.scaled([1.4, 1.4, 1.45], e2el=[1.2, 1.25, 1.3]))
    assert trade.kind == "mixed" and "which is a trade" in trade.sentence and "took 1.25 of the time" in trade.sentence
    unclear = only(samples.scaled([0.9, 1.2, 1.1]))
    assert unclear.kind == "unclear" and "rounds do not agree" in unclear.sentence
    assert "rounds 0.90 to 1.20; p = 0.75, 0.25 being the smallest possible with 3 rounds" in unclear.sentence
    latency = only(samples.scaled([1.0, 1.01, 1.0], ttft=[0.5, 0.5, 0.52]))
    assert latency.kind == "helps" and "(no difference beyond the spread; p = 0.25" in latency.sentence


def test_one_round_proves_nothing() -> None:
    result = samples.scaled([3.0])
    verdict = only(result)
    assert verdict.kind == "unclear" and "one round says nothing of the spread (3.00 times" in verdict.sentence
    assert any(caution.startswith("One round") for caution in cautions(result))


def test_no_gain_is_claimed_where_no_page_was_freed() -> None:
    result = samples.scaled([1.4, 1.42, 1.5])
    idle = [run.model_copy(update={"pages_freed": 0}) if run.arm == "fused" else run for run in result.runs]
    verdict = only(result.model_copy(update={"runs": idle}))
    assert verdict.kind == "none" and "fusion freed no page and cost nothing" in verdict.sentence
    slower = [run.model_copy(update={"output_tokens_per_s": 1.0}) if run.arm == "fused" else run for run in idle]
    assert only(result.model_copy(update={"runs": slower})).kind == "costs"


def test_loads_of_one_kind_share_a_clause() -> None:
    verdict = only(samples.result())
    assert [effect.kind for effect in verdict.effects] == ["none", "helps", "helps"]
    assert "at closed 16 and closed 48; fusion made no difference" in verdict.sentence
    assert verdict.sentence.count(".") - verdict.sentence.count("0.") >= 1 and "\n" not in verdict.sentence


def test_arms_are_held_against_what_differs_in_fusion_only() -> None:
    fp8 = Arm(name="fp8", title="fp8", pool_blocks=400, flags=["--kv-cache-dtype", "fp8"])
    both = Arm(name="fp8_fused", title="both", pool_blocks=400, flags=fp8.flags, fusion={})
    groups = Arm(name="groups", title="groups", pool_blocks=400, fusion={"layer_groups": 2})
    result = samples.result(
        arms=(samples.LARGE, samples.STOCK, fp8, samples.FUSED, both, groups), loads=samples.CLOSED[:1]
    )
    pairs = fusion_pairs(result)
    assert [(pair.upper.name, pair.lower.name) for pair in pairs] == [
        ("fused", "stock"),
        ("fp8_fused", "fp8"),
        ("groups", "stock"),
    ]
    assert not any(pair.differences for pair in pairs)
    assert large_pool(result, samples.STOCK) == samples.LARGE and large_pool(result, fp8) is None
    unequal = samples.result(arms=(samples.LARGE, samples.FUSED), loads=samples.CLOSED[:1])
    assert "differ in more than fusion: pool (200 and 1600 blocks)" in " ".join(cautions(unequal))


def test_a_quiet_complete_result_needs_no_caution() -> None:
    assert cautions(samples.result()) == []


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"failed": 3}, "Requests failed in 1 of 6 runs (stock, closed 16, round 1: 3 of 27 requests)."),
        ({"foreign_cpu": 0.2}, "in 1 of 6 runs (stock, closed 16, round 1: 20% of the cores' time)."),
        ({"fusion": {"jointkv_faults_total": 1.0}}, "Fusion had faults and switched itself off in 1 of 6 runs"),
    ],
)
def test_disturbed_runs_are_named(fields: dict[str, Any], words: str) -> None:
    (caution,) = cautions(samples.with_runs(samples.scaled([1.4, 1.4, 1.4]), **fields))
    assert words in caution


def test_partial_results_are_named() -> None:
    whole = samples.result()
    part = whole.model_copy(update={"runs": whole.runs[:4], "complete": False})
    assert cautions(part)[0].endswith("4 of 27 runs are in it.")
    nothing = whole.model_copy(update={"runs": whole.runs[:1], "complete": False})
    assert verdicts(nothing) == []
    assert "fused and stock have no load in common yet." in cautions(nothing)


def test_memory_is_explained_from_the_numbers() -> None:
    result = samples.result()
    (pair,) = fusion_pairs(result)
    said = explain(result, pair)
    assert "At closed 16, closed 48, memory was short: stock had 100% of its pool in use" in said[0]
    assert "At closed 4, stock never waited for memory (at most 52% of the pool in use)" in said[1]
    assert "fused gave back 504 pages" in said[2]
    assert "40 in fused, 7 in stock" in said[3]
    assert "large pool (1,600 blocks) served" in said[4]
    idle = samples.result(shares=False)
    assert "fused gave back no page" in " ".join(explain(idle, fusion_pairs(idle)[0]))


def test_a_queue_beside_an_empty_pool_is_not_short_memory() -> None:
    result = samples.scaled([1.0, 1.0, 1.0])
    fields = {"pool_usage_peak": 0.3, "waiting_mean": 9.0, "preemptions": 0}
    result = result.model_copy(update={"runs": [run.model_copy(update=fields) for run in result.runs]})
    assert "something other than memory holds requests back" in explain(result, fusion_pairs(result)[0])[0]


def test_a_pool_without_room_for_a_request_is_short() -> None:
    result = samples.scaled([1.0, 1.0, 1.0])
    fields = {"pool_usage_peak": 0.88, "waiting_mean": 9.0, "preemptions": 0}
    result = result.model_copy(update={"runs": [run.model_copy(update=fields) for run in result.runs]})
    # 24 of 200 blocks are free, and a request of 864 tokens takes 27.
    assert "memory was short: stock had 88%" in explain(result, fusion_pairs(result)[0])[0]


def test_break_even_orders_comparisons_by_pressure() -> None:
    wide = [arm.model_copy(update={"pool_blocks": 1400}) for arm in (samples.STOCK, samples.FUSED)]
    found = points([samples.result(), samples.result(arms=wide), samples.result(shares=False)])
    usages = [point.pressure.usage for point in found]
    assert usages == sorted(usages) and len(found) == 9
    said = " ".join(in_words(found))
    assert "Of 9 comparisons, fusion helped in 2 and made no difference or cost in 7." in said
    assert "least short of memory that it helped in: near-prefix, 200 blocks, closed 16, with 100%" in said
    assert "although it freed pages: near-prefix, 1,400 blocks, closed 48, with 89%" in said
    assert "No page was freed in unrelated, 200 blocks, closed 4" in said and "nothing to share" in said
    assert found[-1].demand == pytest.approx(48 * samples.PAGES / 200)


def test_break_even_that_was_not_reached_is_said() -> None:
    wide = [arm.model_copy(update={"pool_blocks": 1400}) for arm in (samples.STOCK, samples.FUSED)]
    assert "not reached: measure a smaller pool" in in_words(points([samples.result(arms=wide)]))[-1]
    heavy = samples.result(loads=samples.CLOSED[2:])
    assert "lies below what was run" in in_words(points([heavy]))[-1]


def test_noise_alone_is_rarely_called_an_effect() -> None:
    draw = random.Random(0)
    called = [judge([math.exp(draw.gauss(0, 0.05)) for _ in range(3)], True) for _ in range(2000)]
    assert sum(kind in ("helps", "costs") for kind in called) / len(called) < 0.1
