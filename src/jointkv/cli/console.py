"""What every verb shares: messages on stderr, one-line errors, JSON files."""

import dataclasses
import importlib.util
import json
import math
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.text import Text

from jointkv.errors import BadInput, JointKVError
from jointkv.system.files import replace_text

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
    # Names in a file may hold what a terminal takes for a command.
    line = "".join(sign if sign.isprintable() else "\N{REPLACEMENT CHARACTER}" for sign in " ".join(message.split()))
    stderr_console().print(Text(f"error: {line}", style="red"), soft_wrap=True)
    raise typer.Exit(code=FAILURE)


@contextmanager
def named_errors() -> Iterator[None]:
    """Turn a `JointKVError` or a missing optional package inside the block into `fail`.

    Anything else is a bug and keeps its traceback. SIGTERM ends the block in order, see `terminable`.
    """
    try:
        with terminable():
            yield
    except JointKVError as error:
        fail(str(error) or type(error).__name__)
    except ModuleNotFoundError as error:
        extra = EXTRAS.get((error.name or "").split(".")[0])
        if extra is None:
            raise
        fail(f"this needs the package {error.name}: pip install 'jointkv[{extra}]'")


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM inside the block removes what is half written and ends what was started, then exit code 143."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


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
    """Write `data` as JSON to `path`, see `write_result`; `-` means stdout.

    Dataclasses become objects and paths strings; NaN and infinities, which JSON lacks, become null.
    """
    write_result(path, json.dumps(_plain(data), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_result(path: Path | str, text: str) -> None:
    """Replace the file `path` by `text`; `-` means stdout.

    Raises `BadInput` when that cannot be. What took long to compute is then on stdout, so that it is not lost.
    """
    if str(path) != "-":
        try:
            replace_text(path, text)
            return
        except BadInput as error:
            _print(text)
            raise BadInput(f"{error}; it was printed instead") from error
    _print(text)


def _print(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


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
