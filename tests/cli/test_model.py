import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
from typer.testing import CliRunner

from jointkv.cli import console, main
from jointkv.cli.model import describe
from jointkv.errors import BadInput, UnsupportedModel

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "dtype": "bfloat16",
}


def run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(main.app, list(arguments))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


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


def test_help_without_a_verb_and_version() -> None:
    code, out, _ = run()
    assert code == 0 and "model" in out
    assert run("--version") == (0, "jointkv 0.1.0\n", "")


def test_help_loads_no_heavy_library() -> None:
    code = "import sys, jointkv.cli.main; print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_fetch_prints_the_folder(fake_fetch: Path) -> None:
    assert run("model", "fetch", "smollm2") == (0, f"{fake_fetch / 'cached'}\n", "downloading\n")
    target = fake_fetch / "elsewhere"
    assert run("model", "fetch", "smollm2", "--output", str(target))[1] == f"{target}\n"


def test_fetch_as_json(fake_fetch: Path) -> None:
    expected = {"folder": str(fake_fetch / "cached"), "model": "smollm2", "source": "wheel"}
    assert json.loads(run("model", "fetch", "smollm2", "--json", "-")[1]) == expected
    file = fake_fetch / "fetch.json"
    assert run("model", "fetch", "smollm2", "--json", str(file))[1] == f"{fake_fetch / 'cached'}\n"
    assert json.loads(file.read_text()) == expected


@pytest.mark.parametrize("verb", ["fetch", "info"])
def test_a_bad_name_is_one_line_and_exit_code_2(verb: str) -> None:
    code, out, err = run("model", verb, "nope")
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and "nope" in err and err.count("\n") == 1


def test_info_of_a_folder(tmp_path: Path) -> None:
    code, out, err = run("model", "info", model_folder(tmp_path))
    assert (code, err) == (0, "") and "LlamaForCausalLM" in out
    # 2 (K and V) * 4 layers * 2 KV heads * head size 8 * 2 bytes
    assert "256 bytes in bfloat16" in out
    described = json.loads(run("model", "info", str(tmp_path), "--json", "-")[1])
    assert (described["layers"], described["kv_heads"], described["head_size"]) == (4, 2, 8)
    assert described["kv_bytes_per_token"] == 256


def test_info_of_a_model_without_kv_cache(tmp_path: Path) -> None:
    code, _, err = run("model", "info", model_folder(tmp_path, model_type="t5"))
    assert code == 2 and "encoder-decoder" in err and err.count("\n") == 1


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
    code, _, err = run("model", "info", "smollm2")
    assert code == 2 and "jointkv model fetch smollm2" in err and err.count("\n") == 1


@pytest.mark.real_model
def test_info_of_the_real_model() -> None:
    from jointkv.hf.models import fetch_model

    fetch_model("smollm2")
    described = json.loads(run("model", "info", "smollm2", "--json", "-")[1])
    assert (described["layers"], described["kv_heads"], described["head_size"]) == (30, 3, 64)
    assert described["kv_bytes_per_token"] == 23040


def test_write_json_replaces_in_one_step(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    console.write_json(file, {"ratio": float("nan"), "at": tmp_path, "pair": (1, 2)})
    assert json.loads(file.read_text()) == {"ratio": None, "at": str(tmp_path), "pair": [1, 2]}
    with pytest.raises(TypeError):
        console.write_json(file, {"bad": object()})
    assert json.loads(file.read_text())["pair"] == [1, 2]
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


def test_write_json_spares_devices_and_names_the_path(tmp_path: Path) -> None:
    console.write_json("/dev/null", {})
    assert Path("/dev/null").is_char_device()
    (tmp_path / "file").write_text("")
    for place in (tmp_path, tmp_path / "file" / "result.json"):
        with pytest.raises(BadInput, match="cannot write"):
            console.write_json(place, {})


def test_fail_keeps_to_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    from typer import Exit

    with pytest.raises(Exit) as raised, console.named_errors():
        raise BadInput("first [bold]line\n" + "and more " * 30)
    assert raised.value.exit_code == 2
    err = capsys.readouterr().err
    assert err.startswith("error: first [bold]line and more") and err.count("\n") == 1


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError), console.named_errors():
        _ = 1 / 0


def test_stages_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "stderr_console", lambda: console.Console(force_terminal=True, file=None))
    with console.stages("first") as show:
        show("second [with brackets]")
    assert isinstance(show, types.FunctionType)
