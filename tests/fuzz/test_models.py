"""Model folders: the record beside a fetched model, configurations, pickles and code that must not run."""

from __future__ import annotations

import json
import os
import pickle
import signal
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from jointkv.cli.model import describe
from jointkv.errors import BadInput
from jointkv.hf import models, sources
from tests.effort import fuzz_settings
from tests.fuzz.damage import PROMISE, json_bytes, promise, slower
from tests.hf.tiny_models import build_model

RECORD = {
    "model": "smollm2",
    "source": "hub",
    "files": {"model.safetensors": {"bytes": 3, "sha256": "ab"}, "config.json": {"bytes": 2, "sha256": "cd"}},
}


@cache
def configuration() -> Any:
    return {**json.loads(build_model("llama").config.to_json_string()), "architectures": ["LlamaForCausalLM"]}


@pytest.mark.hazard("Parsers", "a damaged or hostile record of a fetched model", PROMISE)
@slower(4)
@given(text=json_bytes(RECORD))
def test_records(tmp_path: Path, text: bytes) -> None:
    folder = tmp_path / "models" / "smollm2-135m-instruct"
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in {"model.safetensors": b"abc", "config.json": b"{}", "source.json": text}.items():
        (folder / name).write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JOINTKV_CACHE_DIR", str(tmp_path))
        with promise():
            assert models.locate_model("smollm2") == str(folder)


def test_a_record_that_leads_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A record could name files outside its folder, which were then read and hashed; `bytes` could be missing."""
    monkeypatch.setenv("JOINTKV_CACHE_DIR", str(tmp_path))
    folder = tmp_path / "models" / "smollm2-135m-instruct"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"abc")
    (tmp_path / "elsewhere").write_bytes(b"secret")
    for entry in ({"../../elsewhere": {"bytes": 6, "sha256": "x"}}, {"config.json": {}}):
        files = {"model.safetensors": {"bytes": 3, "sha256": "ab"}, **entry}
        (folder / "source.json").write_text(json.dumps({"model": "smollm2", "files": files}))
        with pytest.raises(BadInput, match="not fetched yet"):
            models.locate_model("smollm2")


@pytest.mark.hazard("Parsers", "a damaged or hostile configuration of a model", PROMISE)
@slower(4)
@given(data=st.data())
def test_configurations(tmp_path: Path, data: st.DataObject) -> None:
    # Not in here: more layers or heads than a model has, for which transformers takes time and memory as it is told.
    text = data.draw(json_bytes(configuration()))
    if any(len(digits) > 6 for digits in "".join(c if c.isdigit() else " " for c in text.decode("latin-1")).split()):
        return
    (tmp_path / "config.json").write_bytes(text)
    with promise():
        config = models.load_config(str(tmp_path))
        described = describe("here", config)
        assert described.layers >= 0


def test_architectures_that_are_no_list(tmp_path: Path) -> None:
    """`true` ended in a TypeError."""
    for architectures in (True, 7, "LlamaForCausalLM"):
        (tmp_path / "config.json").write_text(json.dumps({**configuration(), "architectures": architectures}))
        with pytest.raises(BadInput, match="architectures must be a list"):
            models.load_config(str(tmp_path))


class Burglar:
    """Unpickling it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


@pytest.mark.hazard("Parsers", "a model whose weights are a pickle that runs code", "refused; the code does not run")
def test_a_pickle_that_runs_code(tmp_path: Path) -> None:
    broken_into = tmp_path / "broken into"
    model = tmp_path / "model"
    build_model("llama").save_pretrained(model)
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Burglar(broken_into)))
    with pytest.raises(BadInput, match="cannot load the model"):
        models.load_model(str(model), dtype="float32")
    torch.save({"lm_head.weight": Burglar(broken_into)}, model / "pytorch_model.bin")
    with pytest.raises(BadInput, match="cannot load the model"):
        models.load_model(str(model), dtype="float32")
    assert not broken_into.exists()


@pytest.mark.hazard("Parsers", "a model that brings code of its own", "refused at once; the code does not run")
def test_a_model_with_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a word on code from the model's folder, transformers asked on the terminal and waited 15 seconds."""
    broken_into = tmp_path / "broken into"
    (tmp_path / "code.py").write_text(f"import os\nos.mkdir({str(broken_into)!r})\n")
    auto = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model", "AutoTokenizer": ["code.T", None]}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "strange", "auto_map": auto}))
    waits: list[int] = []
    monkeypatch.setattr(signal, "alarm", waits.append)
    for load in (models.load_config, models.load_tokenizer, models.load_model):
        with pytest.raises(BadInput, match="cannot load the model"):
            load(str(tmp_path))
    assert not waits and not broken_into.exists()


@pytest.mark.hazard("Parsers", "a damaged GGUF file", "refused with a named error")
def test_gguf_files(tmp_path: Path) -> None:
    for name, content in {
        "noise": os.urandom(256),
        "empty": b"",
        "head": b"GGUF\x03\x00\x00\x00" + b"\xff" * 24,
    }.items():
        (tmp_path / f"{name}.gguf").write_bytes(content)
        with pytest.raises(sources.FetchError, match="cannot convert"):
            sources.convert_gguf(tmp_path / f"{name}.gguf", tmp_path / name)


def test_a_home_of_nobody() -> None:
    """A NUL behind the tilde ended in a ValueError."""
    for name in ("~\x00", "~nobody-here"):
        with pytest.raises(BadInput):
            models.locate_model(name)


@pytest.mark.hazard("Parsers", "wrong or hostile options on the command line", PROMISE)
@fuzz_settings()
@given(
    name=st.text(max_size=12) | st.sampled_from(["~nobody-here/x", "a/b", "../x", "/dev/zero", "smollm2", "a\x00/b"])
)
def test_names_of_models(name: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JOINTKV_CACHE_DIR", "/nowhere")
        with promise():
            assert models.locate_model(name)
