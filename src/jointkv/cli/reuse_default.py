"""Whether `jointkv serve` reuses where nobody has said: only a user who asks for it is refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jointkv.errors import BadInput

if TYPE_CHECKING:
    from jointkv.vllm_plugin.settings import PluginSettings

DEFAULT = "auto"
ASKED = "licensed"  # where another option is given that is about reuse
# Written with any prefix that is still unique, and perhaps with underscores.
FLAGS = {
    "--no-enable-pre": "reuse finds pages by vLLM's prefix cache",
    "--scheduler-c": "reuse has a scheduler class of its own",
}
"""Flags of vLLM that leave no room for reuse, by how they begin, and why."""

ONLY_EQUAL = "within a bound of 0 are only equal blocks, and which are equal is known when both are computed"


def with_reuse(options: Mapping[str, Any], arguments: Sequence[str]) -> tuple[dict[str, Any], str | None]:
    """`options` with reuse as `serve` has it by default; and why it is left off, where it is.

    Args:
        options: of `PluginSettings`, already checked.
        arguments: what goes to vLLM.

    Raises:
        BadInput: what was asked for by name does not go with the rest.
    """
    from jointkv.vllm_plugin.settings import PluginSettings

    settings = PluginSettings.parse({"reuse": DEFAULT, **options})
    about = settings.moved or any(name.startswith("reuse") for name in options)
    asked = about and options.get("reuse") != DEFAULT
    wanted = {"reuse": ASKED if asked else DEFAULT, **options}
    if asked:
        PluginSettings.parse(wanted)
    if not settings.enabled or wanted["reuse"] == "off":
        return (wanted if asked else dict(options)), None
    flag = _obstacle_in(arguments)
    if asked and flag is not None:
        raise BadInput(f"{flag}, or set --reuse off")
    if asked and settings.only_equal:
        raise BadInput(f"{ONLY_EQUAL}; raise the bound, or set --reuse off")
    reason = None if asked else _reason(settings) or flag
    return (wanted, None) if reason is None else (dict(options), reason)


def _reason(settings: PluginSettings) -> str | None:
    if settings.reuse_obstacle is not None:
        return f"it does not go with {settings.reuse_obstacle}"
    if settings.only_equal:
        return ONLY_EQUAL
    return None


def _obstacle_in(arguments: Sequence[str]) -> str | None:
    for argument in arguments:
        for start, reason in FLAGS.items():
            if argument.replace("_", "-").startswith(start):
                return f"{reason}; leave {argument} out"
    return None
