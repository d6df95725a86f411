"""A release of transformers whose interface differs is refused on import, with every difference named."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
import transformers
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from transformers import cache_utils, masking_utils
from typer.testing import CliRunner

from jointkv.cli.main import app
from jointkv.errors import JointKVError
from jointkv.hf import compatibility

HAZARD = pytest.mark.hazard(
    "Compatibility", "transformers has changed an interface", "refused on import; the message names every difference"
)


@HAZARD
def test_the_installed_release_is_accepted() -> None:
    compatibility.check_transformers()
    compatibility.check_overrides()
    compatibility.check_release()


@HAZARD
@pytest.mark.parametrize(
    ("owner", "name", "said"),
    [
        (cache_utils.DynamicSlidingWindowLayer, "crop", None),
        (cache_utils, "DynamicSlidingWindowLayer", "transformers.cache_utils has no DynamicSlidingWindowLayer"),
        (masking_utils, "sdpa_mask", "transformers.masking_utils has no sdpa_mask"),
        (transformers.PreTrainedModel, "get_decoder", "PreTrainedModel has no get_decoder"),
        (transformers.PreTrainedConfig, "get_text_config", "PreTrainedConfig has no get_text_config"),
    ],
)
def test_something_is_gone(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, said: str | None) -> None:
    monkeypatch.delattr(owner, name)
    if said is None:  # inherited all the same
        compatibility.check_transformers()
        return
    with pytest.raises(compatibility.UnsupportedTransformers, match=said) as refusal:
        compatibility.check_transformers()
    assert isinstance(refusal.value, JointKVError) and isinstance(refusal.value, ImportError)
    assert transformers.__version__ in str(refusal.value)


@HAZARD
@pytest.mark.parametrize("version", ["5.15.1", "5.24.0", "5.24.0.dev0", "6.0.0"])
def test_a_release_that_was_never_run(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    """5.24 has every interface, and its models call the cache by another name."""
    # By name: another test may have imported it anew.
    monkeypatch.setattr("transformers.__version__", version)
    with pytest.raises(
        compatibility.UnsupportedTransformers, match=r"never run with jointkv, which works with >=5\.16"
    ):
        compatibility.check_release()


def test_releases_are_those_that_are_installed_with_jointkv() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    wanted = map(Requirement, project["optional-dependencies"]["hf"])
    assert [each.specifier for each in wanted if each.name == "transformers"] == [SpecifierSet(compatibility.RELEASES)]


@HAZARD
def test_a_parameter_that_is_new(monkeypatch: pytest.MonkeyPatch) -> None:
    def crop(self: object, tokens_to_remove: int, keep_first: bool) -> None: ...

    monkeypatch.setattr(cache_utils.Cache, "crop", crop)
    monkeypatch.setattr(cache_utils.CacheLayerMixin, "get_mask_sizes", lambda self, cache_position, length: None)
    with pytest.raises(compatibility.UnsupportedTransformers, match=r"keep_first.*") as refusal:
        compatibility.check_overrides()
    assert "get_mask_sizes" in str(refusal.value)


@HAZARD
def test_the_command_says_it_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise compatibility.UnsupportedTransformers("transformers 9 is not what jointkv was written for")

    monkeypatch.setattr("jointkv.hf.models.load_config", lambda name: refuse())
    result = CliRunner().invoke(app, ["model", "info", "smollm2"])
    assert result.exit_code == 2 and result.stderr.startswith("error: transformers 9 is not")
