"""What a store did while requests were served, from the plugin's counters."""

from __future__ import annotations

from collections.abc import Mapping

from jointkv.bench.record import Record


class Stored(Record):
    """Counted from the beginning to the end of a run; what had filled the store before is no part of it.

    Attributes:
        tokens_loaded: of prompts, that were to be loaded instead of computed.
        pages_read, bytes_read: from the store.
        pages_lost: that were to be read and were computed.
        pages_written, bytes_written: to the store.
        pages_dropped: that were to be written and were not.
    """

    tokens_loaded: int
    pages_read: int
    bytes_read: int
    pages_lost: int
    pages_written: int
    bytes_written: int
    pages_dropped: int


def stored_of(options: Mapping[str, object] | None, counters: Mapping[str, float] | None) -> Stored | None:
    """What the `counters` of an arm with these `options` say; None where it has no store."""
    if counters is None or (options or {}).get("store") is None:
        return None
    return Stored(**{field: round(counters[f"store_{field}"]) for field in Stored.model_fields})
