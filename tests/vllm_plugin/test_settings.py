"""Options of the plugin: what is accepted, what is refused and how."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from jointkv.errors import BadInput, InvalidPolicy
from jointkv.vllm_plugin import CONNECTOR, CONNECTOR_MODULE, SCHEDULER, WORKERS, engine_args
from jointkv.vllm_plugin.settings import PluginSettings
from tests.core.profiles import make_profile


def test_the_defaults_and_their_policy() -> None:
    policy = PluginSettings.parse({}).fusion_policy()
    assert (policy.max_relative_error, policy.max_token_error, policy.scope) == (0.2, 0.3, "batch")
    assert policy.key_threshold is None and policy.value_threshold is None


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("max_relativ_error", "max_relative_error"),
        ("min_pool", "min_pool_usage"),
        ("layergroups", "layer_groups"),
        ("Enabled", "enabled"),
    ],
)
def test_an_unknown_option_names_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(BadInput, match=rf"no option '{name}'; did you mean '{nearest}'\?"):
        PluginSettings.parse({name: 1})


def test_an_option_like_no_other() -> None:
    for name in ("", "foo"):
        with pytest.raises(BadInput, match=f"no option '{name}'; known: enabled, policy, .*, check_integrity$"):
            PluginSettings.parse({name: 1})


def test_what_cannot_be_had_together(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    for options, why in (
        ({"own_norms": True, "attention": "engine"}, "leave attention out, or set own_norms=false"),
        ({"store": str(file)}, "is a file, and a store is a folder"),
        ({"store": ""}, "option store: an empty path"),
        ({"profile": ""}, "option profile: an empty path"),
        ({"max_relative_error": "much"}, "option max_relative_error: Input should be a valid number"),
    ):
        with pytest.raises(BadInput, match=why):
            PluginSettings.parse(options)
    assert PluginSettings.parse({"own_norms": True, "attention": "shared"}).shares_reading


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"min_pool_usage": 1.5}, "min_pool_usage"),
        ({"min_pool_usage": -0.1}, "min_pool_usage"),
        ({"max_candidates": 0}, "max_candidates"),
        ({"max_blocks_per_step": 0}, "max_blocks_per_step"),
        ({"layer_groups": 0}, "layer_groups"),
        ({"chunk_tokens": 0}, "chunk_tokens"),
        ({"scope": "everything"}, "scope"),
        ({"isolation": "none"}, "isolation"),
        ({"max_relative_error": "much"}, "max_relative_error"),
        ({"across_layers": "mean"}, "across_layers"),
        ({"reuse": "always"}, "reuse"),
        ({"reuse_miss_rate": 0.0}, "reuse_miss_rate"),
        ({"reuse_miss_rate": 1.0}, "reuse_miss_rate"),
        ({"reuse_confidence": 1.0}, "reuse_confidence"),
        ({"reuse_audit_rate": 0.0}, "reuse_audit_rate"),
        ({"reuse_audit_rate": 1.1}, "reuse_audit_rate"),
        ({"store": "pages", "store_bytes": 0}, "store_bytes"),
        ({"store_bytes": 10**9}, "store_bytes limits a store, and there is none"),
    ],
)
def test_a_wrong_value_names_its_option(options: dict[str, Any], named: str) -> None:
    with pytest.raises(BadInput, match=named):
        PluginSettings.parse(options)


PAPER = {"policy": "paper", "accept_unbounded": True, "layer_groups": 15}


def test_the_policy_of_the_paper() -> None:
    settings = PluginSettings.parse(PAPER)
    policy = settings.fusion_policy()
    assert (policy.similarity, policy.key_threshold, policy.value_threshold) == ("key", 0.75, None)
    assert (policy.max_relative_error, policy.max_token_error) == (None, None)
    assert (policy.skip_first_layers, policy.skip_last_layers, policy.candidates) == (2, 2, "signature")
    assert settings.unbounded and not settings.reuses and settings.max_candidates == 8
    chosen = PluginSettings.parse({**PAPER, "key_threshold": 0.9, "candidates": "both", "skip_last_layers": 0})
    assert (chosen.key_threshold, chosen.candidates, chosen.skip_last_layers) == (0.9, "both", 0)


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ({**PAPER, "accept_unbounded": False}, "policy=paper has no bound on the error.*set accept_unbounded=true"),
        ({"policy": "paper", "layer_groups": 15}, "policy=paper has no bound on the error"),
        (
            {"max_relative_error": None, "max_token_error": None, "key_threshold": 0.9, "value_threshold": 0.5}
            | {"candidates": "both"},
            "max_relative_error=null has no bound on the error",
        ),
        ({**PAPER, "layer_groups": 1}, "set layer_groups to half the number of the model's layers"),
        ({"policy": "paper", "accept_unbounded": True}, "block tables of their own"),
        ({**PAPER, "key_threshold": None}, "key_threshold: give it"),
        ({**PAPER, "value_threshold": 0.5}, "value_threshold: has no effect with similarity='key'"),
        ({**PAPER, "similarity": "key_value"}, "nothing tests the values"),
        ({**PAPER, "profile": "profile.json"}, "policy=paper has no bounds, and a profile"),
        ({**PAPER, "reuse": "licensed"}, "reuse=licensed does not go with layer_groups"),
        ({"skip_first_layers": 2}, "one layer group cannot leave layers out"),
        ({"policy": "papers"}, "policy"),
        ({"candidates": "either"}, "candidates"),
        ({"signature_size": 4}, "signature_size"),
        ({"skip_first_layers": -1}, "skip_first_layers"),
    ],
)
def test_what_makes_no_sense_or_lacks_consent(options: dict[str, Any], cause: str) -> None:
    with pytest.raises((BadInput, InvalidPolicy), match=cause):
        PluginSettings.parse(options)


@pytest.mark.parametrize(
    "options",
    [
        {"policy": "paper", "max_relative_error": 0.3, "layer_groups": 15},
        {"policy": "paper", "layer_groups": 15, "enabled": False},
        {"candidates": "both", "max_token_error": None},
        {"max_relative_error": None, "key_threshold": 0.9, "max_token_error": 0.4, "candidates": "signature"},
    ],
)
def test_what_has_a_bound_or_does_nothing_needs_no_consent(options: dict[str, Any]) -> None:
    assert not PluginSettings.parse(options).unbounded


def test_text_that_moved_is_about_reuse() -> None:
    with pytest.raises(BadInput, match=r"moved=true.*reuse=off; set reuse=licensed"):
        PluginSettings.parse({"moved": True})
    settings = PluginSettings.parse({"moved": True, "reuse": "auto"})
    assert settings.moves and not settings.with_reuse_decided(possible=False).moves
    assert not PluginSettings.parse({"reuse": "licensed"}).moves


@pytest.mark.parametrize("reuse", ["licensed", "probed"])
@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ({"candidates": "signature"}, "found by its text"),
        ({"layer_groups": 2}, "layer_groups=2; it works with one block table; set reuse=off"),
        ({"scope": "chunk"}, "scope=chunk"),
        ({"own_norms": True}, "own_norms"),
        ({"max_relative_error": None, "key_threshold": 0.9}, "without a bound"),
    ],
)
def test_what_reuse_does_not_go_with(reuse: str, options: dict[str, Any], cause: str) -> None:
    with pytest.raises(BadInput, match=cause):
        PluginSettings.parse({"reuse": reuse, **options})
    for least in ("off", "auto"):
        settings = PluginSettings.parse({"reuse": least, **options})
        assert not settings.reuses and settings.with_reuse_decided(possible=True).reuse == "off"


@pytest.mark.parametrize(
    ("options", "reuses"),
    [
        ({}, True),
        ({"max_token_error": None}, True),
        ({"scope": "both"}, True),
        ({"enabled": False}, False),
        ({"max_relative_error": 0.0}, False),
        ({"max_relative_error": [0.0]}, False),
        ({"max_token_error": 0.0}, False),
    ],
)
def test_within_a_bound_of_zero_nothing_is_reused(options: dict[str, Any], reuses: bool) -> None:
    assert PluginSettings.parse({"reuse": "licensed", **options}).reuses is reuses
    assert ("scheduler_cls" in engine_args(reuse="licensed", **options)) is reuses


def test_the_engine_decides_where_nobody_has_asked() -> None:
    settings = PluginSettings.parse({"reuse": "auto"})
    assert settings.reuses and "scheduler_cls" in engine_args(reuse="auto")
    assert [settings.with_reuse_decided(possible).reuse for possible in (True, False)] == ["licensed", "off"]
    assert PluginSettings.parse({"reuse": "probed"}).with_reuse_decided(possible=True).reuse == "probed"


@pytest.mark.parametrize("value", [-0.1, float("nan")])
def test_a_bound_that_makes_no_sense(value: float) -> None:
    with pytest.raises((BadInput, InvalidPolicy), match="max_relative_error"):
        PluginSettings.parse({"max_relative_error": value})


def test_one_bound_per_layer_group() -> None:
    settings = PluginSettings.parse({"max_relative_error": [0.1, 0.3], "layer_groups": 2})
    assert settings.max_relative_error == (0.1, 0.3)
    with pytest.raises((BadInput, InvalidPolicy)):
        PluginSettings.parse({"max_relative_error": [0.1, 0.3, 0.2], "layer_groups": 2})


def test_options_beside_a_profile_win(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    make_profile((0.05, 0.1), scope="chunk").save(path)
    settings = PluginSettings.parse({"profile": str(path), "max_candidates": 7})
    assert (settings.max_relative_error, settings.layer_groups, settings.scope) == ((0.05, 0.1), 2, "chunk")
    assert settings.max_candidates == 7 and settings.adapts
    assert not PluginSettings.parse({"profile": str(path), "max_token_error": None}).adapts
    for change in ({"scope": "both"}, {"layer_groups": 1}, {"across_layers": "max"}):
        with pytest.raises(BadInput, match="was calibrated with"):
            PluginSettings.parse({"profile": str(path), **change})
    with pytest.raises(BadInput, match="calibrated with all layers"):
        PluginSettings.parse({"profile": str(path), "skip_first_layers": 2})
    assert PluginSettings.parse({"profile": str(path), "max_relative_error": 0.07}).max_relative_error == 0.07


@pytest.mark.parametrize("content", ["[]", "{", json.dumps({"max_relative_error": 0.2})])
def test_a_profile_that_cannot_be_used(tmp_path: Path, content: str) -> None:
    profile = tmp_path / "profile.json"
    profile.write_text(content)
    with pytest.raises(BadInput, match="is no profile"):
        PluginSettings.parse({"profile": str(profile)})


def test_a_profile_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="cannot read profile"):
        PluginSettings.parse({"profile": str(tmp_path / "none")})


def test_engine_arguments() -> None:
    arguments = engine_args(max_relative_error=0.1)
    assert arguments["worker_cls"] == WORKERS["cpu"]
    transfer = arguments["kv_transfer_config"]
    assert (transfer["kv_connector"], transfer["kv_connector_module_path"]) == (CONNECTOR, CONNECTOR_MODULE)
    assert transfer["kv_connector_extra_config"]["max_relative_error"] == 0.1
    with pytest.raises(BadInput, match="did you mean 'enabled'"):
        engine_args(enable=True)


@pytest.mark.parametrize("options", [None, "policy", ["max_relative_error"], [("max_relative_error", 0.1)]], ids=repr)
def test_options_have_names(options: Any) -> None:
    with pytest.raises(BadInput, match="options have names"):
        PluginSettings.parse(options)


@pytest.mark.parametrize("beside", [{"max_relative_error": 0.1}, "connector", [{}], ["x"], None, 3], ids=repr)
def test_options_that_were_given_as_one_argument(beside: Any) -> None:
    """They went to vLLM as other connectors, which said something else about them."""
    with pytest.raises(BadInput, match="options are given by name"):
        engine_args(beside)


DIRECTIONS = {"directions": "written", "own_norms": True, "candidates": "signature"}


def test_written_directions() -> None:
    settings = PluginSettings.parse({**PAPER, **DIRECTIONS})
    assert settings.writes_directions and not settings.signs and settings.finds_other_text
    assert settings.fusion_policy().rule(2).shares_directions
    bounded = PluginSettings.parse({**DIRECTIONS, "similarity": "key", "key_threshold": 0.9})
    assert bounded.writes_directions and not bounded.unbounded
    assert not PluginSettings.parse({**PAPER, **DIRECTIONS, "enabled": False}).writes_directions
    assert engine_args(**PAPER, **DIRECTIONS)["scheduler_cls"] == SCHEDULER
    plain = PluginSettings.parse(PAPER)
    assert plain.signs and not plain.fusion_policy().rule(2).shares_directions


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({**PAPER, **DIRECTIONS, "own_norms": False}, "set own_norms=true"),
        ({**PAPER, **DIRECTIONS, "candidates": "tokens"}, "set candidates=signature or both"),
        ({**PAPER, "directions": "mean"}, "option directions"),
    ],
)
def test_what_written_directions_do_not_go_with(options: dict[str, Any], why: str) -> None:
    with pytest.raises(BadInput, match=why):
        PluginSettings.parse(options)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (DIRECTIONS, "key_threshold: directions group blocks"),
        ({**DIRECTIONS, "key_threshold": 0.9}, "value_threshold"),
        ({**DIRECTIONS, "similarity": "key", "key_threshold": 0.9, "scope": "both"}, "scope: 'both'"),
    ],
)
def test_directions_need_a_threshold(options: dict[str, Any], why: str) -> None:
    with pytest.raises(InvalidPolicy, match=why):
        PluginSettings.parse(options)


def test_a_store_is_for_engines_that_load(tmp_path: Path) -> None:
    transfer = engine_args(store=str(tmp_path))["kv_transfer_config"]
    assert (transfer["kv_role"], transfer["kv_load_failure_policy"]) == ("kv_both", "recompute")
    assert engine_args()["kv_transfer_config"]["kv_role"] == "kv_producer"
    assert engine_args(store=str(tmp_path))["scheduler_cls"] == SCHEDULER and "scheduler_cls" not in engine_args()
    assert PluginSettings.parse({"store": str(tmp_path), "reuse": "auto"}).reuses
    with pytest.raises(BadInput, match="store does not go with other KV connectors"):
        engine_args([{"kv_connector": "ExampleConnector", "kv_role": "kv_both"}], store=str(tmp_path))
