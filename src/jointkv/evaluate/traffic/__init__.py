"""Kinds of traffic to evaluate fusion on, by name."""

from jointkv.evaluate.named import find
from jointkv.evaluate.traffic.agent_turns import AgentTurns
from jointkv.evaluate.traffic.base import Course, Request, Tokenizer, Traffic
from jointkv.evaluate.traffic.edited_document import EditedDocument
from jointkv.evaluate.traffic.from_dataset import PREFIX, DatasetTraffic
from jointkv.evaluate.traffic.long_documents import LongDocuments
from jointkv.evaluate.traffic.museum import Museum
from jointkv.evaluate.traffic.names import Names
from jointkv.evaluate.traffic.near_prefix import NearPrefix
from jointkv.evaluate.traffic.random_tokens import RandomTokens
from jointkv.evaluate.traffic.retrieval import Retrieval
from jointkv.evaluate.traffic.shuffled_examples import ShuffledExamples
from jointkv.evaluate.traffic.tool_dialogues import ToolDialogues
from jointkv.evaluate.traffic.tools_reordered import ToolsReordered
from jointkv.evaluate.traffic.unrelated import Unrelated

__all__ = [
    "Course",
    "DatasetTraffic",
    "LongDocuments",
    "Request",
    "Tokenizer",
    "Traffic",
    "get_traffic",
    "traffic_names",
]

_TRAFFICS: tuple[Traffic, ...] = (
    NearPrefix(),
    Names(),
    ShuffledExamples(),
    ToolDialogues(),
    ToolsReordered(),
    *(AgentTurns(change) for change in AgentTurns.CHANGES),
    *(AgentTurns(change, many=True) for change in ("nothing", "nonce")),
    EditedDocument(),
    Museum(),
    Retrieval(),
    LongDocuments(),
    Unrelated(),
    RandomTokens(),
)


def traffic_names() -> tuple[str, ...]:
    """The names that `get_traffic` knows, in the order of reports."""
    return tuple(traffic.name for traffic in _TRAFFICS)


def get_traffic(name: str) -> Traffic:
    """The traffic called `name`, or `dataset:` and the name of a data set.

    Raises `BadInput` for an unknown name.
    """
    if name.startswith(PREFIX):
        return DatasetTraffic(name.removeprefix(PREFIX))
    return find("traffic", _TRAFFICS, name, f", {PREFIX}NAME")
