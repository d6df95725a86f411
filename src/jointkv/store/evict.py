"""Removing whole segments, those longest unread first."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from jointkv.store.segments import DATA, JOURNAL, TABLE, lock_file

SUFFIXES = (DATA, TABLE, JOURNAL)
"""Data first: a segment without an index has its records looked for, an index without a segment is nothing."""


def sizes(folder: Path) -> dict[str, tuple[float, int]]:
    """When each segment was last used, and the bytes of its files."""
    found: dict[str, tuple[float, int]] = {}
    for entry in os.scandir(folder):
        name, suffix = Path(entry.name).stem, Path(entry.name).suffix
        if suffix not in SUFFIXES or name.startswith("."):
            continue
        with suppress(FileNotFoundError):
            status = entry.stat()
            used, size = found.get(name, (0.0, 0))
            found[name] = (status.st_mtime if suffix == DATA else used, size + status.st_size)
    return found


def evict(folder: Path, max_bytes: int) -> int:
    """Remove segments that nobody writes until the others fit into `max_bytes`; the bytes removed."""
    segments = sizes(folder)
    left = sum(size for _, size in segments.values())
    removed = 0
    for name, (_, size) in sorted(segments.items(), key=lambda item: item[1][0]):
        if left - removed <= max_bytes:
            break
        if remove(folder, name):
            removed += size
    return removed


def remove(folder: Path, name: str) -> bool:
    """Remove a segment unless somebody writes it. Readers that have it open read on."""
    try:
        held = lock_file(folder / f"{name}{DATA}")
    except FileNotFoundError:
        held = -1  # another process is removing it
    if held is None:
        return False
    try:
        for suffix in SUFFIXES:
            (folder / f"{name}{suffix}").unlink(missing_ok=True)
    finally:
        if held >= 0:
            os.close(held)
    return True
