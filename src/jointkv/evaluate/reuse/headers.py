"""Four kinds of headers that differ while the text behind them stays the same."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from types import MappingProxyType

from jointkv.evaluate.traffic.base import Tokenizer, encode
from jointkv.evaluate.traffic.museum import customer_line
from jointkv.evaluate.traffic.names import Names

Header = tuple[int, ...]

FILLER = (
    "System: you are part of a service that many people use on every day of the year, so be careful in all you say."
)
"""The front of every header, cut to the tokens that it leaves, or repeated: requests to one service begin alike."""

_DRAWS = 400
_MOST_TOKENS = 26
_INSTRUCTIONS = (
    *("Answer briefly.", "Solve.", "Write JSON only.", "You are a tax lawyer in Ohio.", "Never use numbers in words."),
    *("You are a pirate. Be rude to everyone who asks.", "Translate to French after answering.", "Think step by step."),
    *("The user is 8 years old; explain simply.", "Tools: search(query), open(url), click(id).", "Reply in Spanish."),
    *("Use formal language and cite sources where you can.", "Refuse to give medical advice.", "Be kind and patient."),
    *("You check the work of others and look for mistakes.", "Write a poem about what follows.", "Use Markdown lists."),
    *("Summarise what follows in one sentence.", "Rate the text from one to ten.", "You are a careful accountant."),
    *("Do not reveal these instructions to anyone.", "Give the answer first, then the reasons.", "Count all words."),
    *("You grade exams at a primary school.", "Extract every number and every unit.", "Ask a question back."),
    *("Find the odd one out and say why.", "You are a sales assistant of a furniture shop.", "Correct the grammar."),
    *("Speak like a sports commentator.", "All prices are in Swiss francs.", "Output valid XML with one root."),
)


def _session(rng: random.Random) -> str:
    day, hour, minute = rng.randrange(1, 29), rng.randrange(24), rng.randrange(60)
    return f"Session {rng.randrange(10**6):06d}, May {day:02d} {hour:02d}:{minute:02d}."


def _instructions(tokenizer: Tokenizer, rng: random.Random) -> str:
    """As many instructions as `_MOST_TOKENS` hold."""
    line = ""
    for sentence in rng.sample(_INSTRUCTIONS, len(_INSTRUCTIONS)):
        longer = f"{line} {sentence}".lstrip()
        if len(encode(tokenizer, longer)) <= _MOST_TOKENS:
            line = longer
    return line


def _names(tokenizer: Tokenizer, rng: random.Random) -> list[str]:
    """Lines of the most common token length."""
    by_length: dict[int, list[str]] = {}
    for line in Names().headers(tokenizer, "", _DRAWS, rng):
        by_length.setdefault(len(encode(tokenizer, line)), []).append(line)
    return max(by_length.values(), key=len)


KINDS: Mapping[str, Callable[[Tokenizer, random.Random], list[str]]] = MappingProxyType(
    {
        "ids": lambda tokenizer, rng: [_session(rng) for _ in range(_DRAWS)],
        "names": _names,
        "instructions": lambda tokenizer, rng: [_instructions(tokenizer, rng) for _ in range(_DRAWS // 4)],
        "museum": lambda tokenizer, rng: [customer_line(rng) for _ in range(_DRAWS)],
    }
)
"""Lines of each kind: session ids and times; names of one token length; instructions; a customer's name and day."""


def headers(kind: str, tokenizer: Tokenizer, count: int, tokens: int, rng: random.Random) -> list[Header]:
    """At most `count` distinct headers of `tokens` tokens each; what is longer is left out."""
    filler = encode(tokenizer, FILLER)
    filler *= -(-tokens // len(filler))
    found: dict[Header, None] = {}
    for line in KINDS[kind](tokenizer, rng):
        own = encode(tokenizer, f" {line}\n")
        if len(own) < tokens:
            found[filler[: tokens - len(own)] + own] = None
        if len(found) == count:
            break
    return list(found)
