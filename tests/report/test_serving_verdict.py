"""What is said of a comparison: verdict, memory, cautions, break-even."""

import math
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jointkv.bench.result import Arm, ServingResult
from jointkv.report.serving.cautions import cautions
from jointkv.report.serving.memory import State
from jointkv.report.serving.pairs import fusion_pairs, large_pool
from jointkv.report.serving.verdict import Verdict, break_even, combine, judge, ranked, verdicts
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
        "On near-prefix traffic with 200 blocks, fused against stock: helps at closed 16 (TTFT p95 0.70x, output "
        "tokens/s 1.42x, end-to-end p95 1.00x, ITL p50 1.00x; rounds 3, p 0.25, at best 0.25)."
    )


@pytest.mark.parametrize(
    ("ratios", "kind", "said"),
    [
        ({"ratios": [1.0, 1.01, 0.99]}, "none", "no effect at closed 16 (TTFT p95 1.00x, output tokens/s 1.00x"),
        ({"ratios": [0.9, 0.88, 0.89]}, "costs", "costs at closed 16 (TTFT p95 1.00x, output tokens/s 0.89x"),
        ({"ratios": [1.4, 1.4, 1.45], "e2el": [1.2, 1.25, 1.3]}, "mixed", "trade at closed 16"),
        ({"ratios": [0.9, 1.2, 1.1]}, "unclear", "rounds 3, p 0.75, at best 0.25"),
        ({"ratios": [1.0, 1.01, 1.0], "ttft": [0.5, 0.5, 0.52]}, "helps", "TTFT p95 0.50x"),
        ({"ratios": [3.0]}, "unclear", "output tokens/s 3.00x"),
    ],
)
def test_every_kind_of_verdict(ratios: dict[str, Any], kind: str, said: str) -> None:
    verdict = only(samples.scaled(**ratios))
    assert verdict.kind == kind and said in verdict.sentence


def test_no_gain_is_claimed_where_no_page_was_freed() -> None:
    result = samples.scaled([1.4, 1.42, 1.5])
    idle = [run.model_copy(update={"pages_freed": 0}) if run.arm == "fused" else run for run in result.runs]
    verdict = only(result.model_copy(update={"runs": idle}))
    assert verdict.kind == "none" and verdict.memory.endswith("Pages freed by fused in a run: 0.")
    slower = [run.model_copy(update={"output_tokens_per_s": 1.0}) if run.arm == "fused" else run for run in idle]
    assert only(result.model_copy(update={"runs": slower})).kind == "costs"


def test_reuse_may_gain_without_a_page_freed() -> None:
    reuse = samples.FUSED.model_copy(update={"fusion": {"reuse": "licensed"}})
    result = samples.scaled([1.4, 1.42, 1.5])
    result = result.model_copy(update={"arms": [samples.STOCK, reuse]})

    def with_reuse(**fields: Any) -> ServingResult:
        did = samples.reuse(**fields)
        ample = {"pages_freed": 0, "pool_usage_peak": 0.3, "waiting_mean": 0.0, "preemptions": 0}
        runs = [run.model_copy(update={**ample, "reuse": did if run.arm == "fused" else None}) for run in result.runs]
        return result.model_copy(update={"runs": runs})

    verdict = only(with_reuse())
    assert verdict.kind == "helps" and "fusion could only cost" not in verdict.memory
    assert verdict.memory.endswith("Pages freed by fused in a run: 0. Prompt tokens it skipped: 80%.")
    assert cautions(with_reuse()) == []
    assert only(with_reuse(skipped_tokens=0)).kind == "none"
    (idle,) = cautions(with_reuse(skipped_tokens=0, licences=0))
    assert idle.startswith(
        "No licence was held and nothing skipped, which a warm-up or a profile changes, in 3 of 6 runs"
    )
    (lost,) = cautions(with_reuse(licences_lost=1))
    assert lost.startswith("A licence was lost in ")
    (missed,) = cautions(with_reuse(missed_blocks=11))
    assert missed.startswith("More of the audited blocks were beyond the bounds than were to be in 3 of 6 runs: fused")


def test_loads_of_one_kind_share_a_clause() -> None:
    verdict = only(samples.result())
    assert [effect.kind for effect in verdict.effects] == ["none", "helps", "helps"]
    assert "helps at closed 16 and closed 48 (" in verdict.sentence and "; no effect at closed 4 (" in verdict.sentence
    assert "memory was short at closed 16 and closed 48 (100% of the pool in use" in verdict.memory
    assert "memory was not short, so fusion could only cost at closed 4 (52% of the pool in use" in verdict.memory
    assert verdict.memory.endswith("Pages freed by fused in a run: 504.")


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
        ({"failed": 3}, "Requests failed in 1 of 6 runs: stock, closed 16, round 1."),
        ({"foreign_cpu": 0.2}, "so times mislead in 1 of 6 runs: stock, closed 16, round 1."),
        ({"fusion": {"jointkv_faults_total": 1.0}}, "Fusion had faults and switched itself off in 1 of 6 runs"),
    ],
)
def test_disturbed_runs_are_named(fields: dict[str, Any], words: str) -> None:
    (caution,) = cautions(samples.with_runs(samples.scaled([1.4, 1.4, 1.4]), **fields))
    assert words in caution


def test_partial_results_and_single_rounds_are_named() -> None:
    whole = samples.result()
    part = whole.model_copy(update={"runs": whole.runs[:4], "complete": False})
    assert cautions(part)[0].endswith("after 4 of 27 runs.")
    assert verdicts(whole.model_copy(update={"runs": whole.runs[:1]})) == []
    assert any(caution.startswith("One round") for caution in cautions(samples.scaled([3.0])))


@pytest.mark.parametrize(
    ("usage", "waiting", "preemptions", "state"),
    [
        (0.95, 9.0, 0, "short"),
        (0.95, 0.0, 2, "short"),
        (0.88, 9.0, 0, "short"),  # 24 of 200 blocks are free, and a request of 864 tokens takes 27
        (0.95, 0.5, 0, "full"),
        (0.3, 9.0, 0, "blocked"),
        (0.3, 0.5, 0, "ample"),
    ],
)
def test_memory_is_judged_by_the_pool_and_the_queue(
    usage: float, waiting: float, preemptions: int, state: State
) -> None:
    result = samples.scaled([1.0, 1.0, 1.0])
    fields = {"pool_usage_peak": usage, "waiting_mean": waiting, "preemptions": preemptions}
    result = result.model_copy(update={"runs": [run.model_copy(update=fields) for run in result.runs]})
    assert only(result).effects[0].pressure.state == state


def test_break_even_orders_comparisons_by_pressure() -> None:
    wide = [arm.model_copy(update={"pool_blocks": 1400}) for arm in (samples.STOCK, samples.FUSED)]
    results = [samples.result(), samples.result(arms=wide), samples.result(shares=False)]
    found = ranked([verdict for result in results for verdict in verdicts(result)])
    usages = [effect.pressure.usage for _, effect in found]
    assert usages == sorted(usages) and len(found) == 9
    assert break_even(found) == (
        "Fusion helped in 2 of 9 comparisons; the one least short of memory is near-prefix, pool 200, closed 16, with "
        "100% of the pool in use at the peak and 4.2 requests waiting without fusion."
    )
    assert found[-1][1].demand == pytest.approx(48 * samples.PAGES / 200)
    assert break_even(ranked(verdicts(results[1]))) == "Fusion helped in 0 of 3 comparisons."


def test_noise_alone_is_rarely_called_an_effect() -> None:
    draw = random.Random(0)
    called = [judge([math.exp(draw.gauss(0, 0.05)) for _ in range(3)], True) for _ in range(2000)]
    assert sum(kind in ("helps", "costs") for kind in called) / len(called) < 0.1
