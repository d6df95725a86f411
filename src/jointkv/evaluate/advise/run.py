"""From a log to advice: one pass over it, in memory that does not grow with it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from jointkv.core.reuse import Integers
from jointkv.errors import BadInput
from jointkv.evaluate.advise.breaks import Break, find_break
from jointkv.evaluate.advise.kinds import ADVICE, ANYWHERE, BEFORE, BEHIND, Difference, Sides, described, difference
from jointkv.evaluate.advise.resident import Resident
from jointkv.evaluate.advise.result import Advice, Breaking
from jointkv.evaluate.advise.tokenizing import LineTokenizer, Spelling
from jointkv.evaluate.request_files import SaltedRequest, Unusable, chat_text, iter_requests, traced_tokens

TOGETHER = 64
"""Requests that are tokenized at a time."""
MOST_KINDS = 2000
"""Differences that are told apart; later ones are counted together."""
LISTED, LEAST_SHARE = 12, 0.001
REASONS = 5
SAMPLES = 256
"""Places that a median is taken of."""


@dataclass(frozen=True)
class Settings:
    """How a log is read.

    Attributes:
        block_size: tokens per block, even.
        pool_tokens: that stay resident.
        count: requests at the most; None: all.
        skip_bad: whether entries that cannot be used are counted instead of refused.
        chat: whether plain prompts are messages of a user.
    """

    block_size: int = 16
    pool_tokens: int = 1_000_000
    count: int | None = None
    skip_bad: bool = False
    chat: bool = False


def advise(
    source: str | Path, model: str, tokenizer: Any, settings: Settings, progress: Callable[[int], None]
) -> Advice:
    """Read a log and say what could be reused of it, and what breaks its prefixes.

    Args:
        model: the name of the `tokenizer`, which is one of the `transformers` library.
        progress: called with the number of requests that are done.

    Raises:
        BadInput: the source cannot be read or holds no request; or, unless bad entries are skipped, the first entry
            that cannot be used, as `file:line: reason`.
    """
    if settings.block_size < 2 or settings.block_size % 2:
        raise BadInput(f"block_size: an even number expected, got {settings.block_size}")
    began, walk = time.monotonic(), _Walk(tokenizer, settings)
    read = _Reader(source, tokenizer, settings)
    for requests in _ahead(read.tokenized()):
        for request, tokens in requests:
            walk.request(request, tokens)
        progress(walk.requests)
    if not walk.requests:
        raise BadInput(f"{source}: no request that can be used; {'; '.join(read.reasons) or 'it is empty'}")
    return Advice(
        source=Path(str(source)).name,
        model=model,
        block_size=settings.block_size,
        pool_tokens=settings.pool_tokens,
        requests=walk.requests,
        tenants=len(walk.tenants),
        unusable=read.unusable,
        reasons=read.reasons,
        without_tools=read.without_tools,
        **walk.counts,
        **walk.breaks(),
        seconds=time.monotonic() - began,
    )


@dataclass(frozen=True)
class _Prompt:
    """A request of which only that is kept which advice needs."""

    place: str
    owner: str | None
    text: str | None
    bos: bool
    traced: Integers | None


class _Reader:
    """The requests of a log, and what could not be used of it."""

    def __init__(self, source: str | Path, tokenizer: Any, settings: Settings) -> None:
        self._source, self._tokenizer, self._settings = source, tokenizer, settings
        self._encode = LineTokenizer(tokenizer)
        self.unusable, self.reasons, self.without_tools = 0, list[str](), 0

    def __iter__(self) -> Iterator[_Prompt]:
        for read in iter_requests(self._source, SaltedRequest, self._settings.count):
            try:
                if isinstance(read, Unusable):
                    raise BadInput(read.reason)
                yield self._prompt(read)
            except BadInput as reason:
                if not self._settings.skip_bad:
                    raise BadInput(f"{read.place}: {reason}; --skip-bad leaves such entries out") from None
                self.unusable += 1
                if len(self.reasons) < REASONS:
                    self.reasons.append(f"{read.place.within}: {reason}")

    def tokenized(self) -> Iterator[list[tuple[_Prompt, Integers]]]:
        """Some requests at a time, with their tokens."""
        left = islice(self, None if self._settings.count is None else min(self._settings.count, sys.maxsize))
        while requests := list(islice(left, TOGETHER)):
            yield list(zip(requests, self._tokens(requests), strict=True))

    def _tokens(self, prompts: Sequence[_Prompt]) -> list[Integers]:
        texts = [each for each in prompts if each.text is not None]
        made = iter(self._encode([each.text or "" for each in texts], [each.bos for each in texts]))
        return [next(made) if each.traced is None else each.traced for each in prompts]

    def _prompt(self, read: SaltedRequest) -> _Prompt:
        place, owner = str(read.place.within), read.cache_salt
        if read.hash_ids:
            return _Prompt(place, owner, None, False, np.array(traced_tokens(self._tokenizer, read), np.int64))
        if read.prompt is not None and not (self._settings.chat and self._tokenizer.chat_template):
            return _Prompt(place, owner, read.prompt, True, None)
        text = chat_text(self._tokenizer, read)
        self.without_tools += bool(read.tools) and _name(read.tools[0]) not in text
        return _Prompt(place, owner, text, False, None)


def _name(tool: Mapping[str, Any]) -> str:
    function = tool.get("function")
    return str((function if isinstance(function, Mapping) else tool).get("name", ""))


Part = TypeVar("Part")


def _ahead(parts: Iterator[Part]) -> Iterator[Part]:
    """`parts`, each made while the one before it is at work: a tokenizer leaves the interpreter to others."""
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, parts, None)
        while (part := coming.result()) is not None:
            coming = thread.submit(next, parts, None)
            yield part


@dataclass
class _Cluster:
    """Breaks of one kind behind one text."""

    example: Difference
    place: str
    requests: int = 0
    gain: int = 0
    lengths: set[int] = field(default_factory=set)
    tokens: list[int] = field(default_factory=list)
    first: int = 1 << 62
    last: int = 0

    def add(self, found: Difference, gain: int) -> None:
        self.requests, self.gain = self.requests + 1, self.gain + gain
        self.lengths.add(found.length)
        self.first, self.last = min(self.first, found.token), max(self.last, found.token)
        if len(self.tokens) < SAMPLES:
            self.tokens.append(found.token)


class _Walk:
    """Requests one after another, and sums over them."""

    def __init__(self, tokenizer: Any, settings: Settings) -> None:
        self._settings, self._spelling = settings, Spelling(tokenizer)
        self._resident = Resident(settings.block_size, settings.pool_tokens)
        self._clusters: dict[tuple[str, str], _Cluster] = {}
        self._other = 0
        self.requests = 0
        self.tenants: set[str | None] = set()
        self.counts: dict[str, Any] = dict.fromkeys(("tokens", "exact_tokens", "same_tokens", "moved_tokens"), 0)

    def request(self, prompt: _Prompt, tokens: Integers) -> None:
        """The next one."""
        seen = self._resident.request(prompt.owner, tokens)
        self.requests += 1
        self.tenants.add(prompt.owner)
        for name in self.counts:
            self.counts[name] += getattr(seen, name)
        size = self._settings.block_size
        found = find_break(tokens, seen, self._resident.sources, size, self._resident.least)
        if found is not None:
            self._note(prompt, self._difference(prompt, tokens, found), found.gain)

    def breaks(self) -> dict[str, Any]:
        """The fields of `Advice` that tell of them."""
        ranked = sorted(self._clusters.values(), key=lambda each: -each.gain)
        least = LEAST_SHARE * self.counts["tokens"]
        listed = [each for each in ranked[:LISTED] if each.gain >= least]
        other = self._other + sum(each.gain for each in ranked[len(listed) :])
        return {"breaks": [self._breaking(each) for each in listed], "other_gain": other}

    def _difference(self, prompt: _Prompt, tokens: Integers, found: Break) -> Difference:
        if prompt.text is None:
            return Difference("blocks", found.at, 0, "", "", "")
        first = max(0, found.at - BEFORE)
        ours, theirs = (
            self._spelling.words(each[first : found.at + BEHIND].tolist()) for each in (tokens, found.theirs)
        )

        def place(index: int) -> int:
            length, number = 0, 0
            while number < len(ours) and length + len(ours[number]) <= index:
                length, number = length + len(ours[number]), number + 1
            return first + number

        return difference(Sides("".join(ours), "".join(theirs)), place, found.reordered)

    def _note(self, prompt: _Prompt, found: Difference, gain: int) -> None:
        key = (found.kind, "" if found.kind in ANYWHERE else found.anchor)
        if key not in self._clusters:
            if len(self._clusters) >= MOST_KINDS:
                self._other += gain
                return
            self._clusters[key] = _Cluster(found, prompt.place)
        self._clusters[key].add(found, gain)

    def _breaking(self, cluster: _Cluster) -> Breaking:
        example, tokens = cluster.example, sorted(cluster.tokens)
        return Breaking(
            kind=example.kind,
            says=described(example.kind, min(cluster.lengths), max(cluster.lengths)),
            token=tokens[len(tokens) // 2],
            first_token=cluster.first,
            last_token=cluster.last,
            requests=cluster.requests,
            gain=cluster.gain,
            gain_share=cluster.gain / self.counts["tokens"],
            anchor=example.anchor,
            ours=example.ours,
            theirs=example.theirs,
            place=cluster.place,
            advice=ADVICE[example.kind],
        )
