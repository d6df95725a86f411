"""`jointkv store`: what is in a store of pages, whether it is whole, and making room."""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jointkv.cli.console import FAILURE, Cell, cells, named_errors, print_table, stages, write_json
from jointkv.cli.options import Json
from jointkv.errors import BadInput
from jointkv.system.files import reason

if TYPE_CHECKING:
    from jointkv.store import Segment, Store

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The store's folder.")]
Secret = Annotated[Path | None, typer.Option(help="File with the store's secret, where it is not in the folder.")]
COLUMNS: dict[str, Cell] = {
    "segment": "{row.name}",
    "state": lambda row: "written" if row.written else "closed",
    "pages": "{row.records}",
    "bytes": "{row.nbytes}",
    "idle s": "{row.idle_s:.0f}",
    "codecs": lambda row: ", ".join(f"{count} {name}" for name, count in row.codecs.items()),
}


@named_errors()
def ls(folder: Folder, secret: Secret = None, json: Json = None) -> None:
    """List the segments of a store, those used last first."""
    segments = _segments(folder, secret)
    write_json(json, {"store": folder, "segments": segments})
    if json != "-":
        print_table(f"{folder}: {len(segments)} segments", COLUMNS, [cells(COLUMNS, row) for row in segments])


@named_errors()
def stat(folder: Folder, secret: Secret = None, json: Json = None) -> None:
    """Say how many pages a store has, and how large it is."""
    segments = _segments(folder, secret)
    codecs: Counter[str] = Counter()
    for segment in segments:
        codecs.update(segment.codecs)
    pages, nbytes = sum(codecs.values()), sum(segment.nbytes for segment in segments)
    found = {"store": folder, "segments": len(segments), "pages": pages, "bytes": nbytes, "codecs": dict(codecs)}
    found["bytes_per_page"] = round(nbytes / pages, 1) if pages else None
    found["written_segments"] = sum(segment.written for segment in segments)
    write_json(json, found)
    if json != "-":
        mixed = ", ".join(f"{count} {name}" for name, count in codecs.most_common()) or "none"
        typer.echo(f"{pages} pages ({mixed}) in {len(segments)} segments, {nbytes} bytes")


@named_errors()
def verify(folder: Folder, secret: Secret = None, json: Json = None) -> None:
    """Read every byte of a store and check every page.

    Exit code 2: something that was written is damaged.
    """
    from jointkv.store import verify as verified

    store = _open(folder, secret)
    with stages(f"reading {folder}"):
        found = verified(store.segments, store.secret)
    write_json(json, {"store": folder, "sound": found.sound, **vars(found)})
    if json != "-":
        typer.echo(f"{found.records} whole pages in {found.segments} segments, {found.nbytes} bytes")
        for what, count in _faults(found.damaged, found.torn, found.unindexed, found.misleading, found.dangling):
            typer.echo(f"{count} {what}")
    if not found.sound:
        typer.echo("damaged: what is not whole is computed again; `jointkv store gc` drops it", err=True)
        raise typer.Exit(code=FAILURE)


@named_errors()
def gc(
    folder: Folder,
    max_bytes: int | None = typer.Option(None, min=1, help="Evict segments, those longest unread first, down to this."),
    secret: Secret = None,
    json: Json = None,
) -> None:
    """Drop what is damaged, double or useless, and make room.

    What dead writers left is finished. Engines may go on meanwhile.
    """
    from jointkv.store import collect

    store = _open(folder, secret)
    with stages(f"cleaning up {folder}"):
        done = collect(store.segments, store.secret, max_bytes)
    write_json(json, {"store": folder, **vars(done)})
    if json != "-":
        typer.echo(f"closed {done.closed} segments, dropped {done.dropped} pages, freed {done.freed_bytes} bytes")


def register(app: typer.Typer) -> None:
    """Add the verb `store` to `app`."""
    group = typer.Typer(no_args_is_help=True, help="Look after a folder of stored KV pages.")
    for verb in (ls, stat, verify, gc):
        group.command()(verb)
    app.add_typer(group, name="store")


def _open(folder: Path, secret: Path | None) -> "Store":
    from jointkv.store import Store

    try:
        given = None if secret is None else secret.read_bytes()
    except (OSError, ValueError) as error:
        raise BadInput(f"cannot read the secret {secret}: {reason(error)}") from None
    return Store(folder, write=False, secret=given)


def _segments(folder: Path, secret: Path | None) -> "list[Segment]":
    from jointkv.store import list_segments

    return list_segments(_open(folder, secret).segments)


def _faults(
    damaged: list[str], torn: list[str], unindexed: int, misleading: int, dangling: int
) -> list[tuple[str, int]]:
    found = {
        f"places are damaged: {', '.join(damaged[:5])}": len(damaged),
        "segments end in the middle of a page, as a crash leaves them": len(torn),
        "whole pages are not in an index": unindexed,
        "entries of indexes lead nowhere": misleading,
        "pages that others need are not there": dangling,
    }
    return [(what, count) for what, count in found.items() if count]
