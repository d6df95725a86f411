"""One engine, a victim and an attacker: what the attacker sees when the text it guesses is resident, and when not."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from engines import scheduler_of

SCENARIOS = ("idle", "busy")
GUESSES = ("exact", "near")
FIRST_LINE = 24
"""Tokens of the line in front of the text: less than a block."""
BLOCK = 32
"""Tokens of a block: the least that every processor can do."""
REMAINDER = 30
"""Prompt tokens in the last block, which is not full and can be neither cached nor shared."""
ANSWER = 8
"""Tokens of the probe's answer: they fill the block in which its prompt ends."""
SPARE = 10
"""Tokens of a neighbour's answer beyond that: it outlasts the trial, and then is aborted."""
VICTIM, ATTACKER = "victim", "attacker"
CLOCKS = {"": time.perf_counter, "cpu_": time.process_time}
"""Prefixes of observables: time as it passes for the attacker, and processor time of the engine, which is what would
pass on a machine with nothing else to do."""
Moment = tuple[float, ...]


@dataclass(frozen=True)
class Case:
    """One trial.

    Attributes:
        scenario: `"idle"`: the victim was served and is gone, the engine does nothing else. `"busy"`: the victim and
            a bystander are being served, and few pages are free.
        guess: `"exact"`: the attacker sends the victim's prompt. `"near"`: its text behind another first line.
        salted: victim and attacker have different salts; else neither has one.
        resident: the guess is right. If not, the victim's text is another one of the same length.
    """

    scenario: str
    guess: str
    salted: bool
    resident: bool


@dataclass(frozen=True)
class Sizes:
    """Lengths in tokens and the pool in pages.

    While victim, bystander and probe run, the pages that are free lack one for the gauge; what merges frees it.
    """

    text_blocks: int = 3

    @property
    def prompt(self) -> int:
        """Tokens of every prompt."""
        return self.text_blocks * BLOCK + REMAINDER

    @property
    def gauge(self) -> int:
        """Prompt tokens of the request that asks whether pages are free."""
        return self.prompt // 2

    @property
    def pages(self) -> int:
        """Room for victim, bystander and probe with their answers; vLLM keeps one page."""
        neighbour, probe = (-(-(self.prompt + answer) // BLOCK) for answer in (ANSWER + SPARE, ANSWER))
        return 1 + 2 * neighbour + probe


@dataclass
class Sent:
    """A request as its sender sees it.

    Attributes:
        sent, arrivals: seconds on each of `CLOCKS`: when it was sent, and when each token came.
        cached: prompt tokens that the prefix cache answered.
    """

    sent: Moment
    arrivals: list[Moment] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    cached: int = 0
    done: bool = False

    def times(self, clock: int) -> dict[str, float]:
        """Seconds to the first token, between tokens (mean; with at least two), and to the last one."""
        sent, first, last = (moment[clock] for moment in (self.sent, self.arrivals[0], self.arrivals[-1]))
        return {"ttft": first - sent, "itl": (last - first) / max(1, len(self.arrivals) - 1), "e2e": last - sent}


class Texts:
    """Real text that no two requests have in common: windows of a corpus, each from a place of its own.

    Args:
        corpus: token ids.
        lines: token ids of first lines, `FIRST_LINE` each, all different.
    """

    def __init__(self, corpus: Sequence[int], lines: Iterator[list[int]], seed: int) -> None:
        self._corpus, self._lines = corpus, lines
        self._starts = list(range(len(corpus) - 1024))
        random.Random(seed).shuffle(self._starts)

    def text(self, count: int) -> list[int]:
        """`count` tokens, at most 1024."""
        start = self._starts.pop()
        return list(self._corpus[start : start + count])

    def line(self) -> list[int]:
        return next(self._lines)


class Attack:
    """Carries out trials on a vLLM engine of this process; nothing else may use it."""

    def __init__(self, engine: Any, sizes: Sizes, texts: Texts) -> None:
        self.engine, self.sizes, self.texts = engine, sizes, texts
        self._open: dict[str, Sent] = {}
        self._names = itertools.count()

    def run(self, case: Case) -> dict[str, float]:
        """What the attacker sees in one trial, see `OBSERVABLES` in side_channel.py. Times in seconds."""
        line, guessed = self.texts.line(), self._text()
        served = guessed if case.resident else self._text()
        busy = case.scenario == "busy"
        victim = self._send(line + served, ANSWER + SPARE if busy else 2, case, VICTIM)
        if busy:
            bystander = self._send(self.texts.line() + self._text(), ANSWER + SPARE, case, VICTIM)
            self._until_tokens(victim, 2)
            self._until_tokens(bystander, 2)
        else:
            self._until_done()
        merged = self.merged()
        prompt = (line if case.guess == "exact" else self.texts.line()) + guessed
        probe = self._send(prompt, ANSWER, case, ATTACKER)
        gauge = None
        if busy:
            self._until_tokens(probe, 2)
            gauge = self._send(self.texts.text(self.sizes.gauge), 1, case, ATTACKER)
            self._until_tokens(gauge, 1)
        self._until_tokens(probe, ANSWER)
        self._abort_all()
        seen: dict[str, float] = {"metrics_merged": self.merged() - merged}
        turn = self._send(prompt + probe.tokens + self.texts.text(REMAINDER), 1, case, ATTACKER)
        self._until_done()
        seen |= {"cached_tokens": probe.cached, "turn_cached_tokens": turn.cached}
        for clock, prefix in enumerate(CLOCKS):
            seen |= {prefix + name: value for name, value in probe.times(clock).items()}
            seen[f"{prefix}turn_ttft"] = turn.times(clock)["ttft"]
            if gauge is not None:
                seen[f"{prefix}gauge_ttft"] = gauge.times(clock)["ttft"]
        return seen

    def merged(self) -> int:
        """Blocks merged since the start, as the engine's `/metrics` page says."""
        connector = scheduler_of(self.engine).connector
        return 0 if connector is None else connector.scheduler.totals()["blocks_merged"]

    def faults(self) -> int:
        """Errors inside the plugin since the start; after the first it merges nothing more."""
        connector = scheduler_of(self.engine).connector
        return 0 if connector is None else connector.scheduler.totals()["faults"]

    def _text(self) -> list[int]:
        return self.texts.text(self.sizes.prompt - FIRST_LINE)

    def _send(self, prompt: list[int], out: int, case: Case, party: str) -> Sent:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        name = f"{party}-{next(self._names)}"
        asked: dict[str, Any] = {"prompt_token_ids": prompt}
        if case.salted:
            asked["cache_salt"] = party
        sampling = SamplingParams(
            max_tokens=out, temperature=0, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.DELTA
        )
        sent = self._open[name] = Sent(_now())
        self.engine.add_request(name, asked, sampling)
        return sent

    def _step(self) -> None:
        outputs = self.engine.step()
        now = _now()
        for output in outputs:
            sent = self._open.get(output.request_id)
            if sent is None:
                continue
            new = output.outputs[0].token_ids
            sent.arrivals.extend([now] * len(new))
            sent.tokens.extend(new)
            sent.cached = output.num_cached_tokens or 0
            if output.finished:
                sent.done = True
                del self._open[output.request_id]

    def _until_tokens(self, sent: Sent, count: int) -> None:
        while len(sent.tokens) < count:
            if not self.engine.has_unfinished_requests():
                raise RuntimeError(f"a request ended after {len(sent.tokens)} of {count} tokens")
            self._step()

    def _until_done(self) -> None:
        while self.engine.has_unfinished_requests():
            self._step()

    def _abort_all(self) -> None:
        self.engine.abort_request(list(self._open))
        self._open.clear()
        self._until_done()


def _now() -> Moment:
    return tuple(clock() for clock in CLOCKS.values())


def schedule(rounds: int, salted: Sequence[bool], seed: int) -> list[Case]:
    """Every case `rounds` times, each round in an order of its own: classes take turns at random."""
    cases = [Case(*each) for each in itertools.product(SCENARIOS, GUESSES, salted, (False, True))]
    draw = random.Random(seed)
    return [case for _ in range(rounds) for case in draw.sample(cases, len(cases))]
