"""Options of the plugin as a user gives them on a command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jointkv.errors import BadInput


def fusion_options(pairs: Sequence[str], given: Mapping[str, Any], flag: str, reuse: str = "off") -> dict[str, Any]:
    """`given`, where None stands for "not given", and the `KEY=VALUE` of `pairs`, checked by `PluginSettings`.

    Values of pairs are JSON, or else text.

    Args:
        flag: what the pairs were given with, for messages.
        reuse: what the command takes where it is not among the options; they are checked beside it.

    Raises:
        BadInput: a pair without `=`, an option that is there twice, or one that the plugin refuses.
        InvalidPolicy: thresholds that make no sense together.
    """
    from jointkv.vllm_plugin.settings import PluginSettings, read_value

    options = {name: value for name, value in given.items() if value is not None}
    for pair in pairs:
        name, separator, text = pair.partition("=")
        if not separator:
            raise BadInput(f"{flag} {pair}: expected KEY=VALUE")
        if name in options:
            raise BadInput(f"the option {name} is given twice")
        options[name] = read_value(text)
    PluginSettings.parse({"reuse": reuse, **options})
    return options


def bound(text: str | None) -> Any:
    """An error bound: one number, or `0.1,0.2,0.3` for as many layer groups. None stays None."""
    from jointkv.vllm_plugin.settings import read_value

    if text is None:
        return None
    return [read_value(part) for part in text.split(",")] if "," in text else read_value(text)
