"""Calibration: predictions that come true, targets that are met or refused, results in between that are used again."""

import random
from dataclasses import replace

import numpy as np
import pytest

from jointkv.core.evidence import Known
from jointkv.errors import BadInput, InvalidPolicy
from jointkv.evaluate.calibrate.audits import Audit
from jointkv.evaluate.calibrate.run import Calibration, TargetUnmet
from jointkv.evaluate.calibrate.settings import CalibrationSettings
from jointkv.evaluate.traffic.base import Request
from jointkv.hf.identity import model_identity
from jointkv.hf.pool import JointPool
from jointkv.hf.prefill_result import RowPrefill
from jointkv.hf.reuse import ReuseOptions
from jointkv.policy.profile import Target
from jointkv.policy.reuse import ReuseRule
from jointkv.theory.confidence import UpperLimit
from tests.evaluate.sharing_requests import BLOCK, VOCABULARY, requests


def settings(target, **changes):
    return CalibrationSettings(Target.parse(target), **{"block_size": BLOCK, **changes})


def calibrated(model, target, made=None, work=None, **changes):
    calibration = Calibration(model, made or requests(24), settings(target, **changes), work=work)
    return calibration.run(model_identity(model), "test", {})


def test_a_kl_target_is_met_and_the_ratio_predicted(model):
    profile = calibrated(model, "kl=0.01")
    assert profile.met and profile.held_out.kl <= 0.01 and profile.calibrated.kl_upper <= 0.01
    assert profile.predicted.ratio > 1.5 and profile.held_out.ratio == pytest.approx(profile.predicted.ratio, rel=0.1)
    assert profile.predicted.low <= profile.held_out.ratio <= profile.predicted.high
    assert 0 < profile.groups[0].acceptance < 1 and profile.groups[0].distortion > 0
    assert any(point.measured for point in profile.frontier)


def test_a_stricter_target_gives_a_stricter_bound(model):
    loose, strict = (calibrated(model, f"kl={value}").groups[0].max_relative_error for value in (0.05, 1e-5))
    assert strict < loose


def test_a_ratio_target(model):
    profile = calibrated(model, "ratio=1.8")
    assert profile.met and profile.held_out.ratio >= 1.8 and profile.predicted.low >= 1.8
    bolder = [point for point in profile.frontier if point.max_relative_error < (profile.groups[0].max_relative_error,)]
    assert bolder and all(point.predicted.low < 1.8 for point in bolder)


def test_a_ratio_that_cannot_be_had_gives_the_frontier(model):
    with pytest.raises(TargetUnmet, match="largest ratio to be relied on is 2") as unmet:
        calibrated(model, "ratio=50")
    assert len(unmet.value.frontier) > 3


def test_a_relative_error_is_its_own_setting(model):
    profile = calibrated(model, "relative_error=0.25")
    assert profile.groups[0].max_relative_error == 0.25 and profile.groups[0].max_token_error == pytest.approx(0.375)


def test_layer_groups_get_bounds_of_their_own(model):
    profile = calibrated(model, "kl=0.001", layer_groups=2)
    assert profile.layer_groups == 2 and profile.met
    assert all(len(point.max_relative_error) == 2 for point in profile.frontier)
    assert any(len(set(point.max_relative_error)) == 2 for point in profile.frontier)
    assert profile.frontier[0].max_relative_error == (0.0, 0.0)


def test_reuse_is_audited_on_what_the_bounds_were_not_chosen_on(model):
    profile = calibrated(model, "relative_error=0.9", token_limit=9.0)
    found = profile.reuse
    assert found.audits == UpperLimit.from_json(found.evidence).count and 0 < found.audits <= 12
    assert 0 < found.skipped < 1 and found.blocks > found.missed_blocks and found.limit > 0.2
    further = Calibration(
        model, requests(24), settings("relative_error=0.9", token_limit=9.0), audits=requests(30, seed=9)
    )
    more = further.run(model_identity(model), "test", {}).reuse
    assert more.audits > found.audits and more.limit < found.limit
    assert calibrated(model, "kl=0.001", layer_groups=2).reuse is None


class Said(Audit):
    """Audits whose outcome is given: blocks and misses by how near entry blocks must be, and more with new echoes."""

    def __init__(self, outcome, echoing=(0, 0)):
        self.outcome, self.echoing, self.rules, self._moved = outcome, echoing, [], False

    def _rows(self, requests, rule, moved=False):
        self.rules.append(rule)
        more = (0, 0) if rule.echoes else self.echoing
        blocks, missed = (one + other for one, other in zip(self.outcome[rule.near], more, strict=True))
        return [RowPrefill(100, audited=True, audited_blocks=blocks, missed_blocks=missed)]


@pytest.mark.parametrize(
    ("outcome", "near"),
    [
        ({1.0: (500, 5)}, 1.0),
        ({1.0: (500, 6), 0.75: (400, 4)}, 0.75),
        ({1.0: (500, 6), 0.75: (0, 0), ReuseRule.near: (9, 9)}, ReuseRule.near),
    ],
    ids=["boldest", "a bolder one misses too often", "none"],
)
def test_entry_blocks_may_be_as_far_as_blocks_behind_them_allow(outcome, near):
    audit = Said(outcome)
    assert audit.rule([]) == ReuseRule(near=near)
    assert [rule.near for rule in audit.rules] == [*outcome, near]
    unwitnessed = Known(np.full(1, 1000), np.zeros(1, np.float32), np.zeros(1, bool))
    assert not any(rule.usable(unwitnessed).any() for rule in audit.rules)


@pytest.mark.parametrize(
    ("echoing", "allowed"),
    [((100, 1), True), ((10_000, 101), False), ((99, 0), False), ((0, 0), False), ((0, 9), False)],
    ids=["few are far", "too many", "too few to say", "none", "only misses"],
)
def test_new_echoes_are_let_through_where_few_of_those_blocks_themselves_are_far(echoing, allowed):
    """However many others there are: a mean would hide them."""
    audit = Said({1.0: (10**6, 0)}, echoing)
    assert audit.rule([]) == ReuseRule(near=1.0, echoes=not allowed)


def test_of_each_request_the_walk_counts_of_which_more_is_beyond_the_bounds():
    """Where all is computed pages have witnesses; where most is reused they may have none, as when it is served."""
    walks = {True: [(10, 0), (0, 0), (10, 1), (0, 0)], False: [(8, 2), (5, 0), (9, 0), (0, 0)]}

    class Walks(Said):
        def _rows(self, requests, rule, moved=False):
            bad = Known(np.full(1, 3), np.full(1, 2.0, np.float32), np.zeros(1, bool))
            assert rule.usable(bad, 0.1) == (rule.witnesses > 1)
            return [
                RowPrefill(100, audited=True, audited_blocks=blocks, missed_blocks=missed)
                for blocks, missed in walks[rule.witnesses == 1]
            ]

    audit = Walks({})
    audit._block_size = 4
    found = audit.evidence([Request(tuple(range(100)), (1,), "")] * 4, ReuseRule())
    assert (found.audits, found.blocks, found.missed_blocks, found.skipped) == (3, 23, 3, 0.23)
    assert found.evidence["sum"] == pytest.approx(0.25 + 0.1)


def test_what_entry_blocks_are_worth_is_asked_of_the_half_that_thresholds_are_chosen_on(model, monkeypatch):
    asked = []
    chosen = ReuseRule(near=0.75, echoes=False)
    monkeypatch.setattr(Audit, "rule", lambda self, requests: asked.append(requests) or chosen)
    calibration = Calibration(model, requests(24), settings("relative_error=0.9", token_limit=9.0))
    profile = calibration.run(model_identity(model), "test", {})
    assert profile.reuse.rule == chosen
    assert asked == [[calibration.requests[row] for row in calibration._rows[0]]]


def test_text_at_other_positions_is_audited_apart(model):
    """Heads of other lengths before the same text: its blocks stand elsewhere."""
    rng = random.Random(0)

    def words(count):
        return tuple(rng.randrange(2, VOCABULARY) for _ in range(count))

    text, moved = words(12 * BLOCK), list[Request]()
    for row in range(24):
        moved.append(Request(words(3 + row) + text, words(4), ""))
    found, without = (
        calibrated(model, "relative_error=0.9", moved, token_limit=9.0, moved=asked).reuse for asked in (True, False)
    )
    assert found.blocks == 0 < found.moved.blocks and 0 < found.moved.audits <= 12 and found.moved.moved is None
    assert found.moved.skipped > found.skipped == 0 and found.moved.rule == found.rule
    assert without.moved is None


def test_where_earlier_heads_have_all_lengths_text_that_moved_is_audited_all_the_same(model):
    """Most text then stands at the same position in one of many requests; it is the others that are asked about."""
    rng = random.Random(0)

    def words(count):
        return tuple(rng.randrange(2, VOCABULARY) for _ in range(count))

    text = words(12 * BLOCK)
    heads = [rng.sample(range(1, 4), 3) for _ in range(8)]
    made = [Request(words(length) + text, words(4), "") for three in heads for length in three]
    found = calibrated(model, "relative_error=0.9", made, token_limit=9.0, moved=True).reuse
    assert found.audits >= 8 and found.moved.audits >= 6


def test_a_bold_entry_rule_must_hold_where_text_moved_too():
    class Moved(Said):
        def _rows(self, requests, rule, moved=False):
            rows = super()._rows(requests, rule)
            return [replace(row, missed_blocks=100 * (rule.near == 1)) for row in rows] if moved else rows

    audit = Moved({1.0: (500, 0), 0.75: (500, 0)})
    assert audit.rule([]).near == 1.0
    audit._moved = True
    assert audit.rule([]).near == 0.75


def test_a_pool_goes_by_the_profile(model):
    profile = calibrated(model, "relative_error=0.9", token_limit=9.0)
    assert profile.reuse.near == 1.0  # in this model nothing behind an entry block is farther than it
    assert JointPool(model, profile, block_size=BLOCK, reuse="probed").reuse.rule == ReuseRule(near=1.0)
    own = ReuseOptions("probed", rule=ReuseRule(near=0.25))
    assert JointPool(model, profile, block_size=BLOCK, reuse=own).reuse.rule == ReuseRule(near=0.25)
    other = JointPool(model, profile, block_size=BLOCK, reuse="probed", max_relative_error=0.5)
    assert other.reuse.rule == ReuseRule()


def test_chunk_scope(model):
    rng = random.Random(5)
    made = []
    for request in requests(16):
        chunk = [rng.randrange(2, VOCABULARY) for _ in range(8)]
        made.append(Request(tuple(chunk * 6 + list(request.prompt[-4:])), request.continuation, ""))
    profile = calibrated(model, "relative_error=1", made, scope="chunk", chunk_tokens=8, token_limit=9.0)
    assert profile.held_out.ratio > 1.2
    assert profile.held_out.ratio == pytest.approx(profile.predicted.ratio, rel=0.1)


def test_an_interrupted_calibration_goes_on(model, tmp_path, monkeypatch):
    whole = calibrated(model, "kl=0.01", work=tmp_path)
    from jointkv.evaluate.calibrate import run

    def never(*args, **options):
        raise AssertionError("prefilled again")

    monkeypatch.setattr(run, "prefill", never)
    assert calibrated(model, "kl=0.01", work=tmp_path) == whole


def test_damaged_results_are_measured_again(model, tmp_path):
    whole = calibrated(model, "kl=0.01", work=tmp_path)
    for path in tmp_path.iterdir():
        path.write_bytes(b"{")
    assert calibrated(model, "kl=0.01", work=tmp_path) == whole


def test_other_requests_do_not_use_what_was_kept(model, tmp_path):
    calibrated(model, "kl=0.01", work=tmp_path)
    first = calibrated(model, "kl=0.01", requests(24, seed=7), work=tmp_path)
    assert first == calibrated(model, "kl=0.01", requests(24, seed=7))


@pytest.mark.parametrize(
    ("made", "changes", "error", "said"),
    [
        (requests(15), {}, BadInput, "15 requests are too few: .* at least 16"),
        (requests(16, lengths=(300, 301)), {}, BadInput, "request 1 takes 306 tokens .* reads 256"),
        (requests(16), {"scope": "both"}, BadInput, "one at a time"),
        (requests(16), {"layer_groups": 3}, InvalidPolicy, "does not divide"),
    ],
)
def test_what_cannot_be_calibrated(model, made, changes, error, said):
    with pytest.raises(error, match=said):
        calibrated(model, "kl=0.01", made, **changes)
