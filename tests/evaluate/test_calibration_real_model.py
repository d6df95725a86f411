"""A small calibration of the real model on real text: predicted, chosen and checked."""

import pytest

from jointkv.evaluate.calibration import Calibration, CalibrationSettings
from jointkv.evaluate.traffic import get_traffic
from jointkv.hf.models import load_model
from jointkv.hf.pool import JointPool, model_identity
from jointkv.profile import Target


@pytest.mark.real_model
def test_a_profile_of_the_real_model_meets_its_target_on_unseen_requests():
    model, tokenizer = load_model("smollm2", dtype="float32")
    requests = get_traffic("near_prefix").requests(tokenizer, 16, continuation_tokens=8)
    identity = model_identity(model)
    profile = Calibration(model, requests, CalibrationSettings(Target.parse("kl=0.001"))).run(identity, "test", {})
    assert profile.met and profile.held_out.kl <= 0.001
    # 8 requests of about 50 blocks, 7 of them their own.
    assert profile.held_out.ratio >= 3.5
    assert profile.held_out.ratio == pytest.approx(profile.predicted.ratio, rel=0.1)
    assert profile.groups[0].max_token_error <= 0.45
    assert identity.checkpoint is not None
    assert JointPool(model, profile).policy.max_relative_error == (profile.groups[0].max_relative_error,)
