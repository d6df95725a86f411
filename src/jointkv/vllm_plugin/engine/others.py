"""KV connectors beside the plugin's own: where ours is found among several, and which others may stand there.

Each was read. None can be told that pages move, so those that remember pages of running requests are refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jointkv.vllm_plugin import CONNECTOR_MODULE
from jointkv.vllm_plugin.settings import PluginSettings

MULTI = "MultiConnector"
KEEPS_PAGES = "remembers the pages of running requests, and would store what others have written there since"
SENDS_PAGES = "gives pages to other engines, which take what approximates a text for that text"
REASONS = {
    **dict.fromkeys(("OffloadingConnector", "SimpleCPUOffloadConnector"), KEEPS_PAGES),
    **dict.fromkeys(("LMCacheConnectorV1", "LMCacheMPConnector"), KEEPS_PAGES),
    **dict.fromkeys(("NixlConnector", "NixlPullConnector", "NixlPushConnector"), SENDS_PAGES),
}
"""Why others are refused, by their name."""

WELCOME = ("ExampleConnector",)
"""Stores pages in the step in which their request starts, when all of them hold what their text stands for."""

STORES_FOR_ALL = "other connectors store what a request starts with for all who send its text"


class Standing(NamedTuple):
    """A connector of an engine as it was asked for: its name, the module that it is from, and its options."""

    name: str
    module: str | None
    options: Mapping[str, Any]

    @property
    def is_ours(self) -> bool:
        """Whether it is the plugin's."""
        return self.module == CONNECTOR_MODULE


def connectors(transfer: Any) -> list[Standing]:
    """All that `transfer`, vLLM's `KVTransferConfig` or None, asks for, without those that are several."""
    if transfer is None:
        return []
    return list(_standing(transfer.kv_connector, transfer.kv_connector_module_path, transfer.kv_connector_extra_config))


def refused(found: Sequence[Standing]) -> str:
    """Those of `found` that may not stand beside the plugin's connector, and why; empty where all may."""
    return "; ".join(
        f"{each.name}, which {REASONS.get(each.name, 'was never read')}"
        for each in found
        if not each.is_ours and (each.name not in WELCOME or each.module)
    )


def ours(connector: Any) -> Any:
    """The plugin's connector, which is `connector` or one of those that it is made of; None if it is not there."""
    if isinstance(getattr(connector, "settings", None), PluginSettings):
        return connector
    return next(filter(None, map(ours, getattr(connector, "sub_connectors", ()))), None)


def _standing(name: str | None, module: str | None, options: Mapping[str, Any]) -> Iterator[Standing]:
    if name != MULTI:
        if name is not None:
            yield Standing(name, module, options)
        return
    for child in options.get("connectors", ()):
        more = child.get("kv_connector_extra_config") or {}
        yield from _standing(child.get("kv_connector"), child.get("kv_connector_module_path"), more)
