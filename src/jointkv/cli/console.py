"""What every verb shares: messages on stderr, one-line errors, JSON files."""

import dataclasses
import importlib.util
import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.text import Text

from jointkv.errors import BadInput, JointKVError
from jointkv.files import replace_text

if TYPE_CHECKING:
    from rich.progress import Progress

FAILURE = 2
EXTRAS = {"transformers": "hf", "gguf": "hf", "matplotlib": "plot", "jinja2": "plot", "vllm": "vllm"}


def stderr_console() -> Console:
    """A console on the present stderr, for progress and messages; stdout stays free for results.

    It keeps the stream it was made with, so a library that redirects `sys.stderr` does not silence it.
    """
    return Console(file=sys.stderr)


def fail(message: str) -> NoReturn:
    """Print `message` as one red line on stderr and end the command with exit code 2."""
    line = " ".join(message.split())
    stderr_console().print(Text(f"error: {line}", style="red"), soft_wrap=True)
    raise typer.Exit(code=FAILURE)


@contextmanager
def named_errors() -> Iterator[None]:
    """Turn a `JointKVError` or a missing optional package inside the block into `fail`.

    Anything else is a bug and keeps its traceback.
    """
    try:
        yield
    except JointKVError as error:
        fail(str(error) or type(error).__name__)
    except ModuleNotFoundError as error:
        extra = EXTRAS.get((error.name or "").split(".")[0])
        if extra is None:
            raise
        fail(f"this needs the package {error.name}: pip install 'jointkv[{extra}]'")


def require(package: str) -> None:
    """Raises ModuleNotFoundError, which `named_errors` explains, unless `package` is installed. Imports nothing."""
    if importlib.util.find_spec(package) is None:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)


class Steps:
    """Progress through a known number of steps: a bar on a terminal, else one line per step. See `progress`."""

    def __init__(self, console: Console, bar: "Progress | None", total: int) -> None:
        self._console, self._bar, self._done = console, bar, -1
        self._task = None if bar is None else bar.add_task("", total=total)

    def start(self, description: str) -> None:
        """The step before is done; the one described begins."""
        self._done += 1
        if self._bar is None or self._task is None:
            self.say(description)
        else:
            self._bar.update(self._task, completed=self._done, description=escape(description))

    def part(self, fraction: float) -> None:
        """Of the present step `fraction` is done; shown on the bar only."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self._done + fraction)

    def say(self, line: str) -> None:
        """Print a line that stays."""
        self._console.print(Text(line), soft_wrap=True)


@contextmanager
def progress(total: int) -> Iterator[Steps]:
    """Show `total` steps on stderr; the bar is removed at the end."""
    console = stderr_console()
    if not console.is_terminal:
        yield Steps(console, None, total)
        return
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        yield Steps(console, bar, total)


@contextmanager
def stages(first: str) -> Iterator[Any]:
    """Show what is being done; yields `show(stage)`. A spinner on a terminal, else one line per stage."""
    console = stderr_console()
    if console.is_terminal:
        with console.status(Text(first)) as status:
            yield lambda stage: status.update(Text(stage))
    else:
        yield lambda stage: console.print(Text(stage), soft_wrap=True)


def write_json(path: Path | str, data: Any) -> None:
    """Write `data` as JSON to `path` in one step (temporary file, then replace); `-` means stdout.

    Dataclasses become objects and paths strings; NaN and infinities, which JSON lacks, become null.
    Raises `BadInput` when the file cannot be written.
    """
    text = json.dumps(_plain(data), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    if str(path) == "-":
        sys.stdout.write(text)
        sys.stdout.flush()
        return
    target = Path(path).expanduser()
    try:
        if target.exists() and not target.is_file():
            # A pipe or /dev/stdout must be written to, not replaced; a folder refuses.
            target.write_text(text, encoding="utf-8")
            return
        replace_text(target.resolve(), text)
    except OSError as error:
        raise BadInput(f"cannot write {path}: {error.strerror or error}") from error


def make_folder(path: Path) -> None:
    """Make the folder `path` and those above it. Raises `BadInput` when that cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"cannot make the folder {path}: {error.strerror or error}") from None


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
