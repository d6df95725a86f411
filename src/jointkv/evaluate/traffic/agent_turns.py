"""Agents that send tools and the whole history with every turn, and what people do to the heads of such prompts."""

import heapq
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from types import MappingProxyType

from jointkv.errors import BadInput
from jointkv.evaluate.traffic.base import Course, Request, Tokenizer, Traffic, split_request
from jointkv.evaluate.traffic.tool_dialogues import Dialogue, Turn, load_dialogues, load_more_tools, load_tools

RULES = (
    "You are an assistant with tools. To use one, answer with nothing but its name and arguments as JSON; its result "
    "comes back as the next message. Ask when something is missing, and never make a result up.\nTools:"
)
END = "Answer in one or two sentences unless you are asked for more."
ROLES = MappingProxyType({"User": "user", "Assistant": "assistant", "Tool call": "assistant", "Tool result": "user"})
FEWEST_TURNS = 2
"""Of the model in a dialogue: with one there is no history."""
TENANTS = 2
TURNS_EXPECTED = 4
"""Turns that a session has on average, by which it is told how many are open at a time."""
ANSWER_SECONDS, THINK_SECONDS, LONGEST_THOUGHT = 2.0, 4.0, 30.0
BEGIN = datetime(2026, 3, 2, 9)

Answers = tuple[str, ...]


class AgentTurns(Traffic):
    """Sessions of several turns, interleaved, each turn with the tools and the whole history again.

    Dialogues and tools are the packaged real ones; all tools stand in every system prompt. The history holds the true
    answers of the dialogue. Thoughts are made from what they precede.

    Args:
        change: `nothing`: prefixes are exact. `nonce`: number and clock of the request in the first line. `clock`: a
            clock amid the tools. `tools`: in another order in every session. `thoughts`: only the last answer in the
            history has the thought that preceded it.
        many: 40 tools instead of the 20 that the dialogues may call.
    """

    CHANGES = MappingProxyType(
        {
            "nothing": "nothing else changes between turns",
            "nonce": "number and clock of the request in the first line",
            "clock": "a clock amid the tools",
            "tools": "the tools in another order in every session",
            "thoughts": "thoughts that are taken out of all but the last answer",
        }
    )

    def __init__(self, change: str, many: bool = False) -> None:
        if change not in self.CHANGES:
            raise BadInput(f"change must be one of {', '.join(self.CHANGES)}, got {change!r}")
        self._change = change
        self._many = many
        self.name = "_".join(("agent_turns", *([change] * (change != "nothing")), *(["many"] * many)))
        tools = "40" if many else "20"
        self.description = f"turns of tool dialogues, each with {tools} tools and all before it; {self.CHANGES[change]}"

    def draw(self, tokenizer: Tokenizer, count: int, continuation_tokens: int, rng: random.Random) -> Iterator[Request]:
        """Each dialogue is a session; about a quarter as many as there are requests are open at a time."""
        dialogues = [each for each in load_dialogues() if len(each.split_points()) >= FEWEST_TURNS]
        waiting, made = list(enumerate(rng.sample(dialogues, len(dialogues)))), set[tuple[int, ...]]()
        waiting.reverse()
        open_at_once = max(2, min(len(waiting), count // TURNS_EXPECTED))
        line = [_Session(*waiting.pop(), self._tools(rng), rng.uniform(0, THINK_SECONDS)) for _ in range(open_at_once)]
        heapq.heapify(line)
        first = line[0].seconds
        while line:
            session = heapq.heappop(line)
            request = self._request(tokenizer, session, first, continuation_tokens, rng)
            if request is not None and request.prompt not in made:
                made.add(request.prompt)
                yield request
            session.answered(rng)
            if session.turns:
                heapq.heappush(line, session)
            elif waiting:
                heapq.heappush(line, _Session(*waiting.pop(), self._tools(rng), session.seconds))

    def _tools(self, rng: random.Random) -> list[str]:
        described = load_tools() | (load_more_tools() if self._many else {})
        tools = [json.dumps(tool, ensure_ascii=False) for tool in described.values()]
        return rng.sample(tools, len(tools)) if self._change == "tools" else tools

    def _request(
        self, tokenizer: Tokenizer, session: "_Session", first: float, continuation_tokens: int, rng: random.Random
    ) -> Request | None:
        at = session.turns[0]
        history = self._history(session.dialogue.turns[:at])
        later = "".join(f"\n{turn.speaker}: {turn.text}" for turn in session.dialogue.turns[at + 1 :])
        system = self._system(session, rng)
        said = "".join(f"\n{turn.speaker}: {turn.text}" for turn in history)
        answer = session.dialogue.turns[at]
        prompt = f"System: {system}{said}\n{answer.speaker}:"
        request = split_request(tokenizer, prompt, f" {answer.text}{later}", continuation_tokens)
        if request is None:
            return None
        messages = (("system", system), *((ROLES[turn.speaker], turn.text) for turn in history))
        tenant = f"tenant-{session.number % TENANTS}"
        return replace(request, course=Course(session.number, tenant, session.seconds - first, session.think, messages))

    def _system(self, session: "_Session", rng: random.Random) -> str:
        clock = (BEGIN + timedelta(seconds=int(session.seconds))).isoformat(" ")
        lines = [RULES, *session.tools, END]
        if self._change == "nonce":
            lines.insert(0, f"Request {rng.randrange(10**11, 10**12)}, {clock}.")
        elif self._change == "clock":
            lines.insert(1 + len(session.tools) // 2, f"The time is {clock}.")
        return "\n".join(lines)

    def _history(self, turns: Sequence[Turn]) -> list[Turn]:
        if self._change != "thoughts":
            return list(turns)
        answers = [place for place, turn in enumerate(turns) if ROLES[turn.speaker] == "assistant"]
        return [
            replace(turn, text=f"{_thought(turns[place - 1], turn)}{turn.text}") if [place] == answers[-1:] else turn
            for place, turn in enumerate(turns)
        ]


class _Session:
    """One dialogue as far as it has come; the earliest of several is the smallest."""

    def __init__(self, number: int, dialogue: Dialogue, tools: list[str], seconds: float) -> None:
        self.number, self.dialogue, self.tools, self.seconds, self.think = number, dialogue, tools, seconds, 0.0
        self.turns = dialogue.split_points()[::-1]

    def answered(self, rng: random.Random) -> None:
        """The turn is over; the next one comes after a thought."""
        del self.turns[0]
        self.think = round(min(rng.expovariate(1 / THINK_SECONDS), LONGEST_THOUGHT), 2)
        self.seconds += ANSWER_SECONDS + self.think

    def __lt__(self, other: "_Session") -> bool:
        return (self.seconds, self.number) < (other.seconds, other.number)


def _thought(asked: Turn, answer: Turn) -> str:
    """What a model might have thought between the two."""
    what = "I have what I need and can answer" if answer.speaker == "Assistant" else "a tool is required for this"
    return f'<think>The last message says: "{asked.text[:160]}" So {what}.</think>\n'
