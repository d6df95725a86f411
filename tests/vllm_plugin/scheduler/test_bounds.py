"""An engine serves what was calibrated: with its bounds, for its model only, and adapts to the errors it sees."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("vllm")

from jointkv.errors import BadInput, ModelMismatch
from jointkv.policy.identity import ModelIdentity, checkpoint_fingerprint
from tests.core.profiles import make_profile
from tests.vllm_plugin.engines import engine, near_prefix

BLOCK = 32
NEAR = near_prefix(8, shared=640)
UNEXPECTED = 1e-9
"""A distortion that no lossy traffic stays below."""


def profile_of(model: Path, folder: Path, **fields) -> str:
    identity = ModelIdentity(
        name="test", layers=4, kv_heads=2, head_size=32, checkpoint=checkpoint_fingerprint(model), weights="elsewhere"
    )
    path = folder / "profile.json"
    make_profile(**{"model": identity, "block_size": BLOCK, **fields}).save(path)
    return str(path)


def test_a_profile_sets_the_bounds(calm: Path, tmp_path: Path) -> None:
    path = profile_of(calm, tmp_path, bounds=(0.9,))
    with engine(calm, fusion={"profile": path, "adapt": False}) as served:
        assert served.side.settings.max_relative_error == (0.9,)
        served.generate(NEAR)
        shared = served.statistics["blocks_merged"]
        assert shared > 0 and served.statistics["bounds_tightened"] == 0
        served.assert_drained()
    with engine(calm, fusion={"max_relative_error": 0.9, "max_token_error": 1.5 * 0.9}) as plain:
        plain.generate(NEAR)
        assert plain.statistics["blocks_merged"] == shared


def test_the_bound_follows_the_errors(calm: Path, tmp_path: Path) -> None:
    path = profile_of(calm, tmp_path, bounds=(0.9,), distortion=UNEXPECTED)
    with engine(calm, pages=400, fusion={"profile": path}) as served:
        controller = served.side.bounds.adaptation.controllers[0]
        controller.window = 20
        for _ in range(3):
            served.generate(NEAR)
        assert served.statistics["bounds_tightened"] > 0 and controller.factor < 1
        assert served.statistics["bounds_loosened"] == 0
        assert served.statistics["faults"] == 0
        served.assert_drained()


def test_a_user_bound_beside_the_profile_is_the_limit(calm: Path, tmp_path: Path) -> None:
    path = profile_of(calm, tmp_path, bounds=(0.9,))
    with engine(calm, fusion={"profile": path, "max_relative_error": 0.01}) as served:
        assert served.side.bounds.adaptation.bounds(0)[0] == pytest.approx(0.01)
        served.generate(NEAR)
        assert served.statistics["blocks_merged"] == 0 and served.statistics["rejected"]["bound"] > 0


def test_a_profile_of_other_weights_is_refused(calm: Path, lively: Path, tmp_path: Path) -> None:
    path = profile_of(lively, tmp_path)
    with pytest.raises(ModelMismatch, match="other weights"), engine(calm, fusion={"profile": path}):
        pass


def test_a_profile_of_other_blocks_is_refused(calm: Path, tmp_path: Path) -> None:
    path = profile_of(calm, tmp_path, block_size=16)
    with pytest.raises(BadInput, match="--block-size 32"), engine(calm, fusion={"profile": path}):
        pass
