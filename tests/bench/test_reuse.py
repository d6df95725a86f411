"""What the plugin's counters say of compute reuse."""

from __future__ import annotations

import pytest

from jointkv.bench.reuse import COUNTERS, HELD, PLAN_SECONDS, SKIPPED, reuse_of, total
from tests.bench.plans import run

AUDITS, GRANTED = COUNTERS["audits"], COUNTERS["licences_granted"]


def page(**counts: float) -> dict[str, float]:
    names = {**COUNTERS, "plan_seconds": PLAN_SECONDS, "held": HELD}
    return {SKIPPED: 0.0, **{names[field]: value for field, value in counts.items()}}


def test_nothing_counted() -> None:
    assert reuse_of([{}, {"jointkv_pages_freed_total": 2.0}]) is None
    found = reuse_of([page(), page()])
    assert found is not None and (found.skipped_tokens, found.licences, found.plan_seconds) == (0, 0, 0.0)
    assert found.audits_until_licence is None and found.miss_rate is None


def test_counts_are_of_this_time_and_licences_of_its_end() -> None:
    before = page(skipped_tokens=100, audits=160, licences_granted=2, plan_seconds=0.5)
    after = page(skipped_tokens=900, audits=164, licences_granted=2, licences_lost=1, held=1, plan_seconds=0.75)
    found = reuse_of([before, {**after, COUNTERS["audited_blocks"]: 50.0, COUNTERS["missed_blocks"]: 2.0}])
    assert found is not None
    assert (found.skipped_tokens, found.audits, found.plan_seconds) == (800, 4, 0.25)
    assert (found.licences_granted, found.licences_lost, found.licences) == (0, 1, 1)
    assert found.audits_until_licence is None and found.miss_rate == pytest.approx(0.04)


@pytest.mark.parametrize(("computed", "share"), [(None, 0.9), (1, 0.9), (8, 0.6), (25, 0.0)])
def test_what_preempted_requests_skip_again_was_not_saved_twice(computed: int | None, share: float) -> None:
    reuse = reuse_of([page(), page(skipped_tokens=18)])
    found = run(prompt_tokens=20, prompt_tokens_computed=computed, reuse=reuse)
    assert found.skipped_share == pytest.approx(share)
    assert run(prompt_tokens_computed=computed).skipped_share is None


def test_a_licence_that_is_earned_meanwhile() -> None:
    pages = [page(audits=30), page(audits=120), page(audits=153, licences_granted=1), page(audits=170)]
    found = reuse_of(pages)
    assert found is not None and (found.audits, found.audits_until_licence) == (140, 153)


def test_labels_are_added_up() -> None:
    labelled = {SKIPPED: 0.0, f"{AUDITS}.short": 3.0, f"{AUDITS}.long": 4.0, "jointkv_reuse_audits_total_seconds": 9.0}
    assert total(labelled, AUDITS) == 7.0
    found = reuse_of([page(), {**labelled, f"{GRANTED}.short": 1.0}])
    assert found is not None and (found.audits, found.licences, found.audits_until_licence) == (7, 0, 7)
