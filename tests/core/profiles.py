"""A profile to test with, and models that it does or does not belong to."""

from jointkv.policy.identity import ModelIdentity
from jointkv.policy.profile import DataIdentity, GroupThresholds, Measurement, Prediction, Profile, Target

MODEL = ModelIdentity(
    name="toy", layers=4, kv_heads=2, head_size=8, checkpoint="files", weights="loaded", dtype="float32"
)


def make_profile(
    bounds=(0.2,), *, model=MODEL, block_size=16, scope="batch", distortion=0.01, acceptance=0.8, **changes
):
    """A profile with one layer group per bound."""
    measured = Measurement(
        requests=8, ratio=2.0, kl=0.0, kl_upper=0.0, kl_worst_request=0.0, top1=1.0, nll=1.0, nll_unfused=1.0
    )
    predicted = Prediction(ratio=2.0, low=1.5, high=2.5, requests=8)
    fields = {
        "model": model,
        "block_size": block_size,
        "scope": scope,
        "chunk_tokens": 512,
        "across_layers": "rms",
        "groups": tuple(
            GroupThresholds(
                max_relative_error=bound, max_token_error=1.5 * bound, acceptance=acceptance, distortion=distortion
            )
            for bound in bounds
        ),
        "target": Target(kind="kl", value=0.005),
        "met": True,
        "predicted": predicted,
        "predicted_equal_text": predicted,
        "calibrated": measured,
        "held_out": measured,
        "frontier": (),
        "data": DataIdentity(source="test", sha256="0", requests=16, tokens=160, scored_tokens=16, seed=0),
        "versions": {},
    }
    return Profile(**{**fields, **changes})
