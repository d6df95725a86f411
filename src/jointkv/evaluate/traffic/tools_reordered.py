"""Tool dialogues whose tools come in another order for every session, as servers that keep them in sets send them."""

import random

from jointkv.evaluate.traffic.tool_dialogues import Dialogue, ToolDialogues


class ToolsReordered(ToolDialogues):
    """Requests as in `ToolDialogues`, in which every tool may stand at another position."""

    name = "tools_reordered"
    description = "own session line, one of four tool lists in random order, then the turns of an own dialogue"

    def instructions(self, dialogue: Dialogue, rng: random.Random) -> str:
        """The tools in random order."""
        first, *tools = dialogue.instructions.split("\n")
        return "\n".join((first, *rng.sample(tools, len(tools))))
