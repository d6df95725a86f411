"""Compiles a C file of the package and the headers beside it with the machine's own compiler, once, and loads it; and
imports Triton's kernels where there is Triton."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import shlex
import subprocess
import tempfile
from pathlib import Path
from types import ModuleType

from jointkv.errors import NativeUnavailable
from jointkv.system.settings import Settings

# Without -ffast-math: NaN and infinity must stay what they are.
FLAGS = ("-std=c11", "-O3", "-march=native", "-fno-math-errno", "-ffp-contract=fast", "-shared", "-fPIC")
OPENMP = ("-fopenmp",)

COMMON = Path(__file__).parents[1] / "core"
"""Headers that every room includes."""
COMPILE_SECONDS = 120


def load(source: Path) -> ctypes.CDLL:
    """Load the compiled `source`, with OpenMP where the compiler has it.

    The library is kept in `Settings.native_dir` under a name made of all that decides its content, so a change of
    source, compiler or processor builds another one. Any number of processes may do this at once.

    Raises:
        NativeUnavailable: there is no compiler, it fails, or its result cannot be loaded.
    """
    settings = Settings.from_environment()
    compiler = shlex.split(settings.cc)
    headers = sorted(header for folder in (COMMON, source.parent) for header in folder.glob("*.h"))
    texts = [file.read_text() for file in (source, *headers)]
    # What the compiler says of itself and of this processor: a name of the latter would not tell what it can do.
    identity = (*texts, _run([*compiler, *FLAGS, "-dM", "-E", "-x", "c", "/dev/null"]))
    try:
        return _load(source, compiler, (*FLAGS, *OPENMP), identity, settings.native_dir)
    except NativeUnavailable:
        return _load(source, compiler, FLAGS, identity, settings.native_dir)


def triton_kernels(module: str) -> ModuleType | None:
    """The `module` of the package that declares Triton kernels; None where Triton is not installed."""
    return importlib.import_module(module) if importlib.util.find_spec("triton") else None


def _load(
    source: Path, compiler: list[str], flags: tuple[str, ...], identity: tuple[str, ...], folder: Path
) -> ctypes.CDLL:
    digest = hashlib.sha256("\0".join((*identity, *compiler, *flags)).encode()).hexdigest()
    library = folder / f"{source.stem}-{digest[:24]}.so"
    try:
        if library.exists():
            try:
                return ctypes.CDLL(str(library))
            except OSError:  # a damaged file is built anew
                pass
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as work:
            built = Path(work) / library.name
            _run([*compiler, *flags, "-o", str(built), str(source)])
            built.replace(library)
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise NativeUnavailable(f"{source.name} cannot be built or loaded in {folder}: {error}") from error


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_SECONDS, check=True)
    except subprocess.CalledProcessError as error:
        raise NativeUnavailable(f"{shlex.join(command)} failed: {error.stderr.strip()[-2000:]}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeUnavailable(f"{shlex.join(command)} did not run: {error}") from error
    return done.stdout
