"""Retrieval traffic: passages of a common pool behind the question that found them, in varying order and place."""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

from jointkv.evaluate.jsonl import read_records
from jointkv.evaluate.samples import packaged
from jointkv.evaluate.traffic.base import Request, Tokenizer, Traffic, split_request

PASSAGE_CHARACTERS = 540
_FEWEST, _MOST = 5, 6
_LONGEST_QUOTE = 12


@dataclass(frozen=True)
class Passage:
    """Consecutive sentences of one report: what a search finds as one hit."""

    report: int
    sentences: tuple[str, ...]

    @property
    def text(self) -> str:
        """The passage as one paragraph."""
        return " ".join(self.sentences)

    @property
    def opening(self) -> str:
        """The first words of the passage, which no other passage has."""
        return " ".join(self.text.split()[:_LONGEST_QUOTE])

    @property
    def rest(self) -> str:
        """The passage behind its opening."""
        return " ".join(self.text.split()[_LONGEST_QUOTE:])


def load_passages() -> list[Passage]:
    """The packaged government reports, cut into passages of about `PASSAGE_CHARACTERS`, in order."""
    passages = []
    for report, record in enumerate(read_records(packaged("gov_report_sample.jsonl"))):
        held: list[str] = []
        for sentence in re.split(r"(?<=[.?!])\s+(?=[A-Z(\[])", record.fields["text"]):
            held.append(sentence)
            if sum(map(len, held)) >= PASSAGE_CHARACTERS:
                passages.append(Passage(report, tuple(held)))
                held = []
    return passages


class Retrieval(Traffic):
    """Each request asks for the rest of one passage, which is among the five or six that it brings."""

    name = "retrieval"
    description = "own question, five or six passages of a common pool in varying order, quotation as answer"

    def draw(self, tokenizer: Tokenizer, count: int, continuation_tokens: int, rng: random.Random) -> Iterator[Request]:
        """The passage asked for is another one in each request."""
        pool = load_passages()
        # Some passages are found by many questions, most by few: Zipf's law over a random ranking.
        ranking = rng.sample(pool, len(pool))
        weights = list(accumulate(1 / rank for rank in range(1, len(ranking) + 1)))
        for wanted in rng.sample(pool, len(pool)):
            found = _find(wanted, pool, ranking, weights, rng)
            request = split_request(tokenizer, _prompt(wanted, found), f" {wanted.rest}", continuation_tokens)
            if request is not None:
                yield request


def _find(
    wanted: Passage, pool: list[Passage], ranking: list[Passage], weights: list[float], rng: random.Random
) -> list[Passage]:
    """The passage wanted, another of its report, and popular ones, in random order."""
    related = [passage for passage in pool if passage.report == wanted.report and passage != wanted]
    found = [wanted, rng.choice(related)]
    size = rng.randint(_FEWEST, _MOST)
    while len(found) < size:
        (passage,) = rng.choices(ranking, cum_weights=weights)
        if passage not in found:
            found.append(passage)
    rng.shuffle(found)
    return found


def _prompt(wanted: Passage, found: list[Passage]) -> str:
    passages = "".join(f"\n\n[{number}] {passage.text}" for number, passage in enumerate(found, start=1))
    question = f'Question: How does the passage go on that begins "{wanted.opening}"?'
    return f"{question}{passages}\n\n{question}\nAnswer:"
