"""Profiles: written and read back, bound to their model, refused otherwise."""

import json

import pytest
import torch
from safetensors.torch import save_file

from jointkv.errors import BadInput, ModelMismatch
from jointkv.policy.identity import checkpoint_fingerprint, checkpoint_folder
from jointkv.policy.profile import Profile, Target
from tests.core.profiles import MODEL, make_profile


def test_a_profile_comes_back_as_it_was(tmp_path):
    path = tmp_path / "new" / "profile.json"
    profile = make_profile((0.1, 0.3), target=Target(kind="ratio", value=2.0))
    profile.save(path)
    assert Profile.load(path) == profile
    assert [entry.name for entry in path.parent.iterdir()] == ["profile.json"]


def test_the_policy_of_a_profile():
    policy = make_profile((0.1, 0.3), scope="chunk").policy()
    assert (policy.max_relative_error, policy.scope, policy.layer_groups) == ((0.1, 0.3), "chunk", 2)
    assert policy.max_token_error == pytest.approx((0.15, 0.45))


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": "jointkv.profile/2"}', '{"max_relative_error": 0.2}'])
def test_what_is_no_profile(tmp_path, content):
    (tmp_path / "p.json").write_text(content)
    with pytest.raises(BadInput, match="is no profile of jointkv"):
        Profile.load(tmp_path / "p.json")


def test_a_field_too_many_or_out_of_range(tmp_path):
    whole = json.loads(make_profile().model_dump_json())
    for change in ({"surprise": 1}, {"block_size": 0}, {"groups": []}):
        (tmp_path / "p.json").write_text(json.dumps({**whole, **change}))
        with pytest.raises(BadInput, match=next(iter(change))):
            Profile.load(tmp_path / "p.json")


def test_a_missing_file_and_a_folder_that_cannot_be_written(tmp_path):
    with pytest.raises(BadInput, match="cannot read profile"):
        Profile.load(tmp_path / "none.json")
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="cannot write"):
        make_profile().save(tmp_path / "file" / "p.json")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"layers": 5}, "layers=4"),
        ({"head_size": 16}, "head_size=8"),
        ({"checkpoint": "other", "weights": None}, "other weights"),
        ({"weights": "changed in memory"}, "other weights"),
        ({"checkpoint": None, "weights": None}, "is unknown"),
    ],
)
def test_another_model_is_refused(change, said):
    with pytest.raises(ModelMismatch, match=said):
        make_profile().check(MODEL.model_copy(update=change), 16)


@pytest.mark.parametrize(
    "change",
    [{}, {"name": "copy"}, {"checkpoint": None}, {"weights": "rounded", "dtype": "bfloat16"}, {"weights": None}],
)
def test_the_same_model_is_known_by_either_hash(change):
    make_profile().check(MODEL.model_copy(update=change), 16)


def test_blocks_of_another_size_are_refused():
    with pytest.raises(BadInput, match="--block-size 32"):
        make_profile().check(MODEL, 32)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        *(("kl", "expected kl="), ("speed=2", "expected kl="), ("kl=much", "is not a number"), ("kl=0", "kl must be")),
        *(("kl=-1", "kl must be"), ("ratio=1", "ratio must be"), ("relative_error=1.5", "at most 1")),
        *(("kl=nan", "kl must be"), ("ratio=inf", "ratio must be")),
    ],
)
def test_targets_that_make_no_sense(text, said):
    with pytest.raises(BadInput, match=said):
        Target.parse(text)


def test_a_target():
    assert Target.parse("kl=0.005") == Target(kind="kl", value=0.005)


def test_the_fingerprint_of_files_does_not_depend_on_how_they_are_split(tmp_path):
    weights = {f"layer.{i}": torch.arange(6.0).view(2, 3) + i for i in range(3)} | {"scale": torch.tensor(2.0)}
    whole, split, other = tmp_path / "whole", tmp_path / "split", tmp_path / "other"
    for folder in (whole, split, other):
        folder.mkdir()
    save_file(weights, whole / "model.safetensors")
    for name, tensor in weights.items():
        save_file({name: tensor}, split / f"model-{name}.safetensors")
    save_file({**weights, "layer.1": weights["layer.1"] + 1e-3}, other / "model.safetensors")
    assert checkpoint_fingerprint(whole) == checkpoint_fingerprint(split) is not None
    assert checkpoint_fingerprint(whole) != checkpoint_fingerprint(other)
    save_file({"lora": torch.ones(1)}, whole / "adapter_model.safetensors")
    assert checkpoint_fingerprint(whole) == checkpoint_fingerprint(split)
    (other / "model-broken.safetensors").write_bytes(b"nothing")
    assert checkpoint_fingerprint(other) is None and checkpoint_fingerprint(tmp_path) is None


def test_the_folder_of_a_model(tmp_path):
    assert checkpoint_folder(str(tmp_path)) == tmp_path
    assert checkpoint_folder("nobody/nothing-of-this-name") is None
