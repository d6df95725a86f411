"""What the environment says, and what is said of an environment that cannot be read."""

from pathlib import Path

import pytest

from jointkv.errors import BadInput
from jointkv.system.settings import Settings


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({}, Path.home() / ".cache" / "jointkv"),
        ({"XDG_CACHE_HOME": "/xdg"}, Path("/xdg/jointkv")),
        ({"XDG_CACHE_HOME": "relative"}, Path.home() / ".cache" / "jointkv"),
        ({"XDG_CACHE_HOME": "/xdg", "JOINTKV_CACHE_DIR": "/own"}, Path("/own")),
        ({"JOINTKV_CACHE_DIR": "~/own"}, Path.home() / "own"),
        ({"JOINTKV_CACHE_DIR": ""}, Path.home() / ".cache" / "jointkv"),
    ],
)
def test_the_cache_is_where_the_environment_wants_it(monkeypatch, variables, folder):
    for name in ("JOINTKV_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    settings = Settings.from_environment()
    assert (settings.models_dir, settings.native_dir) == (folder / "models", folder / "native")


@pytest.mark.parametrize(
    ("name", "value"), [("HF_HUB_OFFLINE", "perhaps"), ("CC", "cc 'unclosed"), ("JOINTKV_DATA_DIR", "~nobody-here/x")]
)
def test_a_value_that_makes_no_sense_is_refused_by_name(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(BadInput, match=r"^environment variable"):
        Settings.from_environment()
