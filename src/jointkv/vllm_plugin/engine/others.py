"""KV connectors beside the plugin's own, and why they are refused: each was read, none can be told that pages move."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

MULTI = "MultiConnector"
KEEPS_PAGES = "remembers the pages of running requests, and would store what others have written there since"
SENDS_PAGES = "gives pages to other engines, which take what approximates a text for that text"
STORES_FOR_ALL = "stores what a request reads for all who send its text, of whatever tenant"
REASONS = {
    **dict.fromkeys(("OffloadingConnector", "SimpleCPUOffloadConnector"), KEEPS_PAGES),
    **dict.fromkeys(("LMCacheConnectorV1", "LMCacheMPConnector"), KEEPS_PAGES),
    **dict.fromkeys(("NixlConnector", "NixlPullConnector", "NixlPushConnector"), SENDS_PAGES),
    "ExampleConnector": STORES_FOR_ALL,
}
"""By the name of the connector."""


def beside(name: str | None, options: Mapping[str, Any], ours: str) -> Iterator[str]:
    """The connectors that are not `ours`, and why each is refused.

    Args:
        name: vLLM's for the connector of the engine, which may be one of several.
        options: the connector's own.
    """
    if name == MULTI:
        for child in options.get("connectors", ()):
            yield from beside(child.get("kv_connector"), child.get("kv_connector_extra_config") or {}, ours)
    elif name not in (None, ours):
        yield f"{name}, which {REASONS.get(name, 'was never read')}"
