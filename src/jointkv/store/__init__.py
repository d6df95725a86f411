"""A folder of pages that engines share, restarts find again, and crashes do not tear."""

from jointkv.store.care import Collected, Segment, Verified, collect, list_segments, verify
from jointkv.store.folder import Store
from jointkv.store.names import Names
from jointkv.store.pages import PageStore, Put
from jointkv.store.records import Record
from jointkv.store.wire import Fetched, fetch, serve

__all__ = [
    "Collected",
    "Fetched",
    "Names",
    "PageStore",
    "Put",
    "Record",
    "Segment",
    "Store",
    "Verified",
    "collect",
    "fetch",
    "list_segments",
    "serve",
    "verify",
]
