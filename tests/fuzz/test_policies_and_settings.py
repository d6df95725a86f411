"""Policies, profiles, options of the plugin and the environment."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jointkv.cli.fusion_options import bound, fusion_options
from jointkv.errors import BadInput, InvalidPolicy
from jointkv.policy import FusionPolicy, LayerGroups
from jointkv.policy.profile import Profile, Target
from jointkv.system.settings import Settings
from jointkv.theory.adapt import Adaptation
from jointkv.vllm_plugin.settings import PluginSettings
from tests.core.profiles import MODEL, make_profile
from tests.effort import fuzz_settings
from tests.fuzz.damage import PROMISE, TEXTS, VALUES, documents, json_bytes, promise, unreadable

POLICY = json.loads(FusionPolicy(max_relative_error=(0.1, 0.2), max_token_error=0.3, layer_groups=2).to_json())
PAPER = json.loads(FusionPolicy.preset("paper").to_json())
PROFILE = json.loads(make_profile((0.1, 0.2)).model_dump_json())
OPTIONS: dict[str, Any] = {
    "max_relative_error": [0.1, 0.2],
    "max_token_error": 0.3,
    "key_threshold": 0.9,
    "scope": "both",
    "chunk_tokens": 64,
    "layer_groups": 2,
    "min_pool_usage": 0.5,
    "isolation": "strict",
    "adapt": True,
}
VARIABLES = ("JOINTKV_CACHE_DIR", "JOINTKV_DATA_DIR", "XDG_CACHE_HOME", "HF_HUB_OFFLINE", "CC")


@pytest.mark.hazard("Parsers", "a damaged or hostile policy", PROMISE)
@fuzz_settings()
@given(text=json_bytes(POLICY) | json_bytes(PAPER))
def test_policies(text: bytes) -> None:
    with promise():
        policy = FusionPolicy.from_json(text.decode("utf-8", "surrogateescape"))
        assert FusionPolicy.from_json(policy.to_json()) == policy
        LayerGroups.of(policy, 4)


@pytest.mark.hazard("Parsers", "a damaged or hostile profile", PROMISE)
@fuzz_settings()
@given(text=json_bytes(PROFILE))
def test_profiles(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "profile.json"
    path.write_bytes(text)
    with promise():
        profile = Profile.load(path)
        profile.save(tmp_path / "again.json")
        assert Profile.load(tmp_path / "again.json") == profile
        assert LayerGroups.of(profile.policy(), 8 * profile.layer_groups).count == profile.layer_groups
        Adaptation(profile).check_integrity()
        profile.check(MODEL, 16)


@pytest.mark.hazard("Parsers", "a damaged or hostile profile", PROMISE)
def test_profiles_that_are_no_files(tmp_path: Path) -> None:
    for path in (*unreadable(tmp_path), Path("~nobody-here/profile.json")):
        with pytest.raises(BadInput, match="cannot read profile"):
            Profile.load(path)


@pytest.mark.hazard("Parsers", "wrong or hostile options of the plugin", PROMISE)
@fuzz_settings()
@given(options=documents(OPTIONS), profile=st.none() | VALUES | json_bytes(PROFILE))
def test_options_of_the_plugin(tmp_path: Path, options: Any, profile: Any) -> None:
    if not isinstance(options, dict):
        return
    if isinstance(profile, bytes):
        (tmp_path / "profile.json").write_bytes(profile)
        profile = str(tmp_path / "profile.json")
    if profile is not None:
        options["profile"] = profile
    with promise():
        settings = PluginSettings.parse(options)
        assert settings.fusion_policy().layer_groups == settings.layer_groups
        settings.load_profile()


@pytest.mark.hazard("Parsers", "wrong or hostile environment variables", PROMISE)
@fuzz_settings()
@given(
    values=st.dictionaries(
        st.sampled_from(VARIABLES),
        st.binary(max_size=20) | TEXTS.map(lambda text: text.encode("utf-8", "surrogatepass")),
    )
)
def test_the_environment(values: dict[str, bytes]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for name in VARIABLES:
            patch.delenv(name, raising=False)
        for name, value in values.items():
            patch.setenv(name, os.fsdecode(value.replace(b"\x00", b"")))
        with promise():
            settings = Settings.from_environment()
            assert settings.models_dir.is_absolute() and settings.native_dir.is_absolute()


@pytest.mark.hazard("Parsers", "wrong or hostile options on the command line", PROMISE)
@fuzz_settings()
@given(text=st.text(max_size=30) | st.tuples(st.sampled_from(["kl", "ratio", "relative_error"]), TEXTS).map("=".join))
def test_targets(text: str) -> None:
    with promise():
        target = Target.parse(text)
        assert 0 < target.value <= 1000


@pytest.mark.hazard("Parsers", "wrong or hostile options on the command line", PROMISE)
@fuzz_settings()
@given(
    names=st.lists(st.sampled_from([*OPTIONS, "profile", "", "x"]), max_size=4),
    texts=st.lists(TEXTS | VALUES.map(json.dumps) | st.sampled_from(["[" * 5000, "0.1,0.2", ",", "1e999"]), max_size=4),
)
def test_options_of_fusion(names: list[str], texts: list[str]) -> None:
    pairs = [f"{name}={text}" for name, text in zip(names, texts, strict=False)]
    with promise(texts):
        fusion_options(pairs, {"max_token_error": bound(texts[-1] if texts else None)}, "--fuse")


def test_numbers_that_no_tensor_holds() -> None:
    """A policy with 10**400 as its bound was accepted, and the first comparison of blocks overflowed."""
    for change in ({"max_relative_error": 10**400}, {"chunk_tokens": 10**30}, {"max_candidates": 2**63}):
        with pytest.raises(InvalidPolicy, match=next(iter(change))):
            FusionPolicy.from_json(json.dumps(change))


def test_a_policy_nested_too_deep() -> None:
    """JSON nested thousands deep ended in a RecursionError instead of an error with a name."""
    with pytest.raises(InvalidPolicy, match="not JSON"):
        FusionPolicy.from_json("[" * 100_000)


def test_numbers_of_a_profile_that_json_cannot_hold() -> None:
    """An infinite number was written as null, and the profile could not be read again."""
    with pytest.raises(ValueError, match="finite"):
        Target(kind="kl", value=float("inf"))


@pytest.mark.parametrize("name", ["JOINTKV_CACHE_DIR", "JOINTKV_DATA_DIR"])
def test_a_home_that_does_not_exist(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A folder below the home of an unknown user raised RuntimeError when it was first used."""
    monkeypatch.setenv(name, "~nobody-here/cache")
    with pytest.raises(BadInput, match="environment variable"):
        Settings.from_environment()


def test_a_compiler_with_half_a_quote(monkeypatch: pytest.MonkeyPatch) -> None:
    """CC with an unbalanced quote raised ValueError when the kernel was built, inside an engine's start."""
    monkeypatch.setenv("CC", "gcc 'x")
    with pytest.raises(BadInput, match="CC"):
        Settings.from_environment()
