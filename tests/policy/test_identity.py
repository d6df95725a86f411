"""Models are told apart by shape and by hashes of their weights, whichever of them is known."""

import pytest
import torch
from safetensors.torch import save_file

from jointkv.errors import ModelMismatch
from jointkv.policy.identity import checkpoint_fingerprint, checkpoint_folder
from tests.core.profiles import MODEL


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
        MODEL.check(MODEL.model_copy(update=change), "the profile")


@pytest.mark.parametrize(
    "change",
    [{}, {"name": "copy"}, {"checkpoint": None}, {"weights": "rounded", "dtype": "bfloat16"}, {"weights": None}],
)
def test_the_same_model_is_known_by_either_hash(change):
    MODEL.check(MODEL.model_copy(update=change), "the profile")


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
