"""The one way files are written: whoever reads one finds either all of it or what was there before."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from jointkv.errors import BadInput

if TYPE_CHECKING:
    from torch import Tensor


@contextmanager
def replacing(path: Path | str) -> Iterator[Path]:
    """Gives the name of a file to write, which takes the place of `path` when the block ends without an error.

    It lies beside `path`, or beside what a link at `path` leads to; folders are made. A pipe or device is written to as
    it stands.

    Raises:
        BadInput: it cannot be written; says why. `path` is as it was.
    """
    try:
        target = Path(path).expanduser()
        special = target.exists() and not target.is_file()
        file = target if special else target.resolve().with_name(f".{target.name}.tmp-{os.getpid()}")
    except (OSError, ValueError, RuntimeError, TypeError) as error:  # no name of a file at all, no such user
        raise BadInput(f"cannot write {path}: {error}") from error
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        yield file
        if not special:
            file.replace(target.resolve())
    except OSError as error:
        raise BadInput(f"cannot write {path}: {reason(error)}") from error
    finally:
        if not special:
            with suppress(OSError):
                file.unlink()


def replace_text(path: Path | str, text: str) -> None:
    """Write `text` to `path`. Raises `BadInput`, see `replacing`."""
    with replacing(path) as file:
        file.write_text(text, encoding="utf-8")


def replace_tensors(path: Path | str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write contiguous `tensors` to `path` as a safetensors file. Raises `BadInput`, see `replacing`."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with replacing(path) as file:
        try:
            save_file(dict(tensors), str(file), metadata=dict(metadata))
        except SafetensorError as error:  # its way to say what the system said
            raise OSError(str(error)) from error


def make_folder(path: Path) -> None:
    """Make the folder `path` and those above it. Raises `BadInput` when that cannot be."""
    try:
        path.expanduser().mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise BadInput(f"cannot make the folder {path}: {reason(error)}") from None


def make_room(path: Path) -> None:
    """Make the folder that the file `path` is to lie in, before anything takes long.

    Raises `BadInput` when that cannot be, or `path` is a folder.
    """
    make_folder(path.parent)
    if path.expanduser().is_dir():
        raise BadInput(f"{path} is a folder; name a file")


def reason(error: Exception) -> str:
    """What the system said, without the numbers and names around it."""
    if isinstance(error, FileExistsError | NotADirectoryError):
        return "there is a file where a folder is needed"
    return str(getattr(error, "strerror", None) or error)
