"""Rows of a user's requests, wherever they lie: JSON by line or in one array, plain text, Parquet, the hub."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jointkv.errors import BadInput
from jointkv.evaluate.datasets.hub import Hub, HubUnavailable, fetch_records
from jointkv.evaluate.json_array import Broken, array_items
from jointkv.evaluate.jsonl import parse_object, read_lines
from jointkv.system.settings import Settings

HUB = "hub:"
_BOM = b"\xef\xbb\xbf"
_EXTRA = "install 'jointkv[eval]'"


@dataclass(frozen=True)
class Place:
    """Where something stands: a `line` or `row`, counted from 1, or an `item` of an array, from 0."""

    source: str
    kind: str
    number: int

    def __str__(self) -> str:
        """Such as `requests.jsonl:3` or `talks.json: item 3`."""
        return f"{self.source}:{self.number}" if self.kind == "line" else f"{self.source}: {self.within}"

    @property
    def within(self) -> str:
        """Without the source, such as `line 3`."""
        return f"{self.kind} {self.number}"


@dataclass(frozen=True)
class Entry:
    """One entry of a source, not looked into yet: a line of JSON, `content` that is a row already, or `Broken`."""

    place: Place
    content: Any

    def fields(self) -> Mapping[str, Any]:
        """Its fields. Raises `BadInput` when it is no object."""
        if isinstance(self.content, Broken):
            raise BadInput(self.content.reason)
        if isinstance(self.content, bytes):
            return parse_object(self.content)
        if not isinstance(self.content, Mapping):
            raise BadInput("an object with fields expected")
        return self.content


def entries(source: str | Path, count: int | None = None) -> Iterator[Entry]:
    """The entries of `source`, in order; of the hub only the first `count` (None: all) are asked for.

    - `*.txt`: every line is a prompt;
    - `*.parquet`: every row is an entry;
    - `hub:OWNER/NAME`, with `:SPLIT` (else `train`) or `:CONFIG:SPLIT` after it: rows of a data set;
    - any other file: JSON, an object on every line, or one array of objects.

    Nothing is read whole, however large it is. Raises `BadInput` for a source that cannot be read.
    """
    name = str(source)
    if name.startswith(HUB):
        kind, found = "row", _hub_rows(name, count)
    elif name.endswith(".parquet"):
        kind, found = "row", _parquet_rows(Path(source))
    elif name.endswith(".txt"):
        kind, found = "line", _prompts(Path(source))
    elif _is_array(Path(source)):
        kind, found = "item", _items(Path(source))
    else:
        kind, found = "line", read_lines(source)
    for number, content in found:
        yield Entry(Place(name, kind, number), content)


def _is_array(path: Path) -> bool:
    _, first = next(read_lines(path), (0, b""))
    return first.removeprefix(_BOM).lstrip().startswith(b"[")


def _items(path: Path) -> Iterator[tuple[int, Any]]:
    number = -1
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, item in enumerate(array_items(file)):
                yield number, item
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        yield number + 1, Broken(f"not JSON: {error}")


def _prompts(path: Path) -> Iterator[tuple[int, Any]]:
    for number, line in read_lines(path):
        try:
            yield number, {"prompt": line.decode("utf-8-sig").rstrip("\r\n")}
        except UnicodeDecodeError as error:
            raise BadInput(f"{path}:{number}: not UTF-8 at byte {error.start + 1} of the line") from None


def _parquet_rows(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise BadInput(f"{path}: Parquet needs the package 'pyarrow'; {_EXTRA}") from None
    try:
        with parquet.ParquetFile(path) as file:
            yield from enumerate((row for batch in file.iter_batches(1024) for row in batch.to_pylist()), start=1)
    except (OSError, ValueError) as error:  # pyarrow's own errors are among these
        raise BadInput(f"{path}: cannot be read as Parquet: {str(error).splitlines()[0]}") from None


def _hub_rows(name: str, count: int | None) -> Iterator[tuple[int, Any]]:
    repository, *rest = name.removeprefix(HUB).split(":")
    if not 0 < repository.count("/") < 2 or len(rest) > 2 or not all((*repository.split("/"), *rest)):
        raise BadInput(f"{name}: no data set of the hub; give {HUB}OWNER/NAME, with :SPLIT or :CONFIG:SPLIT after it")
    *config, split = rest or ["train"]
    hub = Hub(repository, config[0] if config else None, split)
    try:
        yield from enumerate(
            fetch_records(hub, count, lambda _: True, offline=Settings.from_environment().hf_hub_offline), 1
        )
    except HubUnavailable as error:
        raise BadInput(f"{name}: {error}; download a file of it, or {_EXTRA} where the hub can be reached") from None
