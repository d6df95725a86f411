"""Near-prefix requests on the real model: a small calibration, and the goals of the `safe` preset."""

import pytest

from jointkv.evaluate.calibrate.run import Calibration
from jointkv.evaluate.calibrate.settings import CalibrationSettings
from jointkv.evaluate.compare.policies import compare_policies
from jointkv.evaluate.holding.prefilled import prefill
from jointkv.evaluate.traffic import get_traffic
from jointkv.hf.identity import model_identity
from jointkv.hf.models import load_model
from jointkv.hf.pool import JointPool
from jointkv.policy import FusionPolicy
from jointkv.policy.profile import Target

pytestmark = pytest.mark.real_model


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    model, tokenizer = load_model("smollm2", dtype="float32")
    requests = get_traffic("near_prefix").requests(tokenizer, 16, continuation_tokens=24)
    return Calibration(model, requests, CalibrationSettings(Target.parse("kl=0.001")))


def test_near_prefix_requests_share_pages_at_no_visible_cost(calibration: Calibration) -> None:
    policies = {"safe": FusionPolicy.preset("safe")}
    eight = prefill(calibration.model, calibration.requests[:8])
    _, row = compare_policies(calibration.model, eight, policies, "near_prefix", print)
    # 8 requests of about 50 blocks, 2 + 5 of them their own: 4 at the most. 24 requests give 5.8 (`make demo`).
    assert row.ratio >= 3.0 and row.bytes_after * 3.0 <= row.bytes_before
    assert row.kl <= 0.001 and row.top1 >= 0.99 and row.kl_worst_request <= 0.002


@pytest.mark.slow
def test_a_profile_meets_its_target_on_unseen_requests(calibration: Calibration) -> None:
    identity = model_identity(calibration.model)
    profile = calibration.run(identity, "test", {})
    assert profile.met and profile.held_out.kl <= 0.001
    # 8 requests of about 50 blocks, 7 of them their own.
    assert profile.held_out.ratio >= 3.5
    assert profile.held_out.ratio == pytest.approx(profile.predicted.ratio, rel=0.1)
    assert profile.groups[0].max_token_error <= 0.45
    assert identity.checkpoint is not None
    assert JointPool(calibration.model, profile).policy.max_relative_error == (profile.groups[0].max_relative_error,)
