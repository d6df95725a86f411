"""Dialogues with assistants that call tools: the tool list is shared, the session line and the turns are not."""

import json
import random
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from jointkv.evaluate.jsonl import read_records
from jointkv.evaluate.samples import packaged
from jointkv.evaluate.traffic.base import Request, Tokenizer, Traffic, split_request
from jointkv.evaluate.traffic.near_prefix import session_line

# The dialogues come with one or two tools each; a deployed assistant offers a list, and calls one of it.
ASSISTANTS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "finance": (
            *("calculate_discount", "calculate_loan_payment", "calculate_tip"),
            *("convert_currency", "get_stock_price"),
        ),
        "leisure": ("search_recipes", "search_books", "get_movie_details", "search_restaurants", "play_music"),
        "office": ("send_email", "create_calendar_event", "create_todo", "create_note"),
        "everyday": (
            *("generate_qr_code", "generate_random_password", "calculate_age"),
            *("calculate_bmi", "calculate_distance", "convert_temperature"),
        ),
    }
)
_SPEAKERS = MappingProxyType(
    {"human": "User", "gpt": "Assistant", "function_call": "Tool call", "observation": "Tool result"}
)
_WRITTEN_BY_MODEL = ("Assistant", "Tool call")


@dataclass(frozen=True)
class Turn:
    """One message of a dialogue and who wrote it."""

    speaker: str
    text: str


@dataclass(frozen=True)
class Dialogue:
    """One dialogue, and the instructions of the assistant that holds it."""

    instructions: str
    turns: tuple[Turn, ...]

    def split_points(self) -> list[int]:
        """The turns that the model writes, where the dialogue can be cut: the last one first."""
        return [at for at in reversed(range(1, len(self.turns))) if self.turns[at].speaker in _WRITTEN_BY_MODEL]


def load_dialogues() -> list[Dialogue]:
    """The packaged dialogues, in the order of the file."""
    rows, tools = _rows(), load_tools()
    dialogues = []
    for number, row in enumerate(rows):
        called = {tool["name"] for tool in json.loads(row["tools"])}
        able = [name for name, offered in ASSISTANTS.items() if called <= set(offered)]
        # Talk that needs no tool could be any assistant's.
        assistant = able[number % len(able)]
        turns = tuple(Turn(_SPEAKERS[turn["from"]], turn["value"]) for turn in row["conversations"])
        dialogues.append(Dialogue(_instructions(assistant, tools), turns))
    return dialogues


def load_tools() -> dict[str, Any]:
    """The descriptions of all tools in the packaged dialogues by name, in the order of the file."""
    tools: dict[str, Any] = {}
    for row in _rows():
        for tool in json.loads(row["tools"]):
            tools.setdefault(tool["name"], tool)
    return tools


def load_more_tools() -> dict[str, Any]:
    """Descriptions of tools that no packaged dialogue calls, by name."""
    return {tool["name"]: tool for tool in _rows("tools_sample.jsonl")}


def _rows(file: str = "toolcall_sample.jsonl") -> list[Mapping[str, Any]]:
    return [record.fields for record in read_records(packaged(file))]


def _instructions(assistant: str, tools: Mapping[str, Any]) -> str:
    listed = "\n".join(json.dumps(tools[name], ensure_ascii=False) for name in ASSISTANTS[assistant])
    return f"You are the {assistant} assistant. Use these tools where they are required.\n{listed}"


class ToolDialogues(Traffic):
    """Each request is one dialogue up to an assistant's message, behind its own session and user."""

    name = "tool_dialogues"
    description = "system text of own session line and one of four tool lists, then the turns of an own dialogue"

    def instructions(self, dialogue: Dialogue, rng: random.Random) -> str:
        """Those that a request has."""
        return dialogue.instructions

    def draw(self, tokenizer: Tokenizer, count: int, continuation_tokens: int, rng: random.Random) -> Iterator[Request]:
        """Each dialogue is used once, cut as late as it can be.

        The continuation is the assistant's next message or tool call; one that is too short goes on with the turns
        behind it.
        """
        for dialogue in _by_turns(rng, load_dialogues()):
            session = rng.randrange(10**8)
            header = f"System: {session_line(session, rng)} User {rng.randrange(10**5):05d}."
            dialogue = replace(dialogue, instructions=self.instructions(dialogue, rng))
            request = _request(tokenizer, header, dialogue, continuation_tokens)
            if request is not None:
                yield request


def _by_turns(rng: random.Random, dialogues: Sequence[Dialogue]) -> list[Dialogue]:
    """The dialogues in random order, with the assistants taking turns as long as they have dialogues."""
    groups: dict[str, list[Dialogue]] = defaultdict(list)
    for dialogue in rng.sample(dialogues, len(dialogues)):
        groups[dialogue.instructions].append(dialogue)
    ranked = [(rank, dialogue) for group in groups.values() for rank, dialogue in enumerate(group)]
    return [dialogue for _, dialogue in sorted(ranked, key=lambda pair: pair[0])]


def _request(tokenizer: Tokenizer, header: str, dialogue: Dialogue, continuation_tokens: int) -> Request | None:
    for at in dialogue.split_points():
        earlier = "".join(f"\n{turn.speaker}: {turn.text}" for turn in dialogue.turns[:at])
        later = "".join(f"\n{turn.speaker}: {turn.text}" for turn in dialogue.turns[at + 1 :])
        prompt = f"{header}\n{dialogue.instructions}{earlier}\n{dialogue.turns[at].speaker}:"
        request = split_request(tokenizer, prompt, f" {dialogue.turns[at].text}{later}", continuation_tokens)
        if request is not None:
            return request
    return None
